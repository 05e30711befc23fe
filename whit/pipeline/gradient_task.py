"""What both forms of the gradient pass share: the task, the loss of one sequence, squares and their sums."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from whit.errors import ModelError
from whit.methods.base import Method
from whit.methods.statistics import Statistic
from whit.pipeline.assign import AssignedLayer, Assignment
from whit.pipeline.catch import Finished, answer_of
from whit.pipeline.events import Listener
from whit.pipeline.gradient_store import GradientStore
from whit.pipeline.loss import loss_labels, loss_of, without_gradients
from whit.pipeline.stage import Batch, Stage

PHASE = "gradients"
# Share of the free memory that the hidden states between blocks may take.
BOUNDARY_SHARE = 0.25

Layers = dict[str, AssignedLayer]
Sums = dict[str, Tensor]


@dataclass(frozen=True)
class GradientTask:
    """What the pass works on.

    Attributes:
        stage: computes in float32.
        sequences: inputs of single sequences, on CPU.
        layers: those that need gradients, by block.
        store: where the sums go.
    """

    stage: Stage
    sequences: Sequence[Batch]
    layers: dict[str, Layers]
    store: GradientStore
    listener: Listener


def needs_gradient(method: Method) -> bool:
    """Whether the method, or how it divides its budget, asks for gradients."""
    return Statistic.GRADIENT in method.required() | method.survey_required()


def gradient_layers(assignment: Assignment) -> dict[str, Layers]:
    """Layers in blocks whose methods ask for gradients: block -> name -> layer."""
    out: dict[str, Layers] = {}
    for name, layer in assignment.layers.items():
        if layer.block and needs_gradient(layer.method):
            out.setdefault(layer.block, {})[name] = layer
    return out


def single_sequences(batches: Sequence[Batch]) -> list[Batch]:
    """Batches taken apart into inputs with a leading dimension of 1."""
    return [
        {key: value[row : row + 1] for key, value in batch.items()}
        for batch in batches
        for row in range(len(next(iter(batch.values()))))
    ]


def sequence_loss(task: GradientTask, batch: Batch, finished: Sequence[Finished]) -> Tensor:
    """The loss of one sequence, a scalar with its graph; finished stacks are replayed.

    Raises:
        ModelError: it is NaN or Inf.
    """
    model = task.stage.model
    answer = answer_of(model, {**batch, "labels": loss_labels(model, batch)}, finished, 0)
    loss = loss_of(answer)
    if not bool(torch.isfinite(loss)):
        raise ModelError(
            f"the loss of a calibration sequence is {float(loss.detach())}: give sequences of at least two tokens, "
            f"check the model's weights, or {without_gradients()}"
        )
    return loss


def weights_of(module: nn.Module, block: str, layers: Layers) -> dict[str, nn.Parameter]:
    """The stored weights of a block's layers, by full module name."""
    out = {}
    for name in layers:
        weight = module.get_submodule(name.removeprefix(block + ".")).weight
        assert isinstance(weight, nn.Parameter)
        weight.requires_grad_()
        out[name] = weight
    return out


def add_square(sums: Sums, layer: AssignedLayer, gradient: Tensor) -> None:
    """Add the squares of one sequence's gradient, in the shape of the stored weight, to the sums of its layer."""
    matrix = layer.kind.matrix(gradient.detach())
    if layer.name not in sums:
        sums[layer.name] = torch.zeros(layer.rows, layer.columns, device=matrix.device)
    sums[layer.name] += matrix.float().square()


def repeatable(device: torch.device) -> AbstractContextManager[None]:
    """The fused attention kernels of CUDA add up their gradients in changing order; the plain one does not."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cuda" else nullcontext()


def refuse_zero(sums: Sums) -> None:
    """Refuse layers that took part in forward passes but never got a gradient.

    Raises:
        ModelError: says which layer.
    """
    for name, value in sums.items():
        if not bool(value.any()):
            raise ModelError(
                f"the gradient of the loss with respect to {name!r} is zero for every calibration sequence: give more "
                f"calibration text, or {without_gradients()}"
            )
