"""Methods that ask for what passes before the block loop give; values only, never registered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from whit.formats.base import Format
from whit.methods.base import Compressed, Method, SurveyedBlock, knob
from whit.methods.rtn import RTN
from whit.methods.statistics import LayerStatistics, Statistic


@dataclass(frozen=True)
class Sensitive(Method):
    """Rounds to nearest after removing, in each row, the half of the weights with the smallest |W| G."""

    name: ClassVar[str] = "sensitive"
    summary: ClassVar[str] = "for tests"
    needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.GRADIENT})

    bits: int = knob(4, "bits")

    def format(self, rows: int, columns: int) -> Format:
        return RTN(bits=self.bits, group_size=0).format(rows, columns)

    def compress(self, weight: Tensor, statistics: LayerStatistics) -> Compressed:
        score = weight.abs()
        if statistics.tokens:  # else the inputs reach no such layer
            assert statistics.gradient is not None
            assert statistics.gradient.shape == weight.shape
            score = score * statistics.gradient
        smallest = score.argsort(dim=1, stable=True)[:, : weight.shape[1] // 2]
        return RTN(bits=self.bits, group_size=0).compress(weight.scatter(1, smallest, 0.0), statistics)


@dataclass(frozen=True)
class Budgeted(Method):
    """Rounds to nearest; the block with the highest score gets one bit more, the one with the lowest one bit less."""

    name: ClassVar[str] = "budgeted"
    summary: ClassVar[str] = "for tests"

    bits: int = knob(4, "bits")
    by: str = knob("inputs", "what a block's score is made of", choices=("inputs", "gradients", "nothing"))

    def format(self, rows: int, columns: int) -> Format:
        return RTN(bits=self.bits, group_size=0).format(rows, columns)

    def compress(self, weight: Tensor, statistics: LayerStatistics) -> Compressed:
        return RTN(bits=self.bits, group_size=0).compress(weight, statistics)

    def survey_required(self) -> frozenset[Statistic]:
        wanted = {"inputs": {Statistic.SQUARE_SUMS}, "gradients": {Statistic.GRADIENT}}
        return frozenset(wanted.get(self.by, set()))

    def survey(self, weights: Sequence[Tensor], statistics: Sequence[LayerStatistics]) -> float:
        if self.by == "gradients":
            gradients = [item.gradient for item in statistics if item.gradient is not None]
            assert len(gradients) == len(weights)
            return float(sum((w * g).square().sum() for w, g in zip(weights, gradients, strict=True)))
        scores = [(w.square() @ s.input_square_sums()).sum() for w, s in zip(weights, statistics, strict=True)]
        return float(torch.stack(scores).sum())

    def allocate(self, blocks: Sequence[SurveyedBlock]) -> list[Any]:
        order = sorted(range(len(blocks)), key=lambda index: blocks[index].score)
        change = {order[0]: -1, order[-1]: 1}
        return [Budgeted(self.bits + change.get(index, 0), self.by) for index in range(len(blocks))]


class Hopeless(Budgeted):
    """Finds no number for a block."""

    def survey(self, weights: Sequence[Tensor], statistics: Sequence[LayerStatistics]) -> float:
        return float("nan")
