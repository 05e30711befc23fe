"""Float32 products with matrices of small whole numbers, on tensor cores and without loss.

A float32 number is the sum of three bfloat16 numbers (8 bits of significand each), and products of bfloat16 numbers are
exact in float32. So with B of entries that bfloat16 holds (signs, zeros), A B = A_1 B + A_2 B + A_3 B, three products
on tensor cores with float32 sums, differs from the float32 product by the order of summation alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

PARTS = 3


class SplitMatrix:
    """A float32 matrix prepared for products with exact bfloat16 matrices; on a CPU it is kept as it is.

    Args:
        matrix: float32 (rows, inner), within the range of bfloat16.
    """

    def __init__(self, matrix: Tensor) -> None:
        self._parts = split(matrix) if matrix.is_cuda and matrix.dtype == torch.float32 else [matrix]

    def times(self, other: Tensor) -> Tensor:
        """float32 (rows, columns).

        Args:
            other: float32 (inner, columns), every entry exact in bfloat16.
        """
        if len(self._parts) == 1:
            return self._parts[0] @ other
        narrow = other.to(torch.bfloat16)
        products = [torch.mm(part, narrow, out_dtype=torch.float32) for part in reversed(self._parts)]
        total = products[0]  # the smallest first
        for product in products[1:]:
            total += product
        return total


def split(matrix: Tensor) -> list[Tensor]:
    """Three bfloat16 matrices whose exact sum is the float32 matrix, largest first."""
    parts, rest = [], matrix
    for _ in range(PARTS):
        part = rest.to(torch.bfloat16)
        parts.append(part)
        rest = rest - part.float()
    return parts
