"""Model inputs with provenance: what calibration and evaluation data look like to the rest of the toolkit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class ModelInputs:
    """Samples ready for `model(**batch)`.

    Attributes:
        batches: one dict of keyword arguments per sample, tensors on CPU with a leading dimension of 1.
        tokens: token positions in all batches (samples, where the inputs are no tokens).
        provenance: JSON: name, path (file name only), sha256 of the content, licence, sequences, sequence_length,
            tokens, characters, characters_per_token, seed, notes, protocol (fields of the protocol id), sketch (for
            the leak test).
        has_labels: the data came with labels.
    """

    batches: list[dict[str, Tensor]]
    tokens: int
    provenance: dict[str, Any]
    has_labels: bool
