"""Weights on and off the stage: what a pass over the model loads, in its own dtype, and frees again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from whit.heap import return_freed_memory
from whit.models.outside import materialise_outside, release_outside
from whit.models.skeleton import materialise, release
from whit.models.source import TensorSource
from whit.models.stacks import Stack
from whit.pipeline.catch import CallCatcher, Finished

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Stage:
    """A skeleton, where its weights come from, and the dtype and device they are computed with.

    Attributes:
        stacks: all stacks of blocks of the model.
    """

    model: nn.Module
    source: TensorSource
    stacks: Sequence[Stack]
    dtype: torch.dtype
    device: torch.device

    @property
    def blocks(self) -> list[str]:
        """Names of all blocks."""
        return [block for stack in self.stacks for block in stack.blocks]

    def after(self, block: str) -> str | None:
        """The block that comes after one, None after the last."""
        place = self.blocks.index(block) + 1
        return self.blocks[place] if place < len(self.blocks) else None

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Everything that lies in no block is loaded inside the context."""
        materialise_outside(self.model, self.blocks, self.source, self.dtype, self.device)
        try:
            yield
        finally:
            release_outside(self.model, self.blocks)

    @contextmanager
    def block(self, name: str) -> Iterator[nn.Module]:
        """One block, loaded inside the context."""
        materialise(self.model, name, self.source, self.dtype, self.device)
        try:
            yield self.model.get_submodule(name)
        finally:
            release(self.model, name)
            return_freed_memory()

    def cast(self, batch: Mapping[str, Tensor]) -> Batch:
        """Inputs on the device, floating-point ones (audio features, pixels) in the dtype of the computation."""
        return {
            key: value.to(self.device, self.dtype if value.is_floating_point() else value.dtype)
            for key, value in batch.items()
        }

    def enter(
        self,
        stack: Stack,
        batch: Batch,
        finished: Sequence[Finished] = (),
        later: Sequence[str] = (),
    ) -> CallCatcher | None:
        """A catcher for a stack, once it is known whether its blocks return tuples (learnt by running one).

        None if `batch`, cast already, never reaches the stack (the vision part of a model that is given text only).
        What lies outside the blocks must be loaded.
        """
        probe = CallCatcher(self.model, stack.blocks, as_tuple=False, finished=finished, later=later)
        first = probe.first_call(batch)
        if first is None:
            return None
        with self.block(first.calls[0].block) as block:
            as_tuple = first.calls[0].returns_tuple(block, first.hidden)
        return CallCatcher(self.model, stack.blocks, as_tuple=as_tuple, finished=finished, later=later)
