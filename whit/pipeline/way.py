"""How inputs go through the blocks of a model, and whether blocks can be taken in reverse one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from whit.models.stacks import Stack
from whit.pipeline.catch import Call, CallCatcher, Finished
from whit.pipeline.stage import Batch, Stage


@dataclass(frozen=True)
class Way:
    """How inputs go through the only stack they reach.

    Attributes:
        spans: blocks and the range of their calls, in order; each block once.
        hidden_bytes: of the hidden states of one sequence between two blocks.
    """

    stack: Stack
    catcher: CallCatcher
    spans: list[tuple[str, range]]
    hidden_bytes: int

    @property
    def calls(self) -> int:
        """Calls of blocks in one forward pass."""
        return self.spans[-1][1].stop


def find_way(stage: Stage, batch: Batch) -> Way | None:
    """The way of an input if only one stack is reached and no block comes again after another, else None.

    Args:
        stage: what lies outside the blocks is loaded.
        batch: on the stage's device.
    """
    way: Way | None = None
    finished: list[Finished] = []
    for position, stack in enumerate(stage.stacks):
        later = [block for other in stage.stacks[position + 1 :] for block in other.blocks]
        catcher = stage.enter(stack, batch, finished, later)
        if catcher is None:
            continue
        if way is not None:
            return None
        caught = catcher.catch(batch, 0)
        way = Way(stack, catcher, _spans(caught.calls), caught.hidden.nbytes)
        # Its true results do not matter here, only whether another stack is reached after it.
        finished = [Finished(stack.blocks, len(caught.calls), catcher.as_tuple, [caught.hidden])]
    if way is None or len({block for block, _ in way.spans}) < len(way.spans):
        return None
    return way


def _spans(calls: Sequence[Call]) -> list[tuple[str, range]]:
    out = []
    for block, group in groupby(range(len(calls)), key=lambda index: calls[index].block):
        indices = list(group)
        out.append((block, range(indices[0], indices[-1] + 1)))
    return out
