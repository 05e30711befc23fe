"""What a run tells whoever listens (progress bar, plain lines, JSON lines, tests): a small protocol of callbacks."""

from __future__ import annotations

from dataclasses import dataclass, field

from whit.report.record import LayerRecord


@dataclass(frozen=True)
class PlannedLayer:
    """One weight and what will happen to it."""

    name: str
    block: str
    rows: int
    columns: int
    method: str
    format: str
    stored_bytes: int


@dataclass(frozen=True)
class Plan:
    """What a run will do, made before any work.

    Attributes:
        model: label of the model.
        architecture: class name.
        layers: weights that will be compressed.
        untouched: name -> reason for parameters left alone.
        parameters: of the whole model, tied ones once.
        compressed_bits: expected stored bits per weight over the compressed layers.
        file_bytes: expected size of the saved model.
        original_file_bytes, original_dense_bytes: as in `SizeRecord`.
        host_bytes, device_bytes: expected peak memory (device_bytes is 0 on CPU).
        minutes: estimate from the probe.
        blocks: number of blocks. blocks_done: finished by an earlier run that this one continues.
        calibration: provenance of the calibration data.
        notes: remarks the user should read.
        working_bytes: disk for what passes before the compression keep, freed at the end.
    """

    model: str
    architecture: str
    layers: list[PlannedLayer]
    untouched: dict[str, str]
    parameters: int
    compressed_bits: float
    file_bytes: int
    original_file_bytes: int
    original_dense_bytes: int
    host_bytes: int
    device_bytes: int
    minutes: float
    blocks: int
    blocks_done: int
    calibration: dict[str, object]
    notes: list[str] = field(default_factory=list)
    working_bytes: int = 0


class Listener:
    """Receives progress; every callback does nothing unless overridden."""

    def planned(self, plan: Plan) -> None:
        """The plan is made; work starts after this returns."""

    def phase(self, name: str, total: int) -> None:
        """A phase of `total` steps starts.

        In order: "gradients" and "survey" (only if a method asks for them), "embeddings", "calibration" and
        "compression" (once per stack of blocks), "saving", "evaluation".
        """

    def step(self, description: str) -> None:
        """One step of the current phase is done."""

    def layer(self, record: LayerRecord) -> None:
        """One layer was compressed."""

    def block(self, index: int, total: int, name: str) -> None:
        """Block `index` (from 0) was finished, written and journalled."""

    def note(self, message: str) -> None:
        """Something the user should know."""
