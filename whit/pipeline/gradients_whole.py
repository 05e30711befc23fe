"""The gradient pass for models whose blocks cannot be taken in reverse one at a time: the whole model is loaded.

That is so for an encoder with its decoder, and for a block that comes again after another. Memory holds the weights and
all sums in float32; one layer's gradient lives at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from whit.models.skeleton import materialise, release
from whit.pipeline.assign import AssignedLayer
from whit.pipeline.gradient_task import (
    PHASE,
    GradientTask,
    Sums,
    add_square,
    refuse_zero,
    repeatable,
    sequence_loss,
    weights_of,
)

# How often the sums are stored.
SNAPSHOTS = 8


def whole_gradients(task: GradientTask) -> None:
    """Fill the store, from where an earlier run left off.

    Raises:
        ModelError: a loss or gradient is NaN or Inf, or zero throughout.
    """
    stage, total = task.stage, len(task.sequences)
    begin = task.store.progress.end
    task.listener.phase(PHASE, total - begin)
    sums = {block: task.store.sums(block, stage.device) for block in task.layers}
    materialise(stage.model, "", stage.source, stage.dtype, stage.device)
    handles = []
    try:
        weights = {}
        for block, layers in task.layers.items():
            for name, weight in weights_of(stage.model.get_submodule(block), block, layers).items():
                weights[name] = weight
                hook = _squaring(sums[block], layers[name])
                handles.append(weight.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]
        step = -(-total // SNAPSHOTS)
        for start in range(begin, total, step):
            end = min(start + step, total)
            for index in range(start, end):
                batch = stage.cast(task.sequences[index])
                with torch.enable_grad(), repeatable(stage.device):
                    torch.autograd.backward(sequence_loss(task, batch, []), inputs=list(weights.values()))
                task.listener.step(f"sequence {index + 1}/{total}")
            if end == total:
                for item in sums.values():
                    refuse_zero(item)
            task.store.write(start, end, sums)
    finally:
        for handle in handles:
            handle.remove()
        release(stage.model, "")


def _squaring(sums: Sums, layer: AssignedLayer) -> Callable[[Tensor], None]:
    def hook(weight: Tensor) -> None:
        assert weight.grad is not None
        add_square(sums, layer, weight.grad)
        weight.grad = None  # one layer's gradient at a time

    return hook
