"""Choosing tokens: the step that is recorded in a CUDA graph, and the loop that replays it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from whit.kernels.decode_ops import choose
from whit.kernels.decode_state import Chosen

CHECK_EVERY = 16
"""Tokens between two looks of the host at whether every sequence has ended."""
RUNS_BEFORE_CAPTURE = 2
"""Steps run as they are before one is recorded: they compile kernels and fill the allocator."""


class Step(Protocol):
    """What computes logits."""

    def logits(self, ids: Tensor) -> Tensor:
        """ids (sequences, 1) -> (sequences, vocabulary)."""
        ...

    def advance(self) -> Tensor | None:
        """Move on by one token; or give the int64 scalar that the choice of this token is to increase for that."""
        ...


class Chooser:
    """Greedy choice without the host: all that it reads and writes are tensors on the device that stay in place.

    Args:
        ids: int64 (sequences, 1), gets the token chosen last.
        new_tokens: how many there will be.
        stops: tokens that end a sequence. pad: what follows then.
    """

    def __init__(self, ids: Tensor, new_tokens: int, stops: Sequence[int], pad: int) -> None:
        device = ids.device
        self._chosen = Chosen(
            ids=ids,
            tokens=torch.full((len(ids), new_tokens), pad, dtype=torch.int64, device=device),
            count=torch.zeros(len(ids), dtype=torch.int64, device=device),
            ended=torch.zeros(len(ids), dtype=torch.int32, device=device),
            stops=torch.tensor(list(stops), dtype=torch.int64, device=device),
            pad=pad,
        )

    @property
    def ids(self) -> Tensor:
        """The token chosen last, int64 (sequences, 1)."""
        return self._chosen.ids

    def take(self, logits: Tensor, place: Tensor | None = None) -> None:
        """Add the most probable token of (sequences, vocabulary) to each sequence; `place` moves on by one."""
        choose(logits, self._chosen, place)

    def all_ended(self) -> bool:
        """Waits for the device."""
        return len(self._chosen.stops) > 0 and bool(self._chosen.ended.all())

    def result(self, taken: int) -> Tensor:
        """(sequences, n): the tokens up to the one with which the last sequence ended, n <= taken."""
        tokens, stops = self._chosen.tokens[:, :taken], self._chosen.stops
        if not len(stops):
            return tokens
        open_until = (tokens[..., None] != stops).all(-1).long().cumprod(-1).sum(-1)
        return tokens[:, : min(taken, int(open_until.max()) + 1)]


def decode(step: Step, chooser: Chooser, new_tokens: int, *, graph: bool) -> tuple[Tensor, bool, str]:
    """Choose tokens after the first, which the chooser holds already.

    Args:
        graph: record the step as a CUDA graph and replay it.

    Returns:
        The chosen tokens, whether they were replayed, and why not although it was asked for ("" otherwise; so few
        tokens that recording is not worth it need no reason).
    """
    taken, reason = 1, ""
    replayed = False
    run: Callable[[], None] = _Once(step, chooser)
    if graph and new_tokens > 1 + RUNS_BEFORE_CAPTURE:
        run, more, reason = record(step, chooser)
        taken, replayed = taken + more, not reason
    while taken < new_tokens:
        if taken % CHECK_EVERY == 0 and chooser.all_ended():
            break
        run()
        taken += 1
    return chooser.result(taken), replayed, reason


@dataclass(frozen=True)
class _Once:
    """One step and its choice."""

    step: Step
    chooser: Chooser

    def __call__(self) -> None:
        logits = self.step.logits(self.chooser.ids)
        self.chooser.take(logits, self.step.advance())


def record(step: Step, chooser: Chooser) -> tuple[Callable[[], None], int, str]:
    """A function that takes one token: the recorded step, or the step itself where it cannot be recorded.

    Returns:
        The function, the number of tokens taken on the way, and why there is no graph ("" if there is).
    """
    device, once = chooser.ids.device, _Once(step, chooser)
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(RUNS_BEFORE_CAPTURE):
            once()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            once()
    except RuntimeError as error:
        torch.cuda.synchronize(device)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return once, RUNS_BEFORE_CAPTURE, f"a step cannot be recorded: {reason}"
    return graph.replay, RUNS_BEFORE_CAPTURE, ""
