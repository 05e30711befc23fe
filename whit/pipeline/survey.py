"""The survey pass: methods that divide their budget among blocks look at the dense model first.

    forward through the dense blocks, gathering what `survey_required` names
    per block: method.survey(weights, statistics) -> a number, kept in the ledger
    method.allocate(all blocks) -> one method per block, which replace the one that was asked for

Each distinct method value (of a recipe) divides its own budget among the blocks that hold its layers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from whit.errors import ModelError
from whit.methods.base import Method, SurveyedBlock
from whit.methods.statistics import LayerStatistics, Statistic
from whit.models.source import TensorSource, check_finite
from whit.pipeline.assign import AssignedLayer, Assignment
from whit.pipeline.block import Streams, group_layers, propagate
from whit.pipeline.catch import Finished
from whit.pipeline.events import Listener
from whit.pipeline.gather import gathering
from whit.pipeline.gradient_store import GradientStore
from whit.pipeline.layer import data_free
from whit.pipeline.ledger import Ledger
from whit.pipeline.stage import Batch, Stage

LEDGER = "survey.jsonl"
PHASE = "survey"


@dataclass(frozen=True)
class SurveyTask:
    """What the pass works on.

    Attributes:
        stage, batches: as in the block loop.
        gradients: filled, if a survey asks for gradients.
    """

    stage: Stage
    batches: Sequence[Batch]
    assignment: Assignment
    gradients: GradientStore | None
    listener: Listener


def surveying_methods(assignment: Assignment) -> list[Method]:
    """Distinct methods of layers in blocks that divide their budget, in order of the model."""
    inside = (layer.method for layer in assignment.layers.values() if layer.block)
    return list(dict.fromkeys(method for method in inside if method.survey_required()))


class Survey:
    """What each block's survey gave; kept in the working folder, so that a block is surveyed once.

    Args:
        folder: working folder of the run. assignment: of the run, with the methods as they were asked for.

    Attributes:
        complete: every block that the inputs reach was surveyed.
    """

    def __init__(self, folder: Path, assignment: Assignment) -> None:
        self._ledger = Ledger(folder / LEDGER)
        self._assignment = assignment
        self._methods = surveying_methods(assignment)
        self._scores: dict[str, list[float | None]] = {}
        self.complete = not self._methods
        for line in self._ledger.lines:
            if "complete" in line:
                self.complete = True
            elif isinstance(line.get("block"), str) and len(line.get("scores", ())) == len(self._methods):
                self._scores[line["block"]] = line["scores"]

    def has(self, block: str) -> bool:
        """Whether the block needs no survey (any more)."""
        return block in self._scores or not any(self.layers(block, index) for index in range(len(self._methods)))

    def layers(self, block: str, index: int) -> dict[str, AssignedLayer]:
        """Layers of a block that belong to surveying method number `index`."""
        found = self._assignment.of_block(block).items()
        return {name: layer for name, layer in found if layer.method == self._methods[index]}

    def take(
        self, block: str, source: TensorSource, statistics: dict[str, LayerStatistics], device: torch.device
    ) -> None:
        """Survey a block and keep the numbers.

        Args:
            statistics: of each layer.

        Raises:
            ModelError: a survey gave NaN or Inf.
        """
        scores: list[float | None] = []
        for index, method in enumerate(self._methods):
            layers = self.layers(block, index)
            if not layers:
                scores.append(None)
                continue
            weights = [_weight(layer, source, device) for layer in layers.values()]
            score = float(method.survey(weights, [statistics[name] for name in layers]))
            if not math.isfinite(score):
                raise ModelError(
                    f"method {method.name!r} found {score} for block {block!r}, so its budget cannot be divided: use "
                    "another rule of division, or check the model's weights"
                )
            scores.append(score)
        self._ledger.append({"block": block, "scores": scores})
        self._scores[block] = scores

    def finish(self) -> None:
        """Say that no block is left to survey."""
        self._ledger.append({"complete": True})
        self.complete = True

    def allocation(self) -> list[Allocation]:
        """How each method divides its budget among the blocks that were surveyed.

        Raises:
            ModelError: a method answers with another number of methods than there are blocks.
        """
        out = []
        for index, method in enumerate(self._methods):
            blocks = []
            for block in dict.fromkeys(layer.block for layer in self._assignment.layers.values()):
                score = self._scores[block][index] if block in self._scores else None
                if score is not None:
                    size = sum(layer.rows * layer.columns for layer in self.layers(block, index).values())
                    blocks.append(SurveyedBlock(block, score, size))
            if not blocks:  # the inputs reach none of them
                continue
            methods = method.allocate(blocks)
            if len(methods) != len(blocks):
                raise ModelError(
                    f"method {method.name!r} divided its budget among {len(methods)} of {len(blocks)} blocks"
                )
            out.append(Allocation(method, blocks, list(methods)))
        return out


@dataclass(frozen=True)
class Allocation:
    """One method's budget divided: `methods` in the order of `blocks`."""

    method: Method
    blocks: list[SurveyedBlock]
    methods: list[Method]

    def to_json(self) -> dict[str, Any]:
        """`{"method": as asked for, "blocks": {name: {"score", "parameters", "method"}}}`."""
        pairs = zip(self.blocks, self.methods, strict=True)
        return {
            "method": self.method.to_json(),
            "blocks": {
                block.name: {"score": block.score, "parameters": block.parameters, "method": method.to_json()}
                for block, method in pairs
            },
        }


def allocate(assignment: Assignment, allocations: Sequence[Allocation]) -> Assignment:
    """The assignment with each block's own method in place of the one that was asked for."""
    chosen = {
        (block.name, item.method): method
        for item in allocations
        for block, method in zip(item.blocks, item.methods, strict=True)
    }
    layers = {
        name: dataclasses.replace(layer, method=chosen.get((layer.block, layer.method), layer.method))
        for name, layer in assignment.layers.items()
    }
    return dataclasses.replace(assignment, layers=layers)


def survey_blocks(task: SurveyTask, survey: Survey) -> None:
    """Survey every block that the inputs reach and that is not in the ledger yet."""
    stage = task.stage
    if survey.complete:
        return
    finished: list[Finished] = []
    batches = [stage.cast(batch) for batch in task.batches]
    task.listener.phase(PHASE, len(stage.blocks))
    for position, stack in enumerate(stage.stacks):
        later = [block for other in stage.stacks[position + 1 :] for block in other.blocks]
        with stage.outside():
            catcher = stage.enter(stack, batches[0], finished, later)
            if catcher is None:
                continue
            caught = [catcher.catch(batch, index) for index, batch in enumerate(batches)]
        hidden = [item.hidden for item in caught]
        calls = caught[0].calls
        for block, group in groupby(range(len(calls)), key=lambda call: calls[call].block):
            span = list(group)
            streams = Streams(hidden, [[item.calls[call] for call in span] for item in caught])
            _block(task, survey, block, streams)
            task.listener.step(block)
        finished.append(Finished(stack.blocks, len(calls), catcher.as_tuple, hidden))
    survey.finish()


def _block(task: SurveyTask, survey: Survey, name: str, streams: Streams) -> None:
    """Survey one block, if that is still to be done, while its inputs run through it."""
    with task.stage.block(name) as block:
        if survey.has(name):
            propagate(block, streams)
            return
        statistics = _statistics(task, block, name, streams)
        survey.take(name, task.stage.source, statistics, task.stage.device)


def _statistics(task: SurveyTask, block: nn.Module, name: str, streams: Streams) -> dict[str, LayerStatistics]:
    layers = {key: layer for key, layer in task.assignment.of_block(name).items() if layer.method.survey_required()}
    modules = {key: block.get_submodule(key.removeprefix(name + ".")) for key in layers}
    groups = group_layers(block, modules, streams)
    needs = {
        group: frozenset[Statistic]().union(*(layers[key].method.survey_required() for key in group))
        for group in groups
    }
    with gathering(groups, modules, needs, sum(len(calls) for calls in streams.calls)) as gathered:
        propagate(block, streams)  # the block stays as it is, so one pass both measures and moves on
    out = {key: statistics for group, statistics in gathered.items() for key in group}
    gradients = {} if task.gradients is None else task.gradients.gradients(name)
    for key, layer in layers.items():
        wants = Statistic.GRADIENT in layer.method.survey_required()
        if key not in out or (wants and key not in gradients):
            out[key] = data_free(layer, modules[key])
        elif wants:
            out[key] = out[key].with_gradient(gradients[key].to(task.stage.device))
    return out


def _weight(layer: AssignedLayer, source: TensorSource, device: torch.device) -> Tensor:
    name = f"{layer.name}.weight"
    weight = layer.kind.matrix(source.load(name).to(device).to(torch.float32)).contiguous()
    check_finite(name, weight)
    return weight
