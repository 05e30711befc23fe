"""Small modules with repeated blocks that no library has, for what the pipeline must refuse or survive."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

WIDTH = 8


class Block(nn.Module):
    """A residual block of two layers with a shared input; returns a tensor or a tuple."""

    def __init__(self, as_tuple: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 12, bias=False)
        self.up = nn.Linear(WIDTH, 12, bias=False)
        self.down = nn.Linear(12, WIDTH, bias=False)
        self.as_tuple = as_tuple

    def forward(self, hidden: Tensor, scale: Tensor | None = None) -> Tensor | tuple[Tensor, None]:
        inner = torch.tanh(self.gate(hidden)) * self.up(hidden)
        out = hidden + self.down(inner) * (1 if scale is None else scale)
        return (out, None) if self.as_tuple else out


class Parent(nn.Module):
    """Runs its blocks in turn, with something in between."""

    def __init__(
        self, blocks: int = 3, as_tuple: bool = False, between: Callable[[int, Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(as_tuple) for _ in range(blocks)])
        self.between = between or (lambda _, hidden: hidden)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(x)
        for index, layer in enumerate(self.layers):
            hidden = self.between(index, hidden)
            out = layer(hidden, scale=torch.tensor(1.0 + index))
            hidden = out[0] if layer.as_tuple else out
        return hidden.mul_(2)  # in place, as some final norms do
