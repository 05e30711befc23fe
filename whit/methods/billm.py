"""BiLLM: mostly one-bit weights by residual binarisation of salient columns (Huang et al. 2024, arXiv 2402.04291).

Three variants share one layout (`whit.formats.binary_residual`), two sign planes, a column mark and few scalars:

- "whit": the same representation with fewer scalars and a better fit (`whit.methods.billm_refined`); the default.
- "paper": the method as the paper describes it (`whit.methods.billm_paper`).
- "official": what the released code computes (`whit.methods.billm_official`), stored with its scalars in float16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from whit.errors import ModelError
from whit.formats.base import Packed
from whit.formats.binary_residual import BinaryResidual
from whit.methods.base import Compressed, Method, knob, register_method
from whit.methods.billm_official import official_billm
from whit.methods.billm_paper import paper_billm
from whit.methods.billm_refined import refined_billm
from whit.methods.statistics import LayerStatistics, Statistic, dead_column_notes


@register_method
@dataclass(frozen=True)
class BiLLM(Method):
    """Two sign planes per weight; marked columns use the second for the residual, others for one of two magnitudes."""

    name: ClassVar[str] = "billm"
    summary: ClassVar[str] = "two sign planes with salient columns; variants whit (2.0-2.1 bits), paper (2.5), official"
    needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.SECOND_MOMENT})

    variant: str = knob("whit", "which BiLLM", choices=("whit", "paper", "official"))
    block_size: int | None = knob(
        None, "columns that share scalars, 0 for the whole row; if not given: 0 for whit, else 128", minimum=0
    )
    damping: float | None = knob(
        None, "added to diag(H), relative to its mean; if not given: 0.05 for whit, else 0.01", minimum=0, maximum=1
    )
    passes: int = knob(2, "whit only: turns of least squares and coordinate descent", minimum=0, maximum=100)
    salient_metric: str = knob(
        "hessian", "paper, official: what ranks salient columns", choices=("hessian", "magnitude")
    )
    salient_limit: int = knob(50, "paper, official: salient columns tried per block, plus one", minimum=2)
    compensate: bool = knob(True, "paper, official: later blocks absorb the error of earlier ones")

    def format(self, rows: int, columns: int) -> BinaryResidual:
        """Sign planes and scalars; a block wider than the row becomes the row."""
        size = self.block_size
        if size is None:
            size = 0 if self.variant == "whit" else 128
        return BinaryResidual(size if 0 < size < columns else 0, means=self.variant == "official")

    def compress(self, weight: Tensor, statistics: LayerStatistics) -> Compressed:
        """Binarise one weight; needs `statistics.second_moment`.

        Raises:
            ModelError: a scalar overflows float16.
        """
        packed, notes = self._refined(weight, statistics) if self.variant == "whit" else self._block(weight, statistics)
        if not bool(torch.isfinite(packed.tensors["scalars"]).all()):
            raise ModelError(
                f"a weight of magnitude {float(weight.abs().max()):.3g} needs a scale beyond float16; rescale the model"
            )
        return Compressed(packed, notes)

    def _damping(self) -> float:
        if self.damping is not None:
            return self.damping
        return 0.05 if self.variant == "whit" else 0.01

    def _refined(self, weight: Tensor, statistics: LayerStatistics) -> tuple[Packed, tuple[str, ...]]:
        layout = self.format(*weight.shape)
        moment = statistics.second_moment
        if moment is None:
            raise ValueError("second moments were not gathered")
        order = statistics.descending_order()
        factor = statistics.inverse_factor(self._damping(), order)
        damped = moment.float().clone()
        diagonal = torch.diagonal(damped)
        diagonal[factor.dead] = 1
        diagonal += factor.damping * float(diagonal.mean())
        result = refined_billm(weight, damped, factor.upper, order, block_size=layout.block_size, passes=self.passes)
        return layout.pack(result.signs, result.second, result.salient, result.scalars), factor.notes

    def _block(self, weight: Tensor, statistics: LayerStatistics) -> tuple[Packed, tuple[str, ...]]:
        layout = self.format(*weight.shape)
        factor = statistics.inverse_factor(self._damping())
        alive = weight.masked_fill(factor.dead, 0)
        notes = (*factor.notes, *dead_column_notes(statistics))
        size = layout.block_size or weight.shape[1]
        if self.variant == "paper":
            paper = paper_billm(
                alive,
                factor.upper,
                block_size=size,
                salient_metric=self.salient_metric,
                limit=self.salient_limit,
                compensate=self.compensate,
            )
            return layout.pack(paper.signs, paper.second, paper.salient, paper.scalars), notes
        found = official_billm(
            alive,
            factor.upper,
            block_size=size,
            salient_metric=self.salient_metric,
            limit=self.salient_limit,
            compensate=self.compensate,
        )
        second = torch.where(found.salient, found.second, found.sparse)
        return layout.pack(found.first, second, found.salient, found.scalars), notes
