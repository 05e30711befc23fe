"""BiLLM's representation, fitted properly: two symmetric codebooks per row, sequential rounding, joint refinement.

Without means, both kinds of column of BiLLM hold four symmetric values per row: +-c and +-s on ordinary columns,
+-(a1 + a2) and +-(a1 - a2) on salient ones. So a column's mark simply chooses between two codebooks {+-low, +-high},
and the two sign planes are a two-bit code in either. Seen so, every step has a plain optimum:

1. Marks and codebooks minimise sum_ij (w_ij - q_ij)^2 / U_jj^2 by turns: the best codebooks for given marks come from
   prefix sums over sorted magnitudes, which give every split exactly; the best mark of a column is that of the
   codebook with less error. 1/U_jj^2 is what an error in column j costs once later columns have compensated for it.
2. Columns are rounded in descending order of diag(H), each absorbing the errors of those before it (GPTQ's update).
   The codebooks do not depend on the order, so nothing about the order needs to be stored.
3. By turns, all scalars of a row are refitted by least squares under the full H, and every code is chosen anew given
   all others (coordinate descent). No step can raise tr(D H D^T).

Since this leaves the codebooks little to do locally, a whole row shares them by default: 2 + 64/m + 1/n stored bits.

Internally everything is transposed and in rounding order: a column of the weight is one contiguous row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from whit.kernels.cpu.compiling import runs_compiled, shared_out
from whit.kernels.signs import decode_signs, pattern_rows, signed_sums
from whit.kernels.split_product import SplitFactor
from whit.methods.billm_planes import BinaryPlanes
from whit.methods.descent import BlockFactors, descend_columns, solve_least_squares
from whit.methods.feedback import column_importance, round_with_feedback
from whit.methods.rounders import LevelRounder

MARK_ROUNDS = 3
INITIAL_SHARE = 0.1
SAMPLED_ROWS = 1024


@dataclass(frozen=True)
class Codebooks:
    """Magnitudes of 2 * blocks symmetric codebooks, number 2 * block + mark: `low`, `high`, each (codebooks, rows).

    0 <= low <= high, in float32, exactly as the stored float16 scalars give them.
    """

    low: Tensor
    high: Tensor

    def scalars(self) -> Tensor:
        """The scalars of `BinaryResidual` without means, float32 exact in float16: (rows, blocks, 4)."""
        ordinary_low, ordinary_high = self.low[0::2], self.high[0::2]
        scale_1, scale_2 = _scales(self.low[1::2], self.high[1::2])
        return torch.stack([ordinary_low, ordinary_high, scale_1, scale_2], -1).transpose(0, 1)


def storable(low: Tensor, high: Tensor) -> Codebooks:
    """Round magnitudes (codebooks, rows) to what float16 scalars can express: the even ones as they are, the odd ones
    as sum and difference of two scales."""
    stored_low, stored_high = low.half().float(), high.half().float()
    scale_1, scale_2 = _scales(low[1::2], high[1::2])
    stored_low[1::2], stored_high[1::2] = scale_1 - scale_2, scale_1 + scale_2
    return Codebooks(stored_low, stored_high)


def _scales(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    return ((high + low) / 2).half().float(), ((high - low) / 2).half().float()


def two_magnitudes(sorted_magnitude: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """The exact optimum of weighted two-means per row: low, high (rows,).

    Splitting sorted magnitudes a_1 <= ... <= a_k after position t, the weighted squared error is a constant minus
    (sum_{i<=t} m_i a_i)^2 / sum_{i<=t} m_i + (the same for i > t); prefix sums give all t at once.

    Args:
        sorted_magnitude: float32 (rows, k), ascending per row.
        mass: non-negative weights (rows, k); entries of mass zero do not count.
    """
    if runs_compiled(mass) and sorted_magnitude.dtype == mass.dtype == torch.float32:
        return _compiled_two_magnitudes(sorted_magnitude, mass)
    mass_low = mass.cumsum(1)
    sum_low = (mass * sorted_magnitude).cumsum(1)
    mass_high = (mass_low[:, -1:] - mass_low).clamp(min=0)
    sum_high = (sum_low[:, -1:] - sum_low).clamp(min=0)
    tiny = 1e-6 * mass_low[:, -1:].clamp(min=1e-30)
    gain = sum_low.square() / mass_low.clamp(min=tiny) + sum_high.square() / mass_high.clamp(min=tiny)
    split = gain.argmax(1, keepdim=True)
    below, above = mass_low.gather(1, split), mass_high.gather(1, split)
    overall = sum_low[:, -1:] / mass_low[:, -1:].clamp(min=tiny)
    low = torch.where(below > tiny, sum_low.gather(1, split) / below.clamp(min=tiny), overall)
    high = torch.where(above > tiny, sum_high.gather(1, split) / above.clamp(min=tiny), overall)
    return torch.minimum(low, high).squeeze(1), torch.maximum(low, high).squeeze(1)


def _compiled_two_magnitudes(sorted_magnitude: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """The same numbers in one pass over the rows."""
    from whit.kernels.cpu.two_means import ROWS_PER_TILE, split_rows

    low, high = torch.empty(len(mass)), torch.empty(len(mass))
    arrays = [item.contiguous().numpy() for item in (sorted_magnitude, mass)]
    shared_out(
        lambda first, last: split_rows(*arrays, low.numpy(), high.numpy(), first, last), len(mass), ROWS_PER_TILE
    )
    return low, high


def choose_marks(weight: Tensor, importance: Tensor, rounds: int = MARK_ROUNDS) -> Tensor:
    """Which of two codebooks each column of a block uses, by turns of fitting codebooks and moving columns.

    Starts from the tenth of the columns that matter most. Wide weights are judged by an even sample of their rows.

    Args:
        weight: float32 (rows, columns).
        importance: 1/U_jj^2, (columns,).
        rounds: turns.

    Returns:
        bool (columns,).
    """
    stride = -(-weight.shape[0] // SAMPLED_ROWS)
    magnitude = weight[::stride].abs()
    marks = torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device)
    marks[torch.topk(importance, max(1, round(INITIAL_SHARE * weight.shape[1]))).indices] = True
    ordered, index = magnitude.sort(1)
    mass = importance[index]
    for _ in range(rounds):
        marked = marks[index]
        errors = []
        for mask in (~marked, marked):
            low, high = two_magnitudes(ordered, mass * mask)
            errors.append(((magnitude - _nearest(magnitude, low[:, None], high[:, None])) ** 2).sum(0))
        marks = errors[1] < errors[0]
    return marks


def fit_codebooks(weight: Tensor, importance: Tensor, marks: Tensor) -> tuple[Tensor, Tensor]:
    """Both codebooks of a block for given marks: low, high (2, rows)."""
    pairs = []
    for mask in (~marks, marks):
        magnitude, index = weight[:, mask].abs().sort(1)
        if magnitude.shape[1]:
            pairs.append(two_magnitudes(magnitude, importance[mask][index]))
        else:
            pairs.append((torch.zeros_like(weight[:, 0]), torch.zeros_like(weight[:, 0])))
    return torch.stack([pair[0] for pair in pairs]), torch.stack([pair[1] for pair in pairs])


def _nearest(magnitude: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.where(magnitude > (low + high) / 2, high, low)


def _decode(codes: Tensor, books: Codebooks, book: Tensor) -> Tensor:
    """Values (columns, rows) of codes uint8 (columns, rows), bit 0 = positive, bit 1 = high; `book` (columns,)."""
    return decode_signs(codes, books.low, books.high, book)


def _levels(books: Codebooks) -> Tensor:
    """Each codebook's four values in ascending order: float32 (codebooks, 4, rows)."""
    return torch.stack([-books.high, -books.low, books.low, books.high], 1)


def _code_of_level(levels: Tensor) -> Tensor:
    """Codes (bit 0 = positive, bit 1 = high) of indices into `_levels`, uint8."""
    table = torch.tensor([2, 0, 1, 3], dtype=torch.uint8, device=levels.device)
    return table.index_select(0, levels.flatten().int()).view(levels.shape)  # indexing takes six times as long


def round_columns(weight: Tensor, upper: Tensor, books: Codebooks, book: Tensor) -> Tensor:
    """Round columns in turn with error feedback; codes uint8 (columns, rows). `weight` (columns, rows), in order."""
    rounder = LevelRounder(_levels(books), book.to(torch.int32))
    return _code_of_level(round_with_feedback(weight.T, upper, 0, lambda first, values: rounder).codes.T)


def descend(
    codes: Tensor,
    values: Tensor,
    gradient: Tensor,
    moment: Tensor,
    books: Codebooks,
    book: Tensor,
    factor: SplitFactor | None = None,
) -> None:
    """One pass of coordinate descent over all columns, in place (`whit.methods.descent`).

    Args:
        codes: uint8 (columns, rows).
        values: float32 (columns, rows), what the codes stand for.
        gradient: H (w - q), float32 (columns, rows).
        moment: H, float32 (columns, columns), positive diagonal.
        books: codebooks.
        book: codebook of each column, (columns,).
        factor: of `moment`, if it was prepared before.
    """
    levels = torch.empty_like(codes)
    descend_columns(levels, values, gradient, moment, LevelRounder(_levels(books), book.to(torch.int32)), factor)
    codes.copy_(_code_of_level(levels))


def refit(
    codes: Tensor,
    values: Tensor,
    gradient: Tensor,
    moment: Tensor,
    books: Codebooks,
    book: Tensor,
    factors: BlockFactors | None = None,
    last: bool = False,
) -> Codebooks:
    """Least squares of the four magnitudes of each block of a row under the full H, codes fixed.

    With sign patterns B (columns, 4), q = B a: the change of a that minimises d^T H d solves (B^T H B) x = B^T H d.
    When one block spans the row this is the joint optimum of all its scalars; else blocks take turns. A row whose
    solution is not 0 <= low <= high keeps its scalars. Arguments as in `descend`; values and
    gradient are updated in place, the new codebooks returned. `factors` is H prepared; the `last` call may leave values
    and gradient as they are, if one block spans the row.
    """
    factors = factors or BlockFactors(moment, book)
    low, high = books.low.clone(), books.high.clone()
    for block in range(len(low) // 2):
        columns = factors.columns(block)
        whole = len(columns) == len(book)  # the usual case: one block, and nothing to pick out
        mine = (codes, gradient) if whole else (codes[columns], gradient[columns])
        step = solve_least_squares(*_normal_equations(*mine, factors, block))
        old = torch.stack([low[2 * block], high[2 * block], low[2 * block + 1], high[2 * block + 1]], 1)
        new = old + step
        sound = ((new[:, 0::2] >= 0) & (new[:, 1::2] >= new[:, 0::2])).all(1, keepdim=True)
        new = torch.where(sound, new, old)
        rounded = storable(new[:, 0::2].T, new[:, 1::2].T)
        low[2 * block : 2 * block + 2], high[2 * block : 2 * block + 2] = rounded.low, rounded.high
        if whole:
            if last:
                break
            updated = _decode(codes, Codebooks(low, high), book)
            factors.whole.subtract(gradient, values.neg_().add_(updated))
            values.copy_(updated)
            continue
        updated = _decode(codes[columns], Codebooks(low, high), book[columns])
        factors.subtract(gradient, block, updated - values[columns])
        values[columns] = updated
    return Codebooks(low, high)


def _normal_equations(codes: Tensor, gradient: Tensor, factors: BlockFactors, block: int) -> tuple[Tensor, Tensor]:
    """B^T H B (rows, 4, 4) and B^T H d (rows, 4) of a block; codes and gradient (columns, rows) are the block's own.

    A sign pattern is zero on the columns of the other mark: H is multiplied by those of the unmarked columns, and the
    few marked columns among themselves.
    """
    rows = codes.shape[1]
    normal, right = codes.new_zeros(rows, 4, 4, dtype=torch.float32), codes.new_zeros(rows, 4, dtype=torch.float32)
    inside = factors.columns(block)
    places = [torch.searchsorted(inside, factors.columns(block, mark)) for mark in (0, 1)]
    chosen = [codes[place] for place in places]
    pattern = pattern_rows(codes)
    marked = pattern[places[1]]
    for mark in (0, 1):
        here = slice(2 * mark, 2 * mark + 2)
        right[:, here] = signed_sums(gradient[places[mark]].unsqueeze(1), chosen[mark])[0].T
    product = factors.of(block).times(pattern.index_fill_(0, places[1], 0)).view(-1, 2, rows)
    for mark in (0, 1):
        there = slice(2 * mark, 2 * mark + 2)
        sums = signed_sums(product[places[mark]], chosen[mark])  # (2 of unmarked, 2 of this mark, rows)
        normal[:, :2, there] = sums.permute(2, 0, 1)
        normal[:, there, :2] = sums.permute(2, 1, 0)
    if len(marked):
        product = factors.of(block, 1).times(marked).view(-1, 2, rows)
        normal[:, 2:, 2:] = signed_sums(product, chosen[1]).permute(2, 0, 1)
    return normal, right


def refined_billm(
    weight: Tensor,
    moment: Tensor,
    upper: Tensor,
    order: Tensor,
    *,
    block_size: int = 0,
    passes: int = 2,
) -> BinaryPlanes:
    """Fit BiLLM's representation as described at the top of this file.

    Args:
        weight: float32 (rows, columns). Not modified.
        moment: damped H, float32 (columns, columns), positive definite, its columns taken in `order`.
        upper: U with H^-1 = U^T U for the columns taken in `order`.
        order: permutation (columns,) in which columns are rounded.
        block_size: columns that share scalars; 0 for the whole row.
        passes: turns of refitting scalars and choosing codes anew.
    """
    columns = weight.shape[1]
    size = block_size or columns
    importance = column_importance(upper, order)
    importance /= importance.mean()
    salient = torch.zeros(columns, dtype=torch.bool, device=weight.device)
    lows, highs = [], []
    for start in range(0, columns, size):
        part, weights = weight[:, start : start + size], importance[start : start + size]
        salient[start : start + size] = choose_marks(part, weights)
        low, high = fit_codebooks(part, weights, salient[start : start + size])
        lows.append(low)
        highs.append(high)
    books = storable(torch.cat(lows), torch.cat(highs))
    book = (2 * (torch.arange(columns, device=weight.device) // size) + salient)[order]

    target = weight.T[order].contiguous()
    codes = round_columns(target, upper, books, book).contiguous()
    if passes:
        values, factors = _decode(codes, books, book), BlockFactors(moment, book)
        gradient = torch.zeros_like(values)
        factors.whole.subtract(gradient, values - target)
        for _ in range(passes):
            books = refit(codes, values, gradient, moment, books, book, factors)
            descend(codes, values, gradient, moment, books, book, factors.whole)
        books = refit(codes, values, gradient, moment, books, book, factors, last=True)

    natural = torch.empty_like(codes)
    natural[order] = codes
    natural = natural.T
    signs, large = natural % 2 == 1, natural > 1
    # On salient columns the planes are two signs: q = s1 (a1 + a2) when large, s1 (a1 - a2) when not.
    second = torch.where(salient, signs == large, large)
    return BinaryPlanes(salient, signs, second, books.scalars())
