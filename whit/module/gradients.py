"""Gradients of the user's loss with respect to the weights of a module in memory, sample by sample.

    G = sqrt( sum_i (dL_i / dW)^2 ),    L_i the loss of sample i alone

the statistic that pruning metrics with gradients use; squares are summed in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from whit.errors import DataError, ModelError
from whit.finite import all_finite
from whit.module.calibration import Feed, tensors_of
from whit.pipeline.assign import AssignedLayer

Loss = Callable[[Any, Any], Tensor]


def loss_gradients(
    module: nn.Module, layers: Mapping[str, AssignedLayer], feed: Feed, loss: Loss
) -> tuple[dict[str, Tensor], list[str]]:
    """G of each layer, float32 (rows, columns); and the names of layers that the loss does not depend on.

    An item whose tensors all have the same leading dimension is taken apart into its samples, as (inputs, labels) of a
    batch are; any other item is one sample.

    Args:
        loss: (answer of the module, item on the device) -> scalar.

    Raises:
        DataError: the loss is no scalar Tensor, or does not depend on the module.
        ModelError: a gradient is zero throughout or holds NaN or Inf.
    """
    weights = {name: module.get_parameter(f"{name}.weight") for name in layers}
    frozen = [weight for weight in weights.values() if not weight.requires_grad]
    sums: dict[str, Tensor] = {}
    try:
        for weight in frozen:
            weight.requires_grad_(True)
        with torch.enable_grad():
            for index in range(len(feed.items)):
                for sample in samples_of(feed.on_device(index)):
                    value = _scalar(loss(feed.answer(module, index, sample), sample), index)
                    found = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
                    for name, gradient in zip(weights, found, strict=True):
                        if gradient is not None:
                            squares = layers[name].kind.matrix(gradient.detach().float()).square()
                            sums[name] = sums[name].add_(squares) if name in sums else squares.contiguous()
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
    return {name: _checked(name, total.sqrt_()) for name, total in sums.items()}, [
        name for name in layers if name not in sums
    ]


def samples_of(item: Any) -> Iterator[Any]:
    """The samples of a batch, each with a leading dimension of 1; or the item itself if it is no batch."""
    sizes = {tensor.shape[0] if tensor.dim() else 0 for tensor in tensors_of(item)}
    size = sizes.pop() if len(sizes) == 1 else 0
    if size <= 1:
        yield item
        return
    for index in range(size):
        yield _slice(item, index)


def _slice(value: Any, index: int) -> Any:
    if isinstance(value, Tensor):
        return value[index : index + 1]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_slice(part, index) for part in value))
    if isinstance(value, tuple | list):
        return type(value)(_slice(part, index) for part in value)
    if isinstance(value, Mapping):
        return {key: _slice(part, index) for key, part in value.items()}
    return value


def _scalar(value: Any, index: int) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        said = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise DataError(f"loss(output, item) gave {said} for calibration item {index + 1}: return a scalar Tensor")
    if not value.requires_grad:
        raise DataError(
            f"loss(output, item) of calibration item {index + 1} does not depend on the module's weights: compute it "
            "from the output, without detach"
        )
    return value


def _checked(name: str, gradient: Tensor) -> Tensor:
    if not all_finite(gradient):
        raise ModelError(f"the gradient of the loss for {name!r} holds NaN or Inf: check the loss, or use float32")
    if not bool(gradient.any()):
        raise ModelError(f"the gradient of the loss for {name!r} is zero throughout: check the loss, or skip the layer")
    return gradient
