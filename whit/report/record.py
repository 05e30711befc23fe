"""Result records: plain dataclasses that become `result.json`, the terminal table, the model card and the HTML page."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1
RESULT_FILE = "result.json"


@dataclass(frozen=True)
class LayerRecord:
    """What one weight became.

    Attributes:
        name: module name in the model.
        block: name of the block it lies in, or "" for embeddings and heads.
        rows, columns: outputs and inputs.
        method, format: JSON of the method value and of the packed layout.
        stored_bytes: all packed tensors of the layer.
        error: relative output error ||(W - Q) X||^2 / ||W X||^2 on the calibration inputs; weight error without inputs.
        weight_error: ||W - Q||^2 / ||W||^2.
        seconds: time spent in the method.
        notes: remarks of the method.
        details: what the method measured on the way (for example the scores of the number systems it chose among).
    """

    name: str
    block: str
    rows: int
    columns: int
    method: dict[str, Any]
    format: dict[str, Any]
    stored_bytes: int
    error: float
    weight_error: float
    seconds: float
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Weights in the layer."""
        return self.rows * self.columns

    @property
    def stored_bits(self) -> float:
        """Stored bytes x 8 / weights."""
        return self.stored_bytes * 8 / self.parameters


@dataclass(frozen=True)
class SizeRecord:
    """Bytes, all counted.

    Attributes:
        parameters: all parameters of the model, tied ones once.
        compressed_parameters, compressed_bytes: of the packed layers in blocks; of all, if none lies in a block.
        file_bytes: weight files and config on disk, headers included.
        original_file_bytes: the weight files the user gave.
        original_dense_bytes: the original's parameters in its 16- or 32-bit dtype (what `save_pretrained` would write).
    """

    parameters: int
    compressed_parameters: int
    compressed_bytes: int
    file_bytes: int
    original_file_bytes: int
    original_dense_bytes: int

    @property
    def compressed_bits(self) -> float:
        """Stored bits per weight of the compressed layers."""
        return self.compressed_bytes * 8 / max(self.compressed_parameters, 1)

    @property
    def file_bits(self) -> float:
        """Stored bits per parameter of the whole model on disk."""
        return self.file_bytes * 8 / max(self.parameters, 1)


@dataclass(frozen=True)
class MetricRecord:
    """One measured number with its 95 % bootstrap interval.

    Attributes:
        name: "perplexity", "kl_divergence" (nats per token), "output_error", "cosine_similarity", "top1_agreement", ...
        value, low, high: estimate and interval (low = high = value when there is nothing to resample).
        protocol: id of the protocol; equal ids mean comparable numbers.
        better: "lower" or "higher".
    """

    name: str
    value: float
    low: float
    high: float
    protocol: str
    better: str = "lower"


@dataclass(frozen=True)
class EvaluationRecord:
    """Metrics and a sample of one model.

    Attributes:
        metrics: measured numbers.
        sample: prompt and continuation (or another task output) as text; empty when there is none.
        data: provenance of the evaluation data (name, sha256, licence, windows, tokens).
        seconds: wall time.
        leak: the calibration text was part of the evaluation (only with --allow-leak).
    """

    metrics: list[MetricRecord]
    sample: dict[str, str]
    data: dict[str, Any]
    seconds: float
    leak: bool = False

    def metric(self, name: str) -> MetricRecord | None:
        """The metric of that name, if measured."""
        return next((item for item in self.metrics if item.name == name), None)


@dataclass(frozen=True)
class ExportRecord:
    """What an export wrote.

    Attributes:
        target: name of the target.
        path: directory or file that was written.
        stored: how packed weights are stored now -> how many of them, for example {"Q4_0": 210, "Q8_0": 1}.
        bytes_before: weight files and config of the compressed directory.
        bytes_after: weight files and config that were written (GGUF: the file).
        notes: remarks the user should read, for example what became larger and why.
    """

    target: str
    path: str
    stored: dict[str, int]
    bytes_before: int
    bytes_after: int
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Result:
    """Everything a run found: written to `result.json`.

    Attributes:
        model: label, architecture, identity hash, license, notes (for example: the source lies on a Q4_1 grid).
        run: method JSON, seed, calibration provenance, device, dtype, versions, command.
        layers: compressed weights. untouched: name -> reason for weights left alone.
        size: byte counts.
        original, compressed: evaluations, or None if skipped.
        timings: seconds by phase ("compression", "saving", "evaluation", "total").
        peak_host_bytes, peak_device_bytes: high-water marks; None where not measurable.
    """

    model: dict[str, Any]
    run: dict[str, Any]
    layers: list[LayerRecord]
    untouched: dict[str, str]
    size: SizeRecord
    original: EvaluationRecord | None
    compressed: EvaluationRecord | None
    timings: dict[str, float]
    peak_host_bytes: int | None = None
    peak_device_bytes: int | None = None
    schema: int = SCHEMA_VERSION

    def to_json(self) -> dict[str, Any]:
        """Plain JSON value."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Result:
        """Inverse of `to_json`."""
        values = dict(data)
        values["layers"] = [LayerRecord(**item) for item in values["layers"]]
        values["size"] = SizeRecord(**values["size"])
        for key in ("original", "compressed"):
            if values[key] is not None:
                item = dict(values[key])
                item["metrics"] = [MetricRecord(**metric) for metric in item["metrics"]]
                values[key] = EvaluationRecord(**item)
        return cls(**values)

    def save(self, path: Path) -> None:
        """Write as indented JSON, whole or not at all."""
        temporary = path.with_name(path.name + ".partial")
        temporary.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> Result:
        """Read what `save` wrote."""
        return cls.from_json(json.loads(path.read_text(encoding="utf-8")))
