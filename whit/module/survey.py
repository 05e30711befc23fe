"""Dividing a method's budget among the blocks of a module in memory, from one look at the dense module."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from whit.methods.base import Method, SurveyedBlock
from whit.methods.statistics import LayerStatistics
from whit.module.assign import NOT_SMALLER, is_smaller
from whit.pipeline.assign import AssignedLayer, Assignment
from whit.pipeline.block import Streams, group_layers, propagate
from whit.pipeline.gather import gathering
from whit.pipeline.layer import data_free


def divide_budgets(
    module: nn.Module, assignment: Assignment, streams: Streams, gradients: Mapping[str, Tensor]
) -> None:
    """Give the layers of each method that surveys its blocks the methods that it allocates to them.

    A block is one of the module's repeated blocks; a layer outside them is a block of its own.
    """
    surveying = {name: layer for name, layer in assignment.layers.items() if layer.method.survey_required()}
    if not surveying:
        return
    statistics = _look(module, surveying, streams)
    for method in dict.fromkeys(layer.method for layer in surveying.values()):
        blocks: dict[str, list[AssignedLayer]] = {}
        for name, layer in surveying.items():
            if layer.method == method:
                blocks.setdefault(layer.block or name, []).append(layer)
        surveyed = [
            SurveyedBlock(
                block,
                method.survey(
                    [_weight(module, layer) for layer in layers],
                    [statistics[layer.name].with_gradient(gradients.get(layer.name)) for layer in layers],
                ),
                sum(layer.rows * layer.columns for layer in layers),
            )
            for block, layers in blocks.items()
        ]
        for chosen, layers in zip(method.allocate(surveyed), blocks.values(), strict=True):
            for layer in layers:
                _give(module, assignment, layer, chosen)


def _look(module: nn.Module, layers: Mapping[str, AssignedLayer], streams: Streams) -> dict[str, LayerStatistics]:
    modules = {name: module.get_submodule(name) for name in layers}
    groups = group_layers(module, modules, streams)
    needs = {group: frozenset().union(*(layers[name].method.survey_required() for name in group)) for group in groups}
    with gathering(groups, modules, needs, len(streams.calls)) as gathered:
        propagate(module, streams)
    out = {name: gathered[group] for group in groups for name in group}
    return {name: out.get(name) or data_free(layer, modules[name]) for name, layer in layers.items()}


def _weight(module: nn.Module, layer: AssignedLayer) -> Tensor:
    return layer.kind.matrix(module.get_parameter(f"{layer.name}.weight").detach().float()).contiguous()


def _give(module: nn.Module, assignment: Assignment, layer: AssignedLayer, method: Method) -> None:
    given = AssignedLayer(layer.name, layer.block, layer.kind, layer.rows, layer.columns, method)
    if is_smaller(given, module):
        assignment.layers[layer.name] = given
    else:
        del assignment.layers[layer.name]
        assignment.untouched[layer.name] = NOT_SMALLER
