"""The block loop: the story of a run, from a skeleton without weights to finished shards.

    outside the blocks: load, compress embedding and head, store
    for each stack of blocks:
        catch what the first block receives (and each block's other arguments), once
        for each block: load -> statistics -> method -> packed -> shard + journal -> outputs for the next -> free

Memory holds the parameters outside the blocks while inputs are caught, afterwards one block, its statistics and the
hidden states. Weights are read tensor by tensor.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor, nn

from whit.errors import KnobError
from whit.formats.base import Packed
from whit.heap import return_freed_memory
from whit.methods.statistics import LayerStatistics
from whit.models.ahead import ReadAhead
from whit.models.outside import materialise_outside, release_outside
from whit.models.skeleton import materialise, release
from whit.models.source import TensorSource
from whit.models.stacks import Stack
from whit.pipeline.assign import Assignment
from whit.pipeline.background import InOrder
from whit.pipeline.block import Groups, Streams, compress_block, propagate
from whit.pipeline.catch import Caught, Finished
from whit.pipeline.events import Listener
from whit.pipeline.finish import dense_tensor_dtype
from whit.pipeline.gradient_store import GradientStore
from whit.pipeline.journal import Journal, JournalReader
from whit.pipeline.layer import Swaps, compress_layer, restore_layers
from whit.pipeline.ranks import ALONE, Ranks
from whit.pipeline.stage import Stage
from whit.report.record import LayerRecord

OUTSIDE = ""  # the unit of everything that lies in no block


@dataclass
class Run:
    """Everything a run needs.

    Attributes:
        model: skeleton; parameters on the meta device.
        dense_dtype: dtype in which untouched parameters are saved.
        compute_dtype, device: of the forward passes over the calibration inputs.
        batches: calibration inputs, on CPU.
        gradients: of the dense model, if a method needs them (filled by the passes before the loop).
        writer: where finished units are written.
        ranks: processes that work on the model together; the first has a `Journal`, the others read it.
        groups: how layers of the blocks so far share inputs.
    """

    model: nn.Module
    source: TensorSource
    stacks: Sequence[Stack]
    assignment: Assignment
    journal: JournalReader
    listener: Listener
    batches: list[dict[str, Tensor]]
    dense_dtype: torch.dtype
    compute_dtype: torch.dtype
    device: torch.device
    true_sequential: bool
    gradients: GradientStore | None = None
    writer: InOrder = field(default_factory=InOrder)
    ranks: Ranks = ALONE
    groups: Groups = field(default_factory=Groups)

    @property
    def stage(self) -> Stage:
        """Where the block loop computes."""
        return Stage(self.model, self.source, self.stacks, self.compute_dtype, self.device)


def compress_units(run: Run) -> None:
    """Bring every unit (outside, then block after block) into the journal.

    A unit is written by another thread while its outputs are computed; it is in the journal before it is reported. On a
    GPU the weights of the next block are read by a thread, too.
    """
    ranks = run.ranks
    if len(run.batches) < ranks.count:
        raise KnobError(
            f"{len(run.batches)} calibration batches cannot be shared among {ranks.count} processes: use a smaller "
            "batch size, more samples, or fewer processes"
        )
    first, last = (len(run.batches) * number // ranks.count for number in (ranks.rank, ranks.rank + 1))
    mine = dataclasses.replace(run, batches=run.batches[first:last])
    with mine.writer, _reading_ahead(mine) as ahead:
        _units(ahead)


@contextmanager
def _reading_ahead(run: Run) -> Iterator[Run]:
    if run.device.type != "cuda":  # there a second block in memory would cost more than it gives
        yield run
        return
    source = ReadAhead(run.source, run.device)
    try:
        yield dataclasses.replace(run, source=source)
    finally:
        source.close()


def _expect(run: Run, block: str | None) -> None:
    """Let the weights of the block that comes next be read, where that is done ahead."""
    if isinstance(run.source, ReadAhead):
        inside = [] if block is None else [key for key, _ in run.model.get_submodule(block).named_parameters()]
        stored = set(run.source.names())
        run.source.expect(name for name in (f"{block}.{key}" for key in inside) if name in stored)


def _units(run: Run) -> None:
    blocks = [block for stack in run.stacks for block in stack.blocks]
    _expect(run, blocks[0])
    materialise_outside(run.model, blocks, run.source, run.compute_dtype, run.device)
    _outside(run)
    done: list[str] = []
    if any(layer.method.required() for layer in run.assignment.layers.values() if layer.block):
        _stream(run, blocks, done)
    else:  # a method that asks for no statistics: nothing need be run through the blocks
        run.listener.phase("compression", sum(bool(layer.block) for layer in run.assignment.layers.values()))
    for block in blocks:
        if block not in done:
            _block(run, block, Streams([], []), done, len(blocks))


def _stream(run: Run, blocks: Sequence[str], done: list[str]) -> None:
    """Run the calibration inputs through every stack they reach, compressing its blocks on the way."""
    finished: list[Finished] = []
    for position, stack in enumerate(run.stacks):
        later = [block for other in run.stacks[position + 1 :] for block in other.blocks]
        found = _catch(run, stack, finished, later)
        inside = sum(layer.block in stack.blocks for layer in run.assignment.layers.values())
        run.listener.phase("compression", inside)
        if not later:
            release_outside(run.model, blocks)
        if found is None:
            run.listener.note(f"the calibration inputs never reach {stack.name!r}: compressed without data")
            continue
        caught, as_tuple = found
        hidden = [item.hidden for item in caught]
        count = len(caught[0].calls)
        for block, calls in groupby(range(count), key=lambda call: caught[0].calls[call].block):
            span = list(calls)
            streams = Streams(hidden, [[item.calls[call] for call in span] for item in caught])
            _block(run, block, streams, done, len(blocks), onward=bool(later) or span[-1] < count - 1)
        finished.append(Finished(stack.blocks, len(caught[0].calls), as_tuple, hidden))


def _outside(run: Run) -> None:
    layers = run.assignment.of_block(OUTSIDE)
    run.listener.phase("embeddings", len(layers))
    if OUTSIDE in run.journal.units:
        tensors = run.journal.load(OUTSIDE)
        restore_layers(run.model, "", layers, run.journal.units[OUTSIDE], tensors, Swaps(run.model, ""))
        for record in run.journal.units[OUTSIDE]:
            run.listener.layer(record)
        return
    start = time.perf_counter()
    packed: dict[str, Packed] = {}
    records: list[LayerRecord] = []
    for name, layer in layers.items():
        module = run.model.get_submodule(name)
        packed[name], record = compress_layer(
            layer, module, run.source, LayerStatistics(layer.columns), Swaps(run.model, OUTSIDE)
        )
        records.append(record)
        run.listener.layer(record)
    _store(run, OUTSIDE, packed, records, time.perf_counter() - start)


def _block(run: Run, name: str, streams: Streams, done: list[str], total: int, onward: bool = False) -> None:
    """Finish one block and run its inputs through it; one that comes again (shared weights) is only run through.

    Without `onward` nobody needs what it gives.
    """
    block = run.model.get_submodule(name)
    layers = run.assignment.of_block(name)
    start = time.perf_counter()
    materialise(run.model, name, run.source, run.compute_dtype, run.device)
    _expect(run, run.stage.after(name))
    swaps = Swaps(block, name)
    if name in run.journal.units:
        restore_layers(block, name, layers, run.journal.units[name], run.journal.load(name), swaps)
        records = [] if name in done else run.journal.units[name]
        for record in records:
            run.listener.layer(record)
    else:
        packed, records = compress_block(
            block,
            layers,
            name,
            run.source,
            streams,
            true_sequential=run.true_sequential,
            done=run.listener.layer,
            swaps=swaps,
            gradients=None if run.gradients is None else run.gradients.gradients(name),
            ranks=run.ranks,
            known=run.groups,
        )
        _store(run, name, packed, records, time.perf_counter() - start)
    if onward:
        propagate(block, streams)
    swaps.undo()
    release(run.model, name)
    return_freed_memory()
    _written(run)  # until here a GPU has the outputs to compute and a CPU has computed them
    if name not in done:
        run.listener.block(len(done), total, name)
        done.append(name)


def _written(run: Run) -> None:
    """Wait for the unit that is being written; every process then knows of it."""
    if run.ranks.count == 1:
        run.writer.wait()
        return
    with run.ranks.together():
        run.writer.wait()
    if not run.ranks.first:
        run.journal.read()


def _store(run: Run, unit: str, packed: dict[str, Packed], records: list[LayerRecord], seconds: float) -> None:
    """Packed tensors of the unit, and its untouched parameters and buffers in the dtype they are saved in."""
    journal = run.journal
    if not run.ranks.first:
        return
    tensors = {f"{name}.{key}": tensor for name, item in packed.items() for key, tensor in item.tensors.items()}
    blocks = [block for stack in run.stacks for block in stack.blocks]
    replaced = {f"{name}.weight" for name in [*packed, *run.assignment.tied]}
    stored = set(run.source.names())
    # Not those of a packed module that stands in the block: they are stored already, and not in the dense dtype.
    dense = [name for name in _dense_names(run.model, unit, blocks) if name not in replaced and name not in tensors]
    made = {name: run.model.state_dict()[name].detach().cpu() for name in dense if name not in stored}

    def finish(name: str) -> Tensor:
        value = made[name] if name in made else run.source.load(name)
        return value.to(dense_tensor_dtype(run.model, name, run.dense_dtype)) if value.is_floating_point() else value

    assert isinstance(journal, Journal)
    run.writer.submit(lambda: journal.write(unit, tensors | {name: finish(name) for name in dense}, records, seconds))


def _dense_names(model: nn.Module, unit: str, blocks: Sequence[str]) -> list[str]:
    """State-dict names in a unit, each shared tensor under its first name only."""
    prefixes = tuple(block + "." for block in blocks)
    shared = set(getattr(model, "all_tied_weights_keys", None) or {})
    names = [name for name in model.state_dict() if name not in shared]
    if unit == OUTSIDE:
        return [name for name in names if not name.startswith(prefixes)]
    return [name for name in names if name.startswith(unit + ".")]


def _catch(
    run: Run, stack: Stack, finished: Sequence[Finished], later: Sequence[str]
) -> tuple[list[Caught], bool] | None:
    """Entering hidden states and calls of every batch; and whether the blocks return tuples (learnt by running one).

    None if the calibration inputs never reach the stack (the vision part of a model that is given text only).
    """
    stage = run.stage
    catcher = stage.enter(stack, stage.cast(run.batches[0]), finished, later)
    if catcher is None:
        return None
    _expect(run, stack.blocks[0])
    run.listener.phase("calibration", len(run.batches))
    caught = []
    for index, batch in enumerate(run.batches):
        caught.append(catcher.catch(stage.cast(batch), index))
        run.listener.step(f"batch {index + 1}/{len(run.batches)}")
    return caught, catcher.as_tuple
