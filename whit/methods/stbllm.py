"""STBLLM: N:M sparse binary weights (Dong et al. 2024, "STBLLM", ICLR 2025, arXiv 2408.01803).

Of every M neighbouring columns N weights are KEPT, by their relative importance; a kept weight is a sign times one of
three magnitudes, and salient columns have a second sign plane instead. Two variants:

- "whit": the mask stays as it is, and is what makes the result small (`whit.methods.stbllm_refined`); the default.
- "released": what the released code computes (`whit.methods.stbllm_released`). Its mask does not survive: pruned
  weights come back, so it is stored densely, whatever N:M says.

Nominal widths of the paper ("0.55 bits" for 4:8) leave out the index, the regions and the scalars. 4:8 cannot be stored
under one bit: index and signs alone are log2 C(8, 4) / 8 + 1/2 = 1.27.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from whit.errors import KnobError, ModelError
from whit.finite import all_finite
from whit.formats.structured_binary import StructuredBinary
from whit.methods.allocation import outlier_share
from whit.methods.base import Compressed, Method, SurveyedBlock, knob, register_method
from whit.methods.masks import keep_in_groups
from whit.methods.statistics import LayerStatistics, Statistic, dead_column_notes
from whit.methods.stbllm_allocation import OUTLIER_MULTIPLE, paper_kept, released_kept, repaired_kept
from whit.methods.stbllm_refined import StructuredPlanes, refined_stbllm
from whit.methods.stbllm_released import released_stbllm
from whit.methods.stbllm_scores import SCORES, importance

_WHIT_KNOBS = ("regions", "trisection", "passes")


@register_method
@dataclass(frozen=True)
class STBLLM(Method):
    """N of every M weights kept, each a sign and one of three magnitudes; marked columns have two sign planes."""

    name: ClassVar[str] = "stbllm"
    summary: ClassVar[str] = "N:M sparse binary weights with three magnitudes; variants whit, released"
    needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.SECOND_MOMENT})

    variant: str = knob("whit", "which STBLLM", choices=("whit", "released"))
    pattern: str = knob(
        "4:8", "N:M, N weights KEPT of every M neighbouring columns (the released scripts count the pruned ones)"
    )
    score: str = knob("ria", "what ranks the weights", choices=SCORES)
    activation_power: float = knob(0.5, "score ria only: exponent of the input norm", minimum=0, maximum=4)
    allocation: str = knob(
        "uniform",
        "how blocks share the budget: alike; by outliers, as released (over budget) or repaired; by norm, as the paper",
        choices=("uniform", "repaired", "released", "paper"),
    )
    block_size: int | None = knob(
        None, "columns that share scalars, 0 for the whole row; if not given: 0 for whit, else 128", minimum=0
    )
    damping: float | None = knob(
        None, "added to diag(H), relative to its mean; if not given: 0.05 for whit, else 0.01", minimum=0, maximum=1
    )
    regions: int | None = knob(
        None, "whit only: magnitudes of kept weights, 1 with no salient columns; if not given: 3", choices=(1, 2, 3)
    )
    trisection: str | None = knob(
        None,
        "whit only: limits of the three regions, the upper twice the lower or free; if not given: free",
        choices=("free", "tied"),
    )
    passes: int | None = knob(
        None, "whit only: turns of least squares and coordinate descent; if not given: 2", minimum=0, maximum=100
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_kept(self.pattern)
        given = [name for name in _WHIT_KNOBS if getattr(self, name) is not None]
        if self.variant == "released" and given:
            raise KnobError(
                f"knob {given[0]!r} of method {self.name!r} does nothing with variant 'released': leave it out, or "
                "choose variant whit"
            )

    @property
    def kept(self) -> tuple[int, int]:
        """(N, M): N weights kept of every M columns."""
        return parse_kept(self.pattern)

    def format(self, rows: int, columns: int) -> StructuredBinary:
        """Index, sign plane, regions and scalars; dense for the released variant.

        Raises:
            KnobError: the columns are not divisible into groups of M.
        """
        n, m = self.kept
        if columns % m:
            raise KnobError(
                f"a {rows} x {columns} weight cannot be pruned {self.pattern}, its columns are not divisible by {m}: "
                f"leave the layer out (--skip, or 'exclude' in a recipe), or choose another pattern"
            )
        released = self.variant == "released"
        size = self.block_size if self.block_size is not None else (128 if released else 0)
        size = size if 0 < size < columns else 0
        return StructuredBinary(1, 1, size, means=True) if released else StructuredBinary(n, m, size, self.regions or 3)

    def compress(self, weight: Tensor, statistics: LayerStatistics) -> Compressed:
        """Prune and binarise one weight; needs `statistics.second_moment`.

        Raises:
            ModelError: a scalar overflows float16.
        """
        layout = self.format(*weight.shape)
        scores = importance(self.score, weight, statistics.input_square_sums(), self.activation_power)
        kept = keep_in_groups(scores, *self.kept)
        planes, notes = (self._refined if self.variant == "whit" else self._released)(weight, kept, statistics)
        stored = kept if self.variant == "whit" else torch.ones_like(kept)
        packed = layout.pack(stored, planes.signs, planes.regions, planes.salient, planes.scalars)
        if not all_finite(packed.tensors["scalars"]):
            raise ModelError(
                f"a weight of magnitude {float(weight.abs().max()):.3g} needs a scale beyond float16; rescale the model"
            )
        return Compressed(packed, notes)

    def survey_required(self) -> frozenset[Statistic]:
        """The inputs' norms, if blocks differ."""
        return frozenset() if self.allocation == "uniform" else frozenset({Statistic.SQUARE_SUMS})

    def survey(self, weights: Sequence[Tensor], statistics: Sequence[LayerStatistics]) -> float:
        """L2 norm of a block's weights for the paper's rule, else the share of scores beyond six times their mean."""
        if self.allocation == "paper":
            return math.sqrt(sum(float(weight.double().square().sum()) for weight in weights))
        pairs = zip(weights, statistics, strict=True)
        scores = [importance(self.score, w, s.input_square_sums(), self.activation_power) for w, s in pairs]
        return outlier_share(scores, OUTLIER_MULTIPLE)

    def allocate(self, blocks: Sequence[SurveyedBlock]) -> list[Self]:
        """One method per block. Only "repaired" and "uniform" keep no more weights than the pattern says."""
        if self.allocation == "uniform" or not blocks:
            return [self for _ in blocks]
        n, m = self.kept
        found = [block.score for block in blocks]
        if self.allocation == "repaired":
            counts = repaired_kept(found, [block.parameters for block in blocks], n, m)
        else:
            counts = (released_kept if self.allocation == "released" else paper_kept)(found, n, m)
        return [dataclasses.replace(self, pattern=f"{count}:{m}", allocation="uniform") for count in counts]

    def _refined(
        self, weight: Tensor, kept: Tensor, statistics: LayerStatistics
    ) -> tuple[StructuredPlanes, tuple[str, ...]]:
        order = statistics.descending_order()
        factor = statistics.inverse_factor(0.05 if self.damping is None else self.damping, order)
        planes = refined_stbllm(
            weight,
            kept,
            statistics.damped(factor, order),
            factor.upper,
            order,
            block_size=self.format(*weight.shape).block_size,
            regions=self.regions or 3,
            tied=self.trisection == "tied",
            passes=2 if self.passes is None else self.passes,
        )
        return planes, factor.notes

    def _released(
        self, weight: Tensor, kept: Tensor, statistics: LayerStatistics
    ) -> tuple[StructuredPlanes, tuple[str, ...]]:
        factor = statistics.inverse_factor(0.01 if self.damping is None else self.damping)
        pruned = weight.masked_fill(~kept | factor.dead, 0)
        size = self.format(*weight.shape).block_size or weight.shape[1]
        planes = released_stbllm(pruned, factor.upper, block_size=size)
        lost = "pruned weights come back in the released code: stored densely"
        return planes, (*factor.notes, *dead_column_notes(statistics), lost)


def parse_kept(pattern: str) -> tuple[int, int]:
    """`"4:8"` -> (4, 8): N weights KEPT of every M. N = M prunes nothing.

    Raises:
        KnobError: not of this form, or not 1 <= N <= M.
    """
    found = re.fullmatch(r"(\d+):(\d+)", pattern)
    n, m = map(int, found.groups()) if found else (0, 0)
    if not 1 <= n <= m:
        raise KnobError(
            f"pattern {pattern!r} is not N:M with 1 <= N <= M: N weights KEPT of every M columns, for example 4:8"
        )
    return n, m
