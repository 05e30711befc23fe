"""Statistics summed by several processes in the order of one.

Sums of floating-point numbers depend on their order, so adding up partial sums of the processes would not give the
bytes of a single one. Instead every process runs a stretch of neighbouring batches through the block, the first one
accumulating as it goes, the others keeping what their layers receive. Then the sums are handed on: each process
continues those of the one before it with its own inputs, and the last one's are everybody's. Running the block, the
dear part, is divided; the sums, a small part on tensor cores, are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from whit.pipeline.ranks import Ranks


class Accumulator(Protocol):
    """Sums over inputs that can be carried on elsewhere."""

    def update(self, x: Tensor, parts: int = 1) -> None:
        """Add inputs, one of so many parts of a call."""

    def state(self) -> tuple[dict[str, int], list[Tensor]]:
        """What has been summed up so far: numbers, and contiguous tensors."""

    def restore(self, numbers: dict[str, int], tensors: Sequence[Tensor]) -> None:
        """Go on from the state of another process."""


class Relay:
    """The inputs that this process saw, and the sums that are handed on.

    Args:
        ranks: the processes, with neighbouring stretches of batches in the order of their numbers.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._accumulators: Sequence[Accumulator] = ()
        self._kept: list[tuple[int, Tensor, int]] = []

    @property
    def ranks(self) -> Ranks:
        """The processes."""
        return self._ranks

    def connect(self, accumulators: Sequence[Accumulator]) -> None:
        """Where inputs go: one accumulator per group of layers, the same groups in every process."""
        self._accumulators = accumulators

    def record(self, group: int, inputs: Tensor, parts: int) -> None:
        """Inputs of a group of layers."""
        # Products of one layout everywhere: another one may be summed in another order.
        if self._ranks.first:
            self._accumulators[group].update(inputs.contiguous(), parts)
        else:  # the block may go on to change them
            self._kept.append((group, inputs.clone(memory_format=torch.contiguous_format), parts))

    def finish(self) -> None:
        """Hand the sums on from process to process; afterwards all have those of all inputs. All must call it."""
        if self._ranks.count == 1:
            return
        for rank in range(self._ranks.count):
            mine = rank == self._ranks.rank
            if mine:
                for group, inputs, parts in self._kept:
                    self._accumulators[group].update(inputs, parts)
                self._kept.clear()
            states = [accumulator.state() for accumulator in self._accumulators] if mine else []
            told = self._ranks.gather([(numbers, [_spec(t) for t in tensors]) for numbers, tensors in states])[rank]
            for index, (numbers, specs) in enumerate(told):
                with self._ranks.together():
                    tensors = states[index][1] if mine else [self._empty(*spec) for spec in specs]
                for tensor in tensors:
                    self._ranks.broadcast(tensor, rank)
                if not mine:
                    self._accumulators[index].restore(numbers, tensors)

    def _empty(self, shape: list[int], dtype: str) -> Tensor:
        return torch.empty(shape, dtype=getattr(torch, dtype), device=self._ranks.device)


def _spec(tensor: Tensor) -> tuple[Any, ...]:
    return list(tensor.shape), str(tensor.dtype).removeprefix("torch.")
