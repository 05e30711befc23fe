"""Float32 products on tensor cores: without loss if one factor is of signs and zeros, else to 16 bits.

A float32 number is the sum of three bfloat16 numbers (8 bits of significand each), and products of bfloat16 numbers are
exact in float32. So with B of entries that bfloat16 holds (signs, zeros), A B = A_1 B + A_2 B + A_3 B, three products
on tensor cores with float32 sums, differs from the float32 product by the order of summation alone.

For two float32 factors, A_1 B_1 + A_1 B_2 + A_2 B_1 leaves out what is below 2^-16 of a product: far more than TF32
keeps (2^-11), at a fraction of the time of float32 arithmetic. That is enough where products steer a search (feedback
of rounding errors, gradients of coordinate descent, relative errors); nothing stored is computed so.
"""

from __future__ import annotations

import torch
from torch import Tensor

PARTS = 3
# Columns of a split matrix are padded to a multiple of so many.
ALIGNED = 64


class SplitMatrix:
    """A float32 matrix prepared for products with exact bfloat16 matrices; on a CPU it is kept as it is.

    Args:
        matrix: float32 (rows, inner), within the range of bfloat16.
    """

    def __init__(self, matrix: Tensor) -> None:
        self._inner = matrix.shape[1]
        # Tensor cores read rows 16 bytes at a time: a row of odd length would cost several times as much.
        self._padding = -self._inner % ALIGNED if matrix.is_cuda and matrix.dtype == torch.float32 else 0
        self._parts = [matrix]
        if matrix.is_cuda and matrix.dtype == torch.float32:
            self._parts = [torch.nn.functional.pad(part, (0, self._padding)) for part in split(matrix)]

    def times(self, other: Tensor) -> Tensor:
        """float32 (rows, columns).

        Args:
            other: float32 (inner, columns), every entry exact in bfloat16.
        """
        if len(self._parts) == 1:
            return self._parts[0] @ other
        narrow = torch.nn.functional.pad(other.to(torch.bfloat16), (0, 0, 0, self._padding))
        smallest, *larger = reversed(self._parts)
        total = torch.mm(smallest, narrow, out_dtype=torch.float32)
        for part in larger:
            _add(total, part, narrow, 1.0, 1.0)
        return total


def add_product(target: Tensor, left: Tensor, right: Tensor, alpha: float = 1.0, *, beta: float = 1.0) -> Tensor:
    """target <- beta target + alpha left right, all float32; on a CUDA device to about 2^-16 of the factors.

    Args:
        target: (rows, columns), contiguous rows; changed in place. left: (rows, inner). right: (inner, columns).
        alpha, beta: as in `Tensor.addmm_`; with beta 0 the target may hold anything.
    """
    if not _on_tensor_cores(target, left, right):
        return target.addmm_(left, right, alpha=alpha, beta=beta)
    left_parts, right_parts = split(left, 2), split(right, 2)
    for a, b in ((1, 0), (0, 1), (0, 0)):  # the smallest first
        _add(target, left_parts[a], right_parts[b], alpha, beta)
        beta = 1.0
    return target


def product(left: Tensor, right: Tensor) -> Tensor:
    """left right, float32 (rows, columns), as `add_product` has it."""
    target = torch.empty(left.shape[0], right.shape[1], dtype=left.dtype, device=left.device)
    return add_product(target, left, right, beta=0.0)


def _add(target: Tensor, left: Tensor, right: Tensor, alpha: float, beta: float) -> Tensor:
    return torch.addmm(target, left, right, out_dtype=torch.float32, alpha=alpha, beta=beta, out=target)


def _on_tensor_cores(*factors: Tensor) -> bool:
    return all(item.is_cuda and item.dtype == torch.float32 and item.numel() for item in factors)


class SplitFactor:
    """A float32 matrix prepared to be multiplied again and again, whole or by its rows; on a CPU kept as it is.

    Args:
        matrix: A, float32 (rows, columns), columns a multiple of 8 for speed.
    """

    def __init__(self, matrix: Tensor) -> None:
        self._matrix = matrix
        self._halves = split(matrix, 2) if _on_tensor_cores(matrix) else []

    def subtract(self, target: Tensor, right: Tensor) -> None:
        """target <- target - A right, in place; all float32."""
        if not self._halves:
            target.addmm_(self._matrix, right, alpha=-1)
            return
        high, low = split(right, 2)
        for a, b in ((1, high), (0, low), (0, high)):  # the smallest first
            _add(target, self._halves[a], b, -1.0, 1.0)

    def subtract_rows(self, target: Tensor, rows: slice, columns: slice, right: Tensor, halves: Tensor | None) -> None:
        """target <- target - A[rows, columns]^T right, in place.

        Args:
            halves: `right` as `joined` has it, if somebody made that already.
        """
        if not self._halves:
            target.addmm_(self._matrix[rows, columns].T, right, alpha=-1)
            return
        high, low = (half[rows, columns] for half in self._halves)
        _add(target, torch.cat([high, high, low]).T, joined(right) if halves is None else halves, -1.0, 1.0)


def joined(right: Tensor) -> Tensor:
    """The rows of a float32 matrix as bfloat16, [high, low, high]: the right factor that [high, high, low] asks for."""
    high, low = split(right, 2)
    return torch.cat([high, low, high])


def split(matrix: Tensor, count: int = PARTS) -> list[Tensor]:
    """So many bfloat16 matrices, largest first; the exact sum of three is the float32 matrix."""
    parts, rest = [], matrix
    for _ in range(count):
        part = rest.to(torch.bfloat16)
        parts.append(part)
        rest = rest - part.float()
    return parts
