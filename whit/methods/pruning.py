"""What all pruning methods share: how many weights go, how the budget is divided, how the kept ones are stored.

A pruning method keeps some weights and sets the others to zero. How many is a fraction (`sparsity`), or a pattern N:M
with N the weights KEPT of every aligned group of M columns (papers differ; this is how the hardware counts). The number
kept is known before the work, so the packed size is too. Layers can differ (`allocation`) within the same budget.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Self

import torch
from torch import Tensor

from whit.errors import KnobError
from whit.formats.base import Format
from whit.formats.dense import DTYPES, Dense
from whit.formats.sparse_bitmask import SparseBitmask
from whit.formats.sparse_nm import SparseNM
from whit.methods.allocation import outlier_share, owl_shares, whole_steps
from whit.methods.base import Compressed, Method, SurveyedBlock, knob
from whit.methods.feedback import LAZY_BLOCK
from whit.methods.masks import dropped, keep_in_groups, keep_in_matrix, keep_in_rows, parse_pattern
from whit.methods.pruning_feedback import prune_with_feedback
from whit.methods.scores import wanda_score
from whit.methods.statistics import LayerStatistics, Statistic, dead_column_notes

DEFAULT_SPARSITY = 0.5
DEFAULT_DAMPING = 0.01
# Shares of blocks are whole multiples of this part: it divides the widths of most models, so that the budget also holds
# after each row has been rounded to whole weights.
SHARE_STEP = Fraction(1, 64)


@dataclass(frozen=True)
class Pruned:
    """What a pruning step leaves: the weight float32 (rows, columns), zero where not kept, and the mask kept (bool)."""

    weight: Tensor
    kept: Tensor
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pruner(Method):
    """Base of the pruning methods."""

    prunes: ClassVar[bool] = True

    sparsity: float | None = knob(
        None, "fraction of weights set to zero, without a pattern; if not given: 0.5", minimum=0, maximum=1
    )
    pattern: str | None = knob(
        None, "N:M, N weights KEPT of every M neighbouring columns (2:4 is 50 %, 1:4 is 75 % zeros); replaces sparsity"
    )
    allocation: str = knob(
        "uniform", "how blocks share the budget: alike, or by outliers (OWL)", choices=("uniform", "owl")
    )
    owl_span: float | None = knob(
        None, "owl only: shares kept lie in an interval of twice this width; if not given: 0.08", minimum=0, maximum=0.5
    )
    owl_multiple: float | None = knob(
        None, "owl only: outliers exceed so many times the mean score; if not given: 5", minimum=1
    )
    value_dtype: str = knob("float16", "dtype in which kept weights are stored", choices=tuple(DTYPES))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern is not None:
            parse_pattern(self.pattern)
            self._refuse("with a pattern", sparsity=self.sparsity)
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise KnobError(
                f"sparsity of method {self.name!r} must lie between 0 and 1, neither of them, got {self.sparsity!r}"
            )
        if self.allocation == "uniform":
            self._refuse("with allocation 'uniform'", owl_span=self.owl_span, owl_multiple=self.owl_multiple)
        elif self.pattern is None and 1 - self.drop_share < SHARE_STEP:
            raise KnobError(f"allocation 'owl' needs a sparsity of at most {float(1 - SHARE_STEP)}")

    def _refuse(self, where: str, **values: object) -> None:
        """Raise KnobError if one of the knobs was given where it does nothing."""
        for name, value in values.items():
            if value is not None:
                raise KnobError(f"knob {name!r} of method {self.name!r} does nothing {where}: leave it out")

    @property
    def groups(self) -> tuple[int, int] | None:
        """(N, M) of the pattern, or None."""
        return None if self.pattern is None else parse_pattern(self.pattern)

    @property
    def drop_share(self) -> float:
        """Fraction of weights that go when there is no pattern."""
        return DEFAULT_SPARSITY if self.sparsity is None else self.sparsity

    @property
    @abstractmethod
    def same_in_each_row(self) -> bool:
        """Whether every row keeps the same number of weights: what a quantiser that follows relies on."""

    @abstractmethod
    def prune(self, weight: Tensor, statistics: LayerStatistics) -> Pruned:
        """Choose what is kept, and with which values; arguments as in `compress`."""

    @abstractmethod
    def kept_without_pattern(self, rows: int, columns: int) -> int:
        """Weights kept of each row if `same_in_each_row`, else of the matrix."""

    def mask(self, scores: Tensor) -> Tensor:
        """Which of the weights that compete are kept, by scores (rows, columns): bool of the same shape."""
        if self.groups is not None:
            return keep_in_groups(scores, *self.groups)
        if self.same_in_each_row:
            return keep_in_rows(scores, dropped(scores.shape[1], self.drop_share))
        return keep_in_matrix(scores, dropped(scores.numel(), self.drop_share))

    def kept_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Shape of the kept weights side by side: (rows, k), or (1, all of them) when rows differ.

        Raises:
            KnobError: the columns are not divisible into the groups of the pattern.
        """
        if self.groups is not None:
            n, m = self.groups
            if columns % m:
                raise KnobError(
                    f"a {rows} x {columns} weight cannot be pruned {self.pattern}, its columns are not divisible by "
                    f"{m}: leave the layer out (--skip, or 'exclude' in a recipe), or choose another pattern"
                )
            return rows, columns // m * n
        return (rows if self.same_in_each_row else 1), self.kept_without_pattern(rows, columns)

    def sparse_format(self, rows: int, columns: int, values: Format) -> SparseNM | SparseBitmask:
        """The layout of a pruned weight whose kept weights are stored in the format `values`."""
        _, kept = self.kept_shape(rows, columns)
        if self.groups is not None:
            return SparseNM(*self.groups, values)
        return SparseBitmask(kept, self.same_in_each_row, values)

    def format(self, rows: int, columns: int) -> SparseNM | SparseBitmask:
        """Index and kept weights in `value_dtype`."""
        return self.sparse_format(rows, columns, Dense(self.value_dtype))

    def compress(self, weight: Tensor, statistics: LayerStatistics) -> Compressed:
        """Prune and store the kept weights in `value_dtype`.

        Raises:
            ModelError: a weight overflows that dtype.
        """
        pruned = self.prune(weight, statistics)
        values = compact(pruned.weight, pruned.kept, self.kept_shape(*weight.shape))
        packed = self.format(*weight.shape).pack(pruned.kept, Dense(self.value_dtype).pack(values))
        return Compressed(packed, pruned.notes)

    def survey_required(self) -> frozenset[Statistic]:
        """The inputs' norms, if blocks share the budget by outliers."""
        return frozenset({Statistic.SQUARE_SUMS}) if self.allocation == "owl" else frozenset()

    def survey(self, weights: Sequence[Tensor], statistics: Sequence[LayerStatistics]) -> float:
        """Share of outliers among the Wanda scores of a block, whatever this method scores with, as OWL defines it."""
        if self.allocation == "uniform":
            return 0.0
        scores = [
            wanda_score(weight, item.input_square_sums()) for weight, item in zip(weights, statistics, strict=True)
        ]
        return outlier_share(scores, 5.0 if self.owl_multiple is None else self.owl_multiple)

    def allocate(self, blocks: Sequence[SurveyedBlock]) -> list[Self]:
        """One method per block; the weights kept in all never exceed what `sparsity` or `pattern` says."""
        if self.allocation == "uniform" or not blocks:
            return [self for _ in blocks]
        sizes = [block.parameters for block in blocks]
        kept = 1 - Fraction(str(self.drop_share)) if self.groups is None else Fraction(*self.groups)
        steps = SHARE_STEP.denominator if self.groups is None else self.groups[1]
        span = 0.08 if self.owl_span is None else self.owl_span
        shares = owl_shares([block.score for block in blocks], sizes, float(kept), span)
        chosen = whole_steps([share * steps for share in shares], sizes, 1, steps - 1, kept * steps)
        return [self._with_steps(count, steps) for count in chosen]

    def _with_steps(self, kept: int, steps: int) -> Self:
        """This method for one block that keeps `kept / steps` of its weights."""
        own = {"sparsity": 1 - kept / steps} if self.groups is None else {"pattern": f"{kept}:{steps}"}
        return dataclasses.replace(self, allocation="uniform", owl_span=None, owl_multiple=None, **own)


@dataclass(frozen=True)
class ScorePruner(Pruner):
    """Base of the methods that score every weight of the dense layer and drop the lowest scores."""

    default_comparison: ClassVar[str] = "row"

    comparison: str | None = knob(
        None,
        "without a pattern: which weights compete, those of a row or of the whole matrix; if not given: row "
        "(magnitude: matrix)",
        choices=("row", "matrix"),
    )
    update: bool = knob(False, "change the kept weights as SparseGPT does, so that they make up for those that went")
    damping: float | None = knob(
        None, "with update: added to diag(H), relative to its mean; if not given: 0.01", minimum=0, maximum=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern is not None:
            self._refuse("with a pattern", comparison=self.comparison)
        if not self.update:
            self._refuse("without update", damping=self.damping)

    @abstractmethod
    def score(self, weight: Tensor, statistics: LayerStatistics) -> Tensor:
        """How much each weight matters: float32 (rows, columns); only the order within a comparison counts."""

    @property
    def same_in_each_row(self) -> bool:
        """With a pattern, or when the weights of a row compete among themselves."""
        return self.pattern is not None or (self.comparison or self.default_comparison) == "row"

    def required(self) -> frozenset[Statistic]:
        """What the score needs, and second moments for the update (they hold the inputs' norms as well)."""
        if not self.update:
            return self.needs
        return self.needs - {Statistic.SQUARE_SUMS} | {Statistic.SECOND_MOMENT}

    def kept_without_pattern(self, rows: int, columns: int) -> int:
        """All but floor(count sparsity), of a row or of the matrix."""
        count = columns if self.same_in_each_row else rows * columns
        return count - dropped(count, self.drop_share)

    def prune(self, weight: Tensor, statistics: LayerStatistics) -> Pruned:
        """Drop the lowest scores; with `update`, feed the error of each column to those after it.

        Inputs never active in calibration get zero weights in an update.
        """
        kept = self.mask(self.score(weight, statistics))
        if not self.update:
            return Pruned(weight.masked_fill(~kept, 0), kept)
        factor = statistics.inverse_factor(DEFAULT_DAMPING if self.damping is None else self.damping)
        alive = weight.masked_fill(factor.dead, 0)
        fed = prune_with_feedback(
            alive, factor.upper, LAZY_BLOCK, lambda first, values: kept[:, first : first + values.shape[1]]
        )
        return Pruned(fed.weight, kept, (*factor.notes, *dead_column_notes(statistics)))


def compact(weight: Tensor, kept: Tensor, shape: tuple[int, int]) -> Tensor:
    """The kept entries of a matrix in order of rows and columns, as a matrix of `shape`."""
    return torch.masked_select(weight, kept).reshape(shape)
