"""Options of a run that do not belong to a method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from whit.errors import KnobError

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class RunOptions:
    """How to run, whatever the method.

    Attributes:
        calibration: name of a bundled set, a text / jsonl file, a safetensors file of model inputs, or None (a mix).
        samples: calibration sequences.
        sequence_length: tokens per sequence; 0 takes the smaller of 512 and the model's maximum.
        evaluation: as `calibration`, for the evaluation data.
        evaluation_windows: windows evaluated; 0 for all.
        window: tokens per evaluation window; 0 takes the smaller of 2048 and the model's maximum.
        evaluate: measure original and compressed model after compressing.
        allow_leak: evaluate even if the calibration text is part of the evaluation text.
        embedding_bits: round-to-nearest bits for token embeddings and the output head (tied ones together); 16 leaves
            them alone.
        true_sequential: gather statistics again after each group of layers inside a block.
        skip: module-name patterns (fnmatch) to leave alone.
        seed, device, dtype: randomness, where to compute, and compute dtype ("auto": float32 on
            CPU, but bfloat16 for the calibration of a 16-bit model where the CPU has matrix units for it; the model's
            own on GPU).
        batch_size: sequences per forward pass; 0 takes as many as the device works well with.
    """

    calibration: str | None = None
    samples: int = 64
    sequence_length: int = 0
    evaluation: str | None = None
    evaluation_windows: int = 8
    window: int = 0
    evaluate: bool = True
    allow_leak: bool = False
    embedding_bits: int = 8
    true_sequential: bool = False
    skip: tuple[str, ...] = ()
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    batch_size: int = 0

    def __post_init__(self) -> None:
        self._at_least("samples", 1)
        self._at_least("sequence_length", 0)
        self._at_least("evaluation_windows", 0)
        self._at_least("window", 0)
        self._at_least("batch_size", 0)
        self._at_least("seed", 0)
        if self.seed >= 2**63:
            raise KnobError(f"seed must be less than 2**63, got {self.seed!r}")
        if self.embedding_bits not in (2, 3, 4, 5, 6, 7, 8, 16):
            raise KnobError(f"embedding_bits is 2 to 8, or 16 to leave embeddings alone, got {self.embedding_bits!r}")
        if self.dtype not in DTYPES:
            raise KnobError(f"dtype is one of {', '.join(DTYPES)}, got {self.dtype!r}")

    def _at_least(self, name: str, minimum: int) -> None:
        value: Any = getattr(self, name)
        if not isinstance(value, int) or value < minimum:
            raise KnobError(f"{name} must be a whole number of at least {minimum}, got {value!r}")
