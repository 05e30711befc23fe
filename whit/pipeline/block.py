"""One block: gather statistics, compress its layers, put the compressed values back, return what must be stored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from whit.formats.base import Packed
from whit.methods.statistics import LayerStatistics, Statistic
from whit.models.source import TensorSource
from whit.pipeline.assign import AssignedLayer
from whit.pipeline.gather import find_groups, gathering
from whit.pipeline.layer import Swaps, data_free
from whit.pipeline.ranks import ALONE, Ranks
from whit.pipeline.relay import Relay
from whit.pipeline.team import Team
from whit.report.record import LayerRecord

UNREACHED = "the calibration inputs never reached this layer: compressed without data"


class Runnable(Protocol):
    """One call of a block, as `Call` is: everything but the hidden states is known."""

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Call the block on `hidden`; returns the new hidden states."""
        ...


@dataclass
class Streams:
    """Hidden states entering a block and its calls, one entry per batch; `propagate` replaces `hidden`."""

    hidden: list[Tensor]
    calls: Sequence[Sequence[Runnable]]


class Groups:
    """How the layers of earlier blocks share inputs: what is expected of a block with layers of the same names."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, ...], list[tuple[str, ...]]] = {}

    def expected(self, names: Sequence[str], prefix: str) -> list[tuple[str, ...]] | None:
        """Groups of layers by full name, in order of execution, or None if no such block was seen."""
        known = self._known.get(tuple(name.removeprefix(prefix) for name in names))
        return None if known is None else [tuple(prefix + name for name in group) for group in known]

    def remember(self, names: Sequence[str], prefix: str, groups: Sequence[tuple[str, ...]]) -> None:
        """Groups found in a block."""
        key = tuple(name.removeprefix(prefix) for name in names)
        self._known[key] = [tuple(name.removeprefix(prefix) for name in group) for group in groups]


def propagate(block: nn.Module, streams: Streams) -> None:
    """Run all batches through a finished block, in place."""
    with torch.no_grad():
        for index, calls in enumerate(streams.calls):
            for call in calls:
                streams.hidden[index] = call.run(block, streams.hidden[index])


def compress_block(
    block: nn.Module,
    layers: dict[str, AssignedLayer],
    prefix: str,
    source: TensorSource,
    streams: Streams,
    *,
    true_sequential: bool,
    done: Callable[[LayerRecord], None],
    swaps: Swaps,
    gradients: Mapping[str, Tensor] | None = None,
    ranks: Ranks = ALONE,
    known: Groups | None = None,
) -> tuple[dict[str, Packed], list[LayerRecord]]:
    """Compress the assigned layers of a block; its modules hold the compressed values afterwards.

    Args:
        block: materialised in the compute dtype.
        layers: by full module name, all under `prefix`.
        true_sequential: gather statistics again before each group of layers, so that later layers of the block see the
            earlier ones compressed; otherwise once for all, as the published BiLLM code does.
        done: told about each layer.
        swaps: holds the modules that run packed until it is undone.
        gradients: G of the dense model by full module name, float32 (rows, columns), for methods that need it; a layer
            without one took part in no forward pass of the dense model and is compressed without data.
        ranks: processes that share the work, each with batches of its own in `streams`.
        known: groups of earlier blocks, which spare this one a run to find its own; they are checked on the way.

    Returns:
        packed weights by full module name, and their records.
    """
    modules = {name: block.get_submodule(name.removeprefix(prefix + ".")) for name in layers}

    known = known or Groups()
    calls = sum(ranks.gather(sum(len(item) for item in streams.calls)))

    def gather(part: Sequence[tuple[str, ...]], run: Callable[[], object]) -> dict[tuple[str, ...], LayerStatistics]:
        needs = {group: _needs(layers[name] for name in group) for group in part}
        with gathering(part, modules, needs, calls, Relay(ranks)) as statistics:
            if any(needs.values()):
                run()
        return statistics

    measured = any(layer.method.required() for layer in layers.values())
    groups = None if true_sequential or not measured else known.expected(list(layers), f"{prefix}.")
    gathered: dict[tuple[str, ...], LayerStatistics] = {}
    if not measured:  # nothing is run, so who shares inputs can be neither found nor checked, nor matters
        groups = [(name,) for name in layers]
    elif groups is not None:
        expected = groups
        try:
            gathered = gather(expected, lambda: _run_and_check(block, modules, streams, expected, ranks))
        except _OtherGroupsError:
            groups = None
    if groups is None:
        groups = group_layers(block, modules, streams, ranks)
        known.remember(list(layers), f"{prefix}.", groups)
    reached = {name for group in groups for name in group}
    unreached = [name for name in layers if name not in reached or not _has_gradient(layers[name], gradients or {})]
    team = Team(layers, modules, source, swaps, done, ranks)
    # One after the other only where later statistics follow from it: processes divide all that may be done at once.
    for part in [[group] for group in groups] if true_sequential and measured else [groups]:
        statistics = gathered or gather(part, lambda: _run_copies(block, streams))
        with team.dividing([name for group in part for name in group if name not in unreached]) as compress:
            for group in part:
                for name in group:
                    mine = statistics[group]
                    if Statistic.GRADIENT in layers[name].method.required() and gradients and name in gradients:
                        mine = mine.with_gradient(gradients[name].to(_device(modules[name])))
                    compress(name, mine)
                statistics[group].release()
    with team.dividing(unreached) as compress:
        for name in unreached:
            notes = (UNREACHED,) if layers[name].method.required() else ()
            compress(name, data_free(layers[name], modules[name]), notes)
    return team.packed, team.records


def _needs(layers: Iterable[AssignedLayer]) -> frozenset[Statistic]:
    """What the methods of a group need; errors that second moments cannot tell are measured on a sample of inputs."""
    out: frozenset[Statistic] = frozenset()
    for layer in layers:
        required = layer.method.required()
        changes_inputs = layer.method.format(layer.rows, layer.columns).changes_inputs
        judged = required and (changes_inputs or Statistic.SECOND_MOMENT not in required)
        out |= required | ({Statistic.SAMPLE} if judged else frozenset())
    return out


def group_layers(
    block: nn.Module, modules: dict[str, nn.Module], streams: Streams, ranks: Ranks = ALONE
) -> list[tuple[str, ...]]:
    """Layers by shared inputs; batches are tried until every layer was reached, for blocks that route their inputs.

    Every one of several processes gets the same answer: that of the first with batches that reach a layer.
    """
    groups: list[tuple[str, ...]] = []
    waiting = dict(modules)
    for rank in range(ranks.count):
        found = _groups_here(block, waiting, streams) if rank == ranks.rank else []
        part = [tuple(group) for group in ranks.gather(found)[rank]]
        groups += part
        for name in (name for group in part for name in group):
            del waiting[name]
        if not waiting:
            break
    return groups


def _groups_here(block: nn.Module, modules: dict[str, nn.Module], streams: Streams) -> list[tuple[str, ...]]:
    groups: list[tuple[str, ...]] = []
    waiting = dict(modules)
    for hidden, calls in zip(streams.hidden, streams.calls, strict=True):

        def run_once(call: Runnable = calls[0], hidden: Tensor = hidden) -> None:
            with torch.no_grad():
                call.run(block, hidden)

        found = find_groups(run_once, waiting)
        groups += found
        for name in (name for group in found for name in group):
            del waiting[name]
        if not waiting:
            break
    return groups


class _OtherGroupsError(Exception):
    """The layers of a block do not share their inputs as those of the blocks before it."""


def _run_and_check(
    block: nn.Module,
    modules: dict[str, nn.Module],
    streams: Streams,
    expected: Sequence[tuple[str, ...]],
    ranks: Ranks,
) -> None:
    """`_run_copies`, given up after the first batch (in every process) if the groups are not as expected."""
    first = Streams(streams.hidden[:1], streams.calls[:1])
    found = find_groups(lambda: _run_copies(block, first), modules)
    if not all(ranks.gather(found == list(expected))):
        raise _OtherGroupsError
    _run_copies(block, Streams(streams.hidden[1:], streams.calls[1:]))


def _run_copies(block: nn.Module, streams: Streams) -> None:
    """Run all batches through the block without changing the streams."""
    with torch.no_grad():
        for hidden, calls in zip(streams.hidden, streams.calls, strict=True):
            out = hidden
            for call in calls:
                out = call.run(block, out)


def _has_gradient(layer: AssignedLayer, gradients: Mapping[str, Tensor]) -> bool:
    return layer.name in gradients or Statistic.GRADIENT not in layer.method.required()


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
