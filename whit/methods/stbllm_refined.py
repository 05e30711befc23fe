"""STBLLM's representation, fitted with its mask kept: three magnitudes per row, marked columns with two sign planes.

As in `whit.methods.billm_refined`, a column's mark chooses between two codebooks of its row: three symmetric magnitudes
on ordinary columns, a1 - a2 and a1 + a2 on marked ones. (With two magnitudes and nothing pruned it is that very
method.) The mask is fixed beforehand and never touched:

1. Marks and codebooks minimise sum over kept weights of (w - q)^2 / U_jj^2 by turns (`whit.methods.three_magnitudes`,
   `two_magnitudes`).
2. Columns are rounded in descending order of diag(H). A pruned weight becomes zero whatever feedback has made of it,
   and that error moves on to later columns like any other; so the kept weights make up for the pruned ones.
3. By turns, all scalars of a row are refitted by least squares under the full H, and the code of every kept weight is
   chosen anew given all others. Apart from the rounding of scalars to float16, no step can raise tr(D H D^T).

Internally everything is transposed and in rounding order: a column of the weight is one contiguous row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from whit.methods.descent import BlockFactors, descend_columns, least_squares_step
from whit.methods.feedback import column_importance, round_with_feedback
from whit.methods.rounders import LevelRounder
from whit.methods.three_magnitudes import three_magnitudes
from whit.methods.two_codebooks import INITIAL_SHARE, MARK_ROUNDS, SAMPLED_ROWS, two_magnitudes

MARKED = 2
MOST = 3


@dataclass(frozen=True)
class StructuredPlanes:
    """Stored form of one weight matrix, ordered as in `whit.formats.structured_binary`.

    Attributes:
        salient: marks, bool (columns,).
        signs: bool (rows, columns).
        regions: int64 (rows, columns), 0 to 2; on marked columns the second sign, 0 or 1.
        scalars: (rows, blocks, k), k and their order as in the format.
    """

    salient: Tensor
    signs: Tensor
    regions: Tensor
    scalars: Tensor


@dataclass(frozen=True)
class Magnitudes:
    """Ascending magnitudes of 2 * blocks codebooks, number 2 * block + mark, as float16 scalars express them.

    Attributes:
        levels: float32 (codebooks, 3, rows). An ordinary codebook uses the first `regions`, a marked one the first two.
        regions: 1, 2 or 3.
    """

    levels: Tensor
    regions: int

    def scalars(self) -> Tensor:
        """The scalars of `StructuredBinary` without means: float32 (rows, blocks, 1, 4 or 5)."""
        ordinary = self.levels[0::2, : self.regions]
        if self.regions > 1:
            ordinary = torch.cat([ordinary, torch.stack(_scales(self.levels[1::2]), 1)], 1)
        return ordinary.permute(2, 0, 1)


def storable(levels: Tensor, regions: int) -> Magnitudes:
    """Round levels (codebooks, 3, rows) to what float16 scalars can express."""
    stored = levels.half().float()
    scale_1, scale_2 = _scales(levels[1::2])
    stored[1::2] = torch.stack([scale_1 - scale_2, scale_1 + scale_2, scale_1 + scale_2], 1)
    return Magnitudes(stored, regions)


def _scales(marked: Tensor) -> tuple[Tensor, Tensor]:
    low, high = marked[:, 0], marked[:, 1]
    return ((high + low) / 2).half().float(), ((high - low) / 2).half().float()


def fit_block(weight: Tensor, kept: Tensor, importance: Tensor, marks: Tensor, regions: int, tied: bool) -> Tensor:
    """Both codebooks of a block for given marks, over its kept weights: (2, 3, rows).

    Args:
        weight: float32 (rows, columns).
        kept: bool (rows, columns).
        importance: 1/U_jj^2, (columns,).
        marks: bool (columns,).
        regions: magnitudes on ordinary columns, 1 to 3.
        tied: see `three_magnitudes`.
    """
    magnitude, index = weight.abs().sort(1)
    mass = importance[index] * kept.gather(1, index)
    marked = marks[index]
    low, high = two_magnitudes(magnitude, mass * marked)
    return torch.stack([_ordinary(magnitude, mass * ~marked, regions, tied), torch.stack([low, high, high])])


def _ordinary(magnitude: Tensor, mass: Tensor, regions: int, tied: bool) -> Tensor:
    """The best `regions` magnitudes for sorted magnitudes (rows, k) of mass (rows, k), the last repeated: (3, rows)."""
    if regions == MOST:
        return three_magnitudes(magnitude, mass, tied=tied).T
    if regions == 1:
        mean = (magnitude * mass).sum(1) / mass.sum(1).clamp(min=1e-30)
        return mean.expand(MOST, -1)
    low, high = two_magnitudes(magnitude, mass)
    return torch.stack([low, high, high])


def choose_marks(weight: Tensor, kept: Tensor, importance: Tensor, regions: int, tied: bool) -> Tensor:
    """Which codebook each column of a block uses, by turns of fitting codebooks and moving columns: bool (columns,).

    Starts from the tenth of the columns that matter most. Wide weights are judged by an even sample of their rows. With
    a single magnitude no column is marked.
    """
    if regions == 1:
        return torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device)
    stride = -(-weight.shape[0] // SAMPLED_ROWS)
    weight, kept = weight[::stride], kept[::stride]
    magnitude = weight.abs().unsqueeze(0)
    marks = torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device)
    marks[torch.topk(importance, max(1, round(INITIAL_SHARE * weight.shape[1]))).indices] = True
    for _ in range(MARK_ROUNDS):
        levels = fit_block(weight, kept, importance, marks, regions, tied)
        distance = (magnitude - levels.unsqueeze(3)[:, 0]).abs()
        for level in (1, 2):
            distance = torch.minimum(distance, (magnitude - levels.unsqueeze(3)[:, level]).abs())
        errors = (distance.square() * kept).sum(1)
        marks = errors[1] < errors[0]
    return marks


def _rounder(magnitudes: Magnitudes, book: Tensor, kept: Tensor) -> LevelRounder:
    """Nearest of each column's signed magnitudes, zero where not kept.

    Every table has six levels; where there are fewer magnitudes, the largest stands in for those that lack. Which of
    two equal levels is found does not matter: both have one code (`_codes`).
    """
    counts = torch.tensor([magnitudes.regions, MARKED], device=kept.device).repeat(len(magnitudes.levels) // 2)
    places = torch.arange(MOST, device=kept.device).minimum((counts - 1).unsqueeze(1))
    levels = magnitudes.levels.gather(1, places.unsqueeze(2).expand_as(magnitudes.levels))
    return LevelRounder(torch.cat([-levels.flip(1), levels], 1), book.to(torch.int32), kept)


def _codes(found: Tensor, regions: int, book: Tensor) -> Tensor:
    """Codes, bit 0 = positive and the rest the magnitude, of indices into the levels of `_rounder`: uint8."""
    largest = torch.where(book % 2 == 1, MARKED - 1, regions - 1).to(torch.uint8).unsqueeze(1)
    positive = found >= MOST
    magnitude = torch.where(positive, found - MOST, MOST - 1 - found).minimum(largest)
    return 2 * magnitude + positive


def _decode(codes: Tensor, levels: Tensor, book: Tensor, kept: Tensor) -> Tensor:
    """Values (columns, rows) of codes uint8 (columns, rows)."""
    magnitude = levels[book].gather(1, (codes // 2).long().unsqueeze(1)).squeeze(1)
    return torch.where(codes % 2 == 1, magnitude, -magnitude) * kept


def refit(
    codes: Tensor,
    values: Tensor,
    gradient: Tensor,
    moment: Tensor,
    magnitudes: Magnitudes,
    book: Tensor,
    kept: Tensor,
    factors: BlockFactors | None = None,
) -> Magnitudes:
    """Least squares of the five magnitudes of each block of a row under the full H, codes fixed.

    With one or two regions there are fewer. A row whose solution is not ascending and non-negative keeps its scalars.
    Arguments as in `whit.methods.billm_refined.refit`, and kept (columns, rows); `values` and `gradient` are updated in
    place, the new magnitudes returned.
    """
    factors = factors or BlockFactors(moment, book)
    levels, regions = magnitudes.levels.clone(), magnitudes.regions
    counts = [regions] if regions == 1 else [regions, MARKED]
    for block in range(len(levels) // 2):
        columns = factors.columns(block)
        code, mask, marked = codes[columns], kept[columns], (book[columns] % 2 == 1).unsqueeze(1)
        sign = ((code % 2).float() * 2 - 1) * mask
        patterns = [
            sign * (code // 2 == level) * (marked == mark)
            for mark, count in enumerate(counts)
            for level in range(count)
        ]
        step = least_squares_step(patterns, gradient[columns], factors.of(block))
        old = [levels[2 * block + mark, :count] for mark, count in enumerate(counts)]
        new = [level + part for level, part in zip(old, torch.split(step.T, counts), strict=True)]
        sound = torch.stack([(part >= 0).all(0) & (part.diff(dim=0) >= 0).all(0) for part in new]).all(0)
        both = levels[2 * block : 2 * block + 2].clone()
        for mark, (before, after) in enumerate(zip(old, new, strict=True)):
            both[mark, : len(after)] = torch.where(sound, after, before)
            both[mark, len(after) :] = both[mark, len(after) - 1]
        levels[2 * block : 2 * block + 2] = storable(both, regions).levels
        updated = _decode(code, levels, book[columns], mask)
        factors.subtract(gradient, block, updated - values[columns])
        values[columns] = updated
    return Magnitudes(levels, regions)


def refined_stbllm(
    weight: Tensor,
    kept: Tensor,
    moment: Tensor,
    upper: Tensor,
    order: Tensor,
    *,
    block_size: int = 0,
    regions: int = MOST,
    tied: bool = False,
    passes: int = 2,
) -> StructuredPlanes:
    """Fit STBLLM's representation to the kept weights as described at the top of this file.

    Args:
        weight: float32 (rows, columns). Not modified.
        kept: bool (rows, columns).
        moment: damped H, float32 (columns, columns), positive definite, its columns taken in `order`.
        upper: U with H^-1 = U^T U for the columns taken in `order`.
        order: permutation (columns,) in which columns are rounded.
        block_size: columns that share scalars; 0 for the whole row.
        regions: magnitudes on ordinary columns, 1 to 3; with 1 there are no marks.
        tied: tie the upper limit between three regions to twice the lower one when magnitudes are fitted.
        passes: turns of refitting scalars and choosing codes anew.
    """
    columns = weight.shape[1]
    size = block_size or columns
    importance = column_importance(upper, order)
    importance /= importance.mean()
    salient = torch.zeros(columns, dtype=torch.bool, device=weight.device)
    fitted = []
    for start in range(0, columns, size):
        part = slice(start, start + size)
        salient[part] = choose_marks(weight[:, part], kept[:, part], importance[part], regions, tied)
        fitted.append(fit_block(weight[:, part], kept[:, part], importance[part], salient[part], regions, tied))
    magnitudes = storable(torch.cat(fitted), regions)
    book = (2 * (torch.arange(columns, device=weight.device) // size) + salient)[order]

    target, mask = weight.T[order].contiguous(), kept.T[order].contiguous()
    rounder = _rounder(magnitudes, book, mask)
    codes = _codes(round_with_feedback(target.T, upper, 0, lambda first, values: rounder).codes.T, regions, book)
    if passes:
        values = _decode(codes, magnitudes.levels, book, mask)
        factors, gradient = BlockFactors(moment, book), torch.zeros_like(values)
        factors.whole.subtract(gradient, values - target)
        for _ in range(passes):
            magnitudes = refit(codes, values, gradient, moment, magnitudes, book, mask, factors)
            descend_columns(codes, values, gradient, moment, _rounder(magnitudes, book, mask), factors.whole)
            codes = _codes(codes, regions, book)
        magnitudes = refit(codes, values, gradient, moment, magnitudes, book, mask, factors)

    natural = torch.empty_like(codes)
    natural[order] = codes
    signs: Tensor = natural.T % 2 == 1
    levels = natural.T.long() // 2
    # On marked columns the planes are two signs: q = s1 (a1 + a2) at the upper level, s1 (a1 - a2) at the lower one.
    second = torch.where(salient, (signs == (levels == 1)).long(), levels)
    return StructuredPlanes(salient, signs, second, magnitudes.scalars())
