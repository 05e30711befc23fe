"""Gradients of layers that round their inputs: as if nothing had been rounded (the straight-through estimator)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Run = Callable[[Tensor, Tensor | None], Tensor]


def straight_through(run: Run, weight: Callable[[], Tensor], inputs: Tensor, bias: Tensor | None) -> Tensor:
    """`run(inputs, bias)`; in training, gradients pass as through y = x W^T + b with the unpacked weight.

    Rounding has the derivative zero almost everywhere, so adapters in front of such a layer would never learn
    (Bengio, Léonard, Courville, "Estimating or Propagating Gradients Through Stochastic Neurons", arXiv 1308.3432).

    Args:
        run: (..., columns) and bias (rows,) or None -> (..., rows).
        weight: () -> float (rows, columns); only called in the backward pass.
    """
    learning = inputs.requires_grad or (bias is not None and bias.requires_grad)
    if not (learning and torch.is_grad_enabled()):
        return run(inputs, bias)
    out: Tensor = _StraightThrough.apply(run, weight, inputs, bias)  # type: ignore[no-untyped-call]
    return out


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Run, weight: Callable[[], Tensor], inputs: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        ctx.bias_dtype = None if bias is None else bias.dtype
        return run(inputs, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        to_inputs = gradient @ ctx.weight().to(gradient.dtype) if ctx.needs_input_grad[2] else None
        to_bias = (
            gradient.reshape(-1, gradient.shape[-1]).sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[3] else None
        )
        return None, None, to_inputs, to_bias
