"""BiLLM: mostly one-bit weights by residual binarisation of salient columns (Huang et al. 2024, arXiv 2402.04291).

Three variants share one layout (`whit.formats.binary_residual`), two sign planes, a column mark and few scalars:

- "whit": the same representation with fewer scalars and a better fit (`whit.methods.billm_refined`); the default.
- "paper": the method as the paper describes it (`whit.methods.billm_paper`).
- "official": what the released code computes (`whit.methods.billm_official`), stored with its scalars in float16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from whit.errors import KnobError, ModelError
from whit.finite import all_finite
from whit.formats.base import Packed
from whit.formats.binary_residual import BinaryResidual
from whit.methods.base import Compressed, Method, knob, register_method
from whit.methods.billm_official import official_billm
from whit.methods.billm_paper import paper_billm
from whit.methods.billm_refined import refined_billm
from whit.methods.statistics import LayerStatistics, Statistic, dead_column_notes

# Knobs that only the variants searching block by block have, and those that only the refined one has.
_BLOCK_KNOBS = ("salient_metric", "salient_limit", "compensate")
_REFINED_KNOBS = ("passes",)


@register_method
@dataclass(frozen=True)
class BiLLM(Method):
    """Two sign planes per weight; marked columns use the second for the residual, others for one of two magnitudes."""

    name: ClassVar[str] = "billm"
    summary: ClassVar[str] = "two sign planes with salient columns; variants whit, paper, official"
    needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.SECOND_MOMENT})

    variant: str = knob("whit", "which BiLLM", choices=("whit", "paper", "official"))
    block_size: int | None = knob(
        None, "columns that share scalars, 0 for the whole row; if not given: 0 for whit, else 128", minimum=0
    )
    damping: float | None = knob(
        None, "added to diag(H), relative to its mean; if not given: 0.05 for whit, else 0.01", minimum=0, maximum=1
    )
    passes: int | None = knob(
        None, "whit only: turns of least squares and coordinate descent; if not given: 2", minimum=0, maximum=100
    )
    salient_metric: str | None = knob(
        None, "paper, official: what ranks salient columns; if not given: hessian", choices=("hessian", "magnitude")
    )
    salient_limit: int | None = knob(
        None, "paper, official: salient columns tried per block, plus one; if not given: 50", minimum=2
    )
    compensate: bool | None = knob(
        None, "paper, official: later blocks absorb the error of earlier ones; if not given: yes"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        foreign = _BLOCK_KNOBS if self.variant == "whit" else _REFINED_KNOBS
        given = [name for name in foreign if getattr(self, name) is not None]
        if given:
            raise KnobError(
                f"knob {given[0]!r} of method {self.name!r} does nothing with variant {self.variant!r}: leave it out, "
                f"or choose another variant"
            )

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
        if not all_finite(packed.tensors["scalars"]):
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
        order = statistics.descending_order()
        factor = statistics.inverse_factor(self._damping(), order)
        moment = statistics.damped(factor, order)
        passes = 2 if self.passes is None else self.passes
        result = refined_billm(weight, moment, factor.upper, order, block_size=layout.block_size, passes=passes)
        return layout.pack(result.signs, result.second, result.salient, result.scalars), factor.notes

    def _block(self, weight: Tensor, statistics: LayerStatistics) -> tuple[Packed, tuple[str, ...]]:
        layout = self.format(*weight.shape)
        factor = statistics.inverse_factor(self._damping())
        alive = weight.masked_fill(factor.dead, 0)
        notes = (*factor.notes, *dead_column_notes(statistics))
        options: dict[str, Any] = {
            "block_size": layout.block_size or weight.shape[1],
            "salient_metric": self.salient_metric or "hessian",
            "limit": self.salient_limit or 50,
            "compensate": self.compensate is not False,
        }
        if self.variant == "paper":
            paper = paper_billm(alive, factor.upper, **options)
            return layout.pack(paper.signs, paper.second, paper.salient, paper.scalars), notes
        found = official_billm(alive, factor.upper, **options)
        second = torch.where(found.salient, found.second, found.sparse)
        return layout.pack(found.first, second, found.salient, found.scalars), notes
