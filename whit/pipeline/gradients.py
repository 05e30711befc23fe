"""The gradient pass: G = sqrt(sum over calibration sequences of (dL/dW)^2) of the dense model, before the block loop.

This is the statistic that gradient-based pruning ranks weights by (Das et al. 2023, GBLM-Pruner; Dong et al. 2024,
Pruner-Zero), in float32 and evaluation mode whatever the run's dtype: half precision loses small gradients inside the
backward pass. The squares are those of single sequences, so the batch size changes nothing.

    for each chunk of sequences:
        forward, block after block, keeping only the hidden states between blocks
        loss at the head -> gradients of the last hidden states
        for each block in reverse: run it again -> squares of its gradients to disk, gradients of its inputs kept

Memory holds one block, its sums and the hidden states of a chunk. Where blocks cannot be taken in reverse one at a time
(an encoder with its decoder), the whole model is loaded instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from whit.pipeline.catch import Call, Caught, Finished
from whit.pipeline.gradient_task import (
    BOUNDARY_SHARE,
    PHASE,
    GradientTask,
    Layers,
    Sums,
    add_square,
    refuse_zero,
    repeatable,
    sequence_loss,
    weights_of,
)
from whit.pipeline.gradients_whole import whole_gradients
from whit.pipeline.memory import available_bytes
from whit.pipeline.stage import Batch
from whit.pipeline.way import Way, find_way


def gather_gradients(task: GradientTask) -> None:
    """Fill the store, from where an earlier run left off.

    Raises:
        ModelError: a loss or gradient is NaN or Inf, or zero throughout.
    """
    if task.store.complete(len(task.sequences)):
        return
    with task.stage.outside():
        way = find_way(task.stage, task.stage.cast(task.sequences[0]))
    if way is None:
        whole_gradients(task)
    else:
        _streamed(task, way)


def _streamed(task: GradientTask, way: Way) -> None:
    total = len(task.sequences)
    stop = min((index for index, (block, _) in enumerate(way.spans) if block in task.layers), default=None)
    if stop is None:  # the inputs never reach a layer that asks
        task.store.write(0, total, {})
        return
    progress = task.store.progress
    chunks = []
    if progress.block is not None:
        after = [block for block, _ in way.spans].index(progress.block)
        chunks.append((range(progress.start, progress.end), after))
    boundaries = (way.calls - way.spans[stop][1].start + 1) * way.hidden_bytes
    size = max(1, int(BOUNDARY_SHARE * available_bytes(task.stage.device) / boundaries))
    chunks += [(range(begin, min(begin + size, total)), len(way.spans)) for begin in range(progress.end, total, size)]
    task.listener.phase(PHASE, sum(last + last - stop for _, last in chunks))
    for chunk, last in chunks:
        _chunk(task, way, chunk, stop, last)


def _chunk(task: GradientTask, way: Way, chunk: range, stop: int, last: int) -> None:
    """Take blocks number `last` - 1 down to `stop` of some sequences in reverse; those from `last` on are done."""
    stage = task.stage
    with stage.outside():
        batches = [stage.cast(task.sequences[index]) for index in chunk]
        caught = [way.catcher.catch(batch, index) for batch, index in zip(batches, chunk, strict=True)]
    inputs, hidden = _forward(task, way.spans[:last], caught, stop)
    if last == len(way.spans):
        with stage.outside():
            flowing = [_at_head(task, way, batch, item) for batch, item in zip(batches, hidden, strict=True)]
    else:
        flowing = [item.to(stage.device) for item in task.store.stream()]
    del hidden
    for number in reversed(range(stop, last)):
        block, span = way.spans[number]
        layers = task.layers.get(block, {})
        sums = task.store.sums(block, stage.device)
        with stage.block(block) as module:
            for index, item in enumerate(caught):
                calls = [item.calls[call] for call in span]
                flowing[index] = _backward(module, block, calls, inputs[number][index], flowing[index], layers, sums)
        del inputs[number]
        if chunk.stop == len(task.sequences):
            refuse_zero(sums)
        task.store.write(
            chunk.start, chunk.stop, {block: sums} if layers else {}, (block, flowing) if number > stop else None
        )
        task.listener.step(f"backward {block}")


def _forward(
    task: GradientTask, spans: Sequence[tuple[str, range]], caught: Sequence[Caught], stop: int
) -> tuple[dict[int, list[list[Tensor]]], list[Tensor]]:
    """Inputs of every call by number of the block (from `stop` on), sequence and call; and the last hidden states."""
    hidden = [item.hidden for item in caught]
    inputs: dict[int, list[list[Tensor]]] = {}
    for number, (block, span) in enumerate(spans):
        inputs[number] = [[] for _ in caught]
        with task.stage.block(block) as module, torch.no_grad(), repeatable(task.stage.device):
            for index, item in enumerate(caught):
                for call in span:
                    inputs[number][index].append(hidden[index])
                    # A copy goes in: what is kept must not change if the block works in place.
                    hidden[index] = item.calls[call].run(module, hidden[index].clone())
        if number < stop:
            del inputs[number]
        task.listener.step(f"forward {block}")
    return inputs, hidden


def _at_head(task: GradientTask, way: Way, batch: Batch, hidden: Tensor) -> Tensor:
    """dL/dh of the last hidden states of one sequence."""
    leaf = hidden.detach().requires_grad_()
    with torch.enable_grad(), repeatable(task.stage.device):
        finished = Finished(way.stack.blocks, way.calls, way.catcher.as_tuple, [leaf.clone()])
        (gradient,) = torch.autograd.grad(sequence_loss(task, batch, [finished]), [leaf])
    return gradient


def _backward(
    module: nn.Module,
    block: str,
    calls: Sequence[Call],
    inputs: Sequence[Tensor],
    flowing: Tensor,
    layers: Layers,
    sums: Sums,
) -> Tensor:
    """Add the squares of one sequence's gradients to `sums`; returns the gradient of what entered the block.

    The gradients of several calls of one block (shared weights) are added before they are squared.
    """
    weights = weights_of(module, block, layers)
    totals: dict[str, Tensor] = {}
    for call, entering in zip(reversed(calls), reversed(inputs), strict=True):
        leaf = entering.detach().requires_grad_()
        with torch.enable_grad(), repeatable(leaf.device):
            out = call.run(module, leaf.clone())
            found = torch.autograd.grad(out, [leaf, *weights.values()], flowing, allow_unused=True)
        flowing = torch.zeros_like(leaf) if found[0] is None else found[0]
        for name, gradient in zip(weights, found[1:], strict=True):
            if gradient is not None:
                totals[name] = totals[name] + gradient if name in totals else gradient
    for name, gradient in totals.items():
        add_square(sums, layers[name], gradient)
    return flowing
