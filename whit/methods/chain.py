"""Prune, then quantise what was kept: two methods as one, stored as an index and quantised values.

The value is built by recipes and in Python, `PruneThenQuantise(Wanda(pattern="2:4"), GPTQ(bits=4))`; it has no name on
the command line, because its knobs are those of two methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from torch import Tensor

from whit.errors import KnobError
from whit.formats.sparse_bitmask import SparseBitmask
from whit.formats.sparse_nm import SparseNM
from whit.methods.base import Compressed, Method, SurveyedBlock, register_composite
from whit.methods.pruning import Pruner
from whit.methods.statistics import LayerStatistics, Statistic, relative_error


@register_composite
@dataclass(frozen=True)
class PruneThenQuantise(Method):
    """A pruning method, then a method that compresses only the kept weights (`follows_pruning`)."""

    name: ClassVar[str] = "prune-then-quantise"
    summary: ClassVar[str] = "a pruning method, then a quantiser for the weights it kept"

    pruner: Pruner
    quantiser: Method

    def __post_init__(self) -> None:
        super().__post_init__()
        self.quantiser.check_follows_pruning()
        if not self.pruner.same_in_each_row:
            raise KnobError(
                f"{self.quantiser.name!r} after {self.pruner.name!r} needs the same number of kept weights in each "
                "row: give the pruning a pattern, or comparison='row'"
            )

    def format(self, rows: int, columns: int) -> SparseNM | SparseBitmask:
        """The sparse layout of the pruner, with kept weights in the format of the quantiser."""
        values = self.quantiser.format(*self.pruner.kept_shape(rows, columns))
        return self.pruner.sparse_format(rows, columns, values)

    def compress(self, weight: Tensor, statistics: LayerStatistics) -> Compressed:
        """Prune, then quantise; the notes tell the relative error after each step."""
        pruned = self.pruner.prune(weight, statistics)
        values = self.quantiser.compress_kept(pruned.weight, pruned.kept, statistics)
        # The layout the quantiser really gave: one that chooses by the data may differ from the planned one in a name.
        layout = self.pruner.sparse_format(weight.shape[0], weight.shape[1], values.packed.format)
        packed = layout.pack(pruned.kept, values.packed)
        first = relative_error(weight, pruned.weight, statistics)
        both = relative_error(weight, packed.unpack(), statistics)
        steps = f"relative error {first:.4g} after {self.pruner.name}, {both:.4g} after {self.quantiser.name}"
        return Compressed(packed, tuple(dict.fromkeys((*pruned.notes, *values.notes, steps))), values.details)

    def plan_note(self) -> str | None:
        """The quantiser's."""
        return self.quantiser.plan_note()

    def required(self) -> frozenset[Statistic]:
        """What either needs; second moments hold the inputs' norms as well."""
        both = self.pruner.required() | self.quantiser.required()
        return both - {Statistic.SQUARE_SUMS} if Statistic.SECOND_MOMENT in both else both

    def survey_required(self) -> frozenset[Statistic]:
        """What the pruner needs to divide its budget."""
        return self.pruner.survey_required()

    def survey(self, weights: Sequence[Tensor], statistics: Sequence[LayerStatistics]) -> float:
        """The pruner's."""
        return self.pruner.survey(weights, statistics)

    def allocate(self, blocks: Sequence[SurveyedBlock]) -> list[Self]:
        """The pruner's division, each part with the same quantiser."""
        return [replace(self, pruner=pruner) for pruner in self.pruner.allocate(blocks)]
