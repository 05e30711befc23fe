"""What the binarisers without means return: everything the packed form stores, not yet packed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class BinaryPlanes:
    """Stored form of one weight matrix, ordered as in `whit.formats.binary_residual`.

    Attributes:
        salient: marks, bool (columns,).
        signs, second: planes, bool (rows, columns).
        scalars: float32 values exact in float16, (rows, blocks, 4).
    """

    salient: Tensor
    signs: Tensor
    second: Tensor
    scalars: Tensor
