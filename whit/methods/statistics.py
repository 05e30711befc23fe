"""What a method may know about a layer's inputs, and the second-order algebra shared by the methods that use it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

from whit.errors import ModelError
from whit.finite import all_finite
from whit.kernels.split_product import coarse_product, product


class Statistic(Enum):
    """Statistics the pipeline can gather for the inputs of a layer."""

    SECOND_MOMENT = "second_moment"  # H, (columns, columns)
    SQUARE_SUMS = "square_sums"  # (columns,), what Wanda and its like need: the diagonal of H without the rest
    RANGE = "range"  # (columns,), largest magnitude of each input
    SAMPLE = "sample"  # some of the input vectors themselves
    GRADIENT = "gradient"  # (rows, columns), of the model's loss with respect to the weight


@dataclass(frozen=True)
class InverseFactor:
    """U, upper triangular with H^-1 = U^T U, of the damped second moments; `dead` marks columns never used."""

    upper: Tensor
    dead: Tensor
    damping: float
    notes: tuple[str, ...]


@dataclass
class LayerStatistics:
    """Statistics of the inputs of one layer, or of a group of layers that share the same inputs.

    Attributes:
        columns: input width m.
        tokens: number of input vectors seen.
        second_moment: H = 2/N sum x x^T over the tokens of N sequences, float32 (m, m), or None if not asked for.
        square_sums: 1/N sum x_j^2 over the tokens of N sequences, float32 (m,): half the diagonal of H.
        absolute_maximum: max |x_j| over all tokens, float32 (m,).
        sample: input vectors, evenly spaced over the calibration tokens, float32 (k, m).
        gradient: sqrt(sum over sequences of (dL/dW)^2), float32 (rows, m); of one layer, so it is set per layer
            (`with_gradient`).
    """

    columns: int
    tokens: int = 0
    second_moment: Tensor | None = None
    square_sums: Tensor | None = None
    absolute_maximum: Tensor | None = None
    sample: Tensor | None = None
    gradient: Tensor | None = None
    _factors: dict[tuple[float, tuple[int, ...]], InverseFactor] = field(default_factory=dict, repr=False)

    def inverse_factor(self, damping: float, order: Tensor | None = None) -> InverseFactor:
        """U = cholesky(H^-1, upper) of H + damping * mean(diag H) * I (Frantar et al. 2022, section 3.3, step 3).

        Columns whose diagonal is zero are dead: their diagonal becomes 1. If H is not positive definite the damping is
        raised tenfold until it is, and the notes say so. Factors are kept, because layers that share inputs share them.

        Args:
            damping: relative to the mean diagonal of H.
            order: permutation of the columns (m,), or None for the natural order.

        Raises:
            ModelError: H holds NaN or Inf, or no damping up to 1e4 helps.
        """
        key = (damping, () if order is None else tuple(order.tolist()))
        if key not in self._factors:
            self._factors[key] = _factorise(self._moment(), damping, order)
        return self._factors[key]

    def damped(self, factor: InverseFactor, order: Tensor) -> Tensor:
        """H as `factor` (of that order) inverts it, its columns taken in `order`: float32 (m, m), memory of its own."""
        moment = self._moment()
        diagonal = torch.diagonal(moment).float().clone()
        diagonal[factor.dead] = 1
        diagonal += factor.damping * float(diagonal.mean())
        out = moment.float()[order][:, order].contiguous()
        torch.diagonal(out).copy_(diagonal[order])
        return out

    def input_square_sums(self) -> Tensor:
        """1/N sum x_j^2 of each input over the tokens of N sequences (Wanda's squared norm X_j): float32 (m,)."""
        if self.square_sums is not None:
            return self.square_sums
        return torch.diagonal(self._moment()) / 2

    def with_gradient(self, gradient: Tensor | None) -> LayerStatistics:
        """These statistics for one layer of the group: everything shared, factors included, but for the gradient."""
        return dataclasses.replace(self, gradient=gradient)

    def release(self) -> None:
        """Free what is large, once every layer that shares it is compressed."""
        self.second_moment = self.sample = self.gradient = None
        self._factors.clear()

    def dead_columns(self) -> Tensor:
        """Inputs that were zero in every calibration vector: bool (m,), diag(H) = 0."""
        return torch.diagonal(self._moment()) == 0

    def descending_order(self) -> Tensor:
        """Columns by descending diag(H), ties in natural order: int64 (m,)."""
        return torch.argsort(torch.diagonal(self._moment()), descending=True, stable=True)

    def _moment(self) -> Tensor:
        if self.second_moment is None:
            raise ValueError("second moments were not gathered: declare Statistic.SECOND_MOMENT in `needs`")
        return self.second_moment


def dead_column_notes(statistics: LayerStatistics) -> tuple[str, ...]:
    """A remark for the result if a method set the weights of dead inputs to zero."""
    dead = int(statistics.dead_columns().sum())
    return (f"{dead} of {statistics.columns} inputs never active in calibration: weights set to zero",) if dead else ()


def _factorise(moment: Tensor, damping: float, order: Tensor | None) -> InverseFactor:
    h = moment.float().clone()
    if not all_finite(h):
        raise ModelError("calibration activations hold NaN or Inf: try --dtype float32, or check the model's weights")
    diagonal = torch.diagonal(h)
    dead = diagonal == 0
    diagonal[dead] = 1
    if order is not None:
        h = h[order][:, order].contiguous()
    # A contiguous float32 mean times a float32 factor: the very bits of the released GPTQ and BiLLM codes.
    mean = torch.diag(h).mean()
    used, notes = damping, []
    while True:
        upper = _inverse_factor(h, used * mean)
        if upper is not None:
            break
        used = max(used, 1e-6) * 10
        if used > 1e4:
            raise ModelError("second moments of the calibration inputs cannot be inverted: use more calibration text")
    if used != damping:
        notes.append(f"damping raised from {damping:g} to {used:g}: second moments were not positive definite")
    return InverseFactor(upper, dead, used, tuple(notes))


def _inverse_factor(matrix: Tensor, damping: Tensor) -> Tensor | None:
    """U, upper triangular with (matrix + damping I)^-1 = U^T U; None if that is not positive definite.

    On a CPU by way of the inverse, as the released codes have it, bit for bit. On a GPU without it: with the columns in
    reverse order, matrix = L L^T becomes matrix = R R^T, R upper triangular, and U = R^-1. That is a quarter of the
    arithmetic.
    """
    straight = matrix.device.type == "cpu"
    damped = matrix.clone() if straight else matrix.flip(0, 1)
    torch.diagonal(damped).add_(damping)
    lower, failed = torch.linalg.cholesky_ex(damped)
    del damped  # of a wide layer this is gigabytes
    if int(failed):
        return None
    if straight:
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    else:
        lower = lower.flip(0, 1)
        upper = inverse_of_triangle(lower)
    return None if int(failed) or not all_finite(upper) else upper


def inverse_of_triangle(matrix: Tensor, leaf: int = 512) -> Tensor:
    """Inverse of an upper triangular matrix, block by block: [A B; 0 C]^-1 = [A^-1, -A^-1 B C^-1; 0, C^-1].

    On a GPU the products are those of `whit.kernels.split_product`: good to 16 bits, for feedback that steers a search.

    Args:
        matrix: (columns, columns), nothing below its diagonal.
        leaf: width at which a block is solved directly.
    """
    size = len(matrix)
    if size <= leaf:
        identity = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
        solved: Tensor = torch.linalg.solve_triangular(matrix, identity, upper=True)
        return solved
    half = -(-size // (2 * leaf)) * leaf
    first, last = inverse_of_triangle(matrix[:half, :half], leaf), inverse_of_triangle(matrix[half:, half:], leaf)
    out = torch.zeros_like(matrix)
    out[:half, :half], out[half:, half:] = first, last
    out[:half, half:] = product(product(first, matrix[:half, half:]), last).neg_()
    return out


def relative_output_error(weight: Tensor, quantised: Tensor, moment: Tensor | None) -> float:
    """||(W - Q) X||^2 / ||W X||^2 = tr(D H D^T) / tr(W H W^T), D = W - Q; with no H, ||D||^2 / ||W||^2.

    Args:
        weight, quantised: float32 (rows, columns).
        moment: H as in `LayerStatistics`, or None.
    """
    difference = weight - quantised
    if moment is None:
        above, below = difference.square().sum(), weight.square().sum()
    else:
        above = (product(difference, moment) * difference).sum()
        below = (coarse_product(weight, moment) * weight).sum()  # no difference of large numbers: 8 bits are plenty
    return float(above / below) if float(below) > 0 else float(above)


def relative_error(weight: Tensor, other: Tensor, statistics: LayerStatistics) -> float:
    """||(W - Q) X||^2 / ||W X||^2 from what is known of the inputs: second moments, a sample, or nothing (X = I).

    Args:
        weight, other: float32 (rows, columns).
    """
    if statistics.second_moment is None and statistics.sample is not None:
        below = (statistics.sample @ weight.T).square().sum()
        above = (statistics.sample @ (weight - other).T).square().sum()
        return float(above / below) if float(below) > 0 else float(above)
    return relative_output_error(weight, other, statistics.second_moment)
