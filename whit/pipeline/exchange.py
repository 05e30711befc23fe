"""Inputs of layers shared among processes, so that statistics are summed in one order whatever their number.

Sums of floating-point numbers depend on their order, so partial sums of the processes would not give the bytes of a
single one. Therefore not sums are exchanged but inputs: process r runs every batch number r, r + n, r + 2n, ... of n
processes through the block; after each turn all see each other's layer inputs, and accumulate them in the order of
the batches. Second moments, the dear part, are divided: each panel of H belongs to one process (`SecondMoment`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from whit.pipeline.ranks import Ranks

Update = Callable[[Tensor, int], None]


class Exchange:
    """Inputs that layers received since the last turn."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._updates: Sequence[Update] = ()
        self._recorded: list[tuple[int, Tensor, int]] = []

    def connect(self, updates: Sequence[Update]) -> None:
        """Where inputs go: one function of (inputs, parts of a call) per group of layers."""
        self._updates = updates

    def record(self, group: int, inputs: Tensor, parts: int) -> None:
        """Inputs of a group; kept until the turn if there are other processes."""
        if self.ranks.count == 1:
            self._updates[group](inputs, parts)
        else:
            self._recorded.append((group, inputs, parts))

    def turn(self) -> None:
        """Accumulate what every process recorded, in the order of their numbers. All must call it alike."""
        if self.ranks.count == 1:
            return
        mine = [
            (group, list(x.shape), str(x.dtype).removeprefix("torch."), parts) for group, x, parts in self._recorded
        ]
        for rank, items in enumerate(self.ranks.gather(mine)):
            for place, (group, shape, dtype, parts) in enumerate(items):
                if rank == self.ranks.rank:
                    inputs = self._recorded[place][1].contiguous()
                else:
                    inputs = torch.empty(shape, dtype=getattr(torch, dtype), device=self.ranks.device)
                self.ranks.broadcast(inputs, rank)
                self._updates[group](inputs, parts)
        self._recorded.clear()
