"""Lists of compiled steps: building them in memory, and running them with the threads that torch may use."""

from __future__ import annotations

import ctypes
import struct
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from whit.kernels.cpu.compiling import address_of, pool

MOST_THREADS = 16
"""Threads that work on one program: more have too little to do, and look at the number of who is next all the time."""
Argument = int | float | Tensor | None


@dataclass(frozen=True)
class Step:
    """A compiled function over `items`, `length` of them in a part.

    Attributes:
        function: module in this folder and name of the function, as "decode.level_rows".
        arguments: integers, float64, tensors (their addresses; they must stay where they are), None for address 0.
    """

    function: str
    arguments: tuple[Argument, ...]
    items: int = 1
    length: int = 1

    @property
    def parts(self) -> int:
        """Number of parts."""
        return -(-self.items // self.length)


@dataclass(frozen=True)
class Phase:
    """Steps that do not depend on each other; or, if `together`, a chain of small ones that one thread runs."""

    steps: Sequence[Step]
    together: bool = False


def call(function: str, words: Sequence[int], start: int, stop: int) -> None:
    """A range of items of one step, by the caller. Other threads of Python go on meanwhile.

    Args:
        words: its arguments, addresses instead of tensors.
    """
    held = array("q", words)  # alive until the call returns
    _callable(function)(held.buffer_info()[0], start, stop)


@lru_cache(maxsize=64)
def _callable(function: str) -> Callable[[int, int, int], None]:
    kind = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
    return kind(address_of(function))


class Program:
    """Phases to be run again and again, over the same tensors."""

    def __init__(self, phases: Sequence[Phase]) -> None:
        from whit.kernels.cpu import team  # imports numba, which takes a second

        self._kept = [phase for phase in phases if any(step.parts for step in phase.steps)]
        rows: list[list[int]] = []
        steps: list[list[int]] = []
        for phase in self._kept:
            parts = 1 if phase.together else sum(step.parts for step in phase.steps)
            rows.append([len(steps), len(phase.steps), parts, int(phase.together)])
            steps += [_words(step, team.STEP_WORDS) for step in phase.steps]
        rows.append([0, 0, 0, 0])
        self._phases = torch.tensor(rows, dtype=torch.int64)
        self._steps = torch.tensor(steps, dtype=torch.int64)
        self._control = torch.zeros(team.CONTROL_WORDS, dtype=torch.int64)
        self._begin, self._work = team.begin, team.work
        self._runs = 0

    def run(self) -> None:
        """One pass over all phases."""
        count = len(self._kept)
        first = self._runs * (count + 1)
        self._runs += 1
        places = (self._phases.data_ptr(), self._steps.data_ptr(), self._control.data_ptr(), count, first + count)
        # Late helpers of the run before may still look at the number: it only ever grows.
        self._begin(self._control.data_ptr(), first)
        threads = min(torch.get_num_threads(), MOST_THREADS)
        helpers = [pool(torch.get_num_threads()).submit(self._help, places) for _ in range(threads - 1)]
        self._work(*places)
        for helper in helpers:
            helper.cancel()

    def _help(self, places: tuple[int, ...]) -> None:
        """Work beside the caller, who does not wait: as a method, so that the tensors live as long as this runs."""
        self._work(*places)


def _words(step: Step, size: int) -> list[int]:
    arguments = [_word(item) for item in step.arguments]
    words = [address_of(step.function), step.parts, step.length, step.items, *arguments]
    if len(words) > size:
        raise ValueError(f"{step.function} has {len(arguments)} arguments, {size - 4} are possible")
    return words + [0] * (size - len(words))


def _word(argument: Argument) -> int:
    if argument is None:
        return 0
    if isinstance(argument, Tensor):
        if not argument.is_contiguous():
            raise ValueError("a step reads tensors by their addresses, which must be contiguous")
        return argument.data_ptr()
    if isinstance(argument, float):
        return int(struct.unpack("<q", struct.pack("<d", argument))[0])
    return argument
