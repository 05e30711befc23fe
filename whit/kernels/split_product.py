"""Float32 products on tensor cores, to 16 bits and more.

A float32 number is the sum of bfloat16 numbers (8 bits of significand each), and products of bfloat16 numbers are exact
in float32, in which tensor cores add them. Of A = A_1 + A_2 and B = B_1 + B_2, the products A_1 B_1 + A_1 B_2 + A_2 B_1
leave out what is below 2^-16 of a product: far less than TF32 does (2^-11), at a fraction of the time of float32
arithmetic. That is enough where products steer a search: feedback of rounding errors, gradients, relative errors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def add_product(target: Tensor, left: Tensor, right: Tensor, alpha: float = 1.0, *, beta: float = 1.0) -> Tensor:
    """target <- beta target + alpha left right, all float32; on a CUDA device to about 2^-16 of the factors.

    Args:
        target: (rows, columns), contiguous rows; changed in place. left: (rows, inner). right: (inner, columns).
        alpha, beta: as in `Tensor.addmm_`; with beta 0 the target may hold anything.
    """
    if not _on_tensor_cores(target, left, right):
        return target.addmm_(left, right, alpha=alpha, beta=beta)
    left_parts, right_parts = split(left), split(right)
    for a, b in ((1, 0), (0, 1), (0, 0)):  # the smallest first
        _add(target, left_parts[a], right_parts[b], alpha, beta)
        beta = 1.0
    return target


def product(left: Tensor, right: Tensor) -> Tensor:
    """left right, float32 (rows, columns), as `add_product` has it."""
    target = torch.empty(left.shape[0], right.shape[1], dtype=left.dtype, device=left.device)
    return add_product(target, left, right, beta=0.0)


def coarse_product(left: Tensor, right: Tensor) -> Tensor:
    """left right, float32 (rows, columns), for sums over many entries; on a CUDA device of factors of 8 bits."""
    if not _on_tensor_cores(left, right):
        return left @ right
    return torch.mm(left.to(torch.bfloat16), right.to(torch.bfloat16), out_dtype=torch.float32)


def _add(target: Tensor, left: Tensor, right: Tensor, alpha: float, beta: float) -> Tensor:
    return torch.addmm(target, left, right, out_dtype=torch.float32, alpha=alpha, beta=beta, out=target)


def _on_tensor_cores(*factors: Tensor) -> bool:
    return all(item.is_cuda and item.dtype == torch.float32 and item.numel() for item in factors)


class SplitFactor:
    """A float32 matrix prepared to be multiplied again and again, whole or by its rows; on a CPU kept as it is.

    Args:
        matrix: A, float32 (rows, columns).
    """

    def __init__(self, matrix: Tensor) -> None:
        self._matrix = matrix
        self._halves: tuple[Tensor, ...] = ()
        if _on_tensor_cores(matrix):
            # Rows that begin at multiples of 16 bytes: others are multiplied several times slower.
            self._padding = -matrix.shape[1] % 8
            self._wide = split(_padded(matrix, 1, self._padding))
            self._halves = tuple(half[:, : matrix.shape[1]] for half in self._wide)

    def times(self, pattern: Tensor) -> Tensor:
        """A P, float32; P of signs and zeros, of any dtype. On a CUDA device with A to 8 bits.

        That is for the normal equations of least squares that are solved by turns: their right side is exact, so what A
        lacks makes a step a little longer or shorter, and the next one makes up for it.
        """
        if not self._halves:
            return self._matrix @ pattern.to(self._matrix.dtype)
        narrow = _padded(pattern.to(torch.bfloat16), 0, self._padding)
        return torch.mm(self._wide[0], narrow, out_dtype=torch.float32)

    def part(self, places: Tensor) -> SplitFactor:
        """The matrix between some columns and the same rows."""
        return SplitFactor(self._matrix[places][:, places])

    def subtract(self, target: Tensor, right: Tensor) -> None:
        """target <- target - A right, in place; all float32."""
        if not self._halves:
            target.addmm_(self._matrix, right, alpha=-1)
            return
        high, low = split(right)
        for a, b in ((1, high), (0, low), (0, high)):  # the smallest first
            _add(target, self._halves[a], b, -1.0, 1.0)

    @property
    def panel_columns(self) -> int:
        """Rows of A that one panel should hold: more where each pass over the target is dear."""
        return 512 if self._halves else 128

    def panel(self, start: int, stop: int, rows: int) -> Panel:
        """Rows start..stop of A, to be multiplied with what becomes known of as many rows (stop - start, `rows`)."""
        parts = [half[start:stop] for half in self._halves] or [self._matrix[start:stop]]
        return Panel(parts, start, rows)


class Panel:
    """A^T R for some rows of A, where R becomes known block by block; what is not known yet is zero.

    On a CUDA device R is kept as three bfloat16 matrices, [high, low, high], for [high, high, low] of A.

    Args:
        parts: rows of A, float32, or as `split` has them.
        start: number of the first of them.
        rows: width of R.

    Attributes:
        start, stop: the rows of A.
    """

    def __init__(self, parts: Sequence[Tensor], start: int, rows: int) -> None:
        self.start, self.stop = start, start + len(parts[0])
        self._left = torch.cat([parts[0], parts[0], parts[1]]) if len(parts) > 1 else parts[0]
        self._right = self._left.new_zeros(len(self._left), rows)

    def halves(self, start: int, stop: int) -> Tensor | None:
        """Where rows start..stop of R belong as [high, low, high], (3, stop - start, rows); None if R is float32."""
        if self._right.dtype == torch.float32:
            return None
        return self._right.view(3, self.stop - self.start, -1)[:, start - self.start : stop - self.start]

    def put(self, start: int, known: Tensor) -> None:
        """Rows of R from `start` on, float32."""
        halves = self.halves(start, start + len(known))
        if halves is None:
            self._right[start - self.start : start - self.start + len(known)] = known
        else:
            high, low = split(known)
            halves.copy_(torch.stack([high, low, high]))

    def taken_off(self, target: Tensor, columns: slice) -> Tensor:
        """target - A[rows, columns]^T R, memory of its own: (columns, rows)."""
        if self._right.dtype == torch.float32:
            return torch.addmm(target, self._left[:, columns].T, self._right, alpha=-1)
        return torch.addmm(target, self._left[:, columns].T, self._right, out_dtype=torch.float32, alpha=-1)

    def take_off(self, target: Tensor, columns: slice) -> None:
        """target <- target - A[rows, columns]^T R, in place."""
        if self._right.dtype == torch.float32:
            target.addmm_(self._left[:, columns].T, self._right, alpha=-1)
        else:
            _add(target, self._left[:, columns].T, self._right, -1.0, 1.0)


def _padded(matrix: Tensor, dimension: int, count: int) -> Tensor:
    """The matrix with so many zeros after its rows (1) or columns (0)."""
    if not count:
        return matrix
    return torch.nn.functional.pad(matrix, (0, count) if dimension else (0, 0, 0, count))


def split(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Two bfloat16 matrices whose sum is a float32 matrix to 2^-17 of its entries, the larger first."""
    high = matrix.to(torch.bfloat16)
    return high, (matrix - high.float()).to(torch.bfloat16)
