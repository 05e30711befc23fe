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

from whit.kernels.signs import ColumnsAt, decode_signs, pattern_rows, signed_sums, signed_sums_at
from whit.kernels.split_product import SplitFactor
from whit.methods.billm_planes import BinaryPlanes
from whit.methods.descent import BlockFactors, descend_columns, solve_least_squares
from whit.methods.feedback import column_importance, round_with_feedback
from whit.methods.rounders import LevelRounder
from whit.methods.two_codebooks import choose_marks, fit_codebooks


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
    chosen = [ColumnsAt(codes, place) for place in places]
    pattern = pattern_rows(codes)
    marked = pattern[places[1]]
    for mark in (0, 1):
        here = slice(2 * mark, 2 * mark + 2)
        right[:, here] = signed_sums_at(gradient.unsqueeze(1), chosen[mark])[0].T
    product = factors.of(block).times(pattern.index_fill_(0, places[1], 0)).view(-1, 2, rows)
    for mark in (0, 1):
        there = slice(2 * mark, 2 * mark + 2)
        sums = signed_sums_at(product, chosen[mark])  # (2 of unmarked, 2 of this mark, rows)
        normal[:, :2, there] = sums.permute(2, 0, 1)
        normal[:, there, :2] = sums.permute(2, 1, 0)
    if len(marked):
        product = factors.of(block, 1).times(marked).view(-1, 2, rows)
        normal[:, 2:, 2:] = signed_sums(product, chosen[1].own).permute(2, 0, 1)
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
