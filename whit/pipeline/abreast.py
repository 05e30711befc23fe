"""Layers compressed side by side on a GPU: one thread and one stream each, since a single layer leaves it idle.

Launching the many small steps of a layer takes a processor longer than the device needs for them. What a layer becomes
does not depend on its neighbours: every thread does what it would do alone, in the same order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import lru_cache
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import torch

Result = TypeVar("Result")

ABREAST = 2
#: Weights of a layer up to which another is compressed beside it; a larger one occupies a device, and its memory.
MOST_WEIGHTS = 2**26


class Abreast(Generic[Result]):
    """Runs jobs on a device, small ones `ABREAST` at a time; on a CPU, and large ones, one by one and at once.

    Whoever submits a job is handed its result, in the order of submission, at a later call or when the context is left.
    A job that fails says so there; results of jobs after it are dropped.

    Args:
        device: of the jobs' tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: ThreadPoolExecutor | None = None
        self._queue: deque[tuple[Future[Any] | None, Callable[[Any], None]]] = deque()
        self._streams: SimpleQueue[torch.cuda.Stream] = SimpleQueue()

    def submit(self, weights: int, job: Callable[[], Result], finished: Callable[[Result], None]) -> None:
        """Hand over a job of a layer with so many weights; `finished` gets what it returns."""
        if self._device.type != "cuda" or weights > MOST_WEIGHTS or ABREAST < 2:
            self._hand_out(0)
            finished(job())
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(max_workers=ABREAST, thread_name_prefix="whit-layer")
            for stream in _streams(self._device, ABREAST):
                self._streams.put(stream)
        self._hand_out(ABREAST)  # one may wait for its turn, not all of them: what they need is held
        ready = torch.cuda.current_stream(self._device).record_event()
        self._queue.append((self._pool.submit(self._run, job, ready), finished))

    def after(self, action: Callable[[], None]) -> None:
        """Do something once every job so far is done."""
        self._queue.append((None, lambda _: action()))
        self._hand_out(len(self._queue))

    def _hand_out(self, most: int) -> None:
        """Results of the first jobs, as far as they are done; wait until at most so many jobs run or wait."""
        while True:
            while self._queue and (self._queue[0][0] is None or self._queue[0][0].done()):
                future, finished = self._queue.popleft()
                finished(None if future is None else future.result())
            running = [future for future, _ in self._queue if future is not None and not future.done()]
            if len(running) <= most and (most or not self._queue):
                return
            wait(running, return_when=FIRST_COMPLETED)

    def _run(self, job: Callable[[], Result], ready: torch.cuda.Event) -> Result:
        # All that the job made, and took from other streams, is done with when it returns: no stream need wait for it.
        stream = self._streams.get()
        try:
            with torch.cuda.device(self._device), torch.cuda.stream(stream):
                ready.wait(stream)
                try:
                    return job()
                finally:
                    stream.synchronize()
        finally:
            self._streams.put(stream)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._hand_out(0)
        finally:
            if self._pool is not None:
                self._pool.shutdown(cancel_futures=True)


@lru_cache(maxsize=8)
def _streams(device: torch.device, count: int) -> tuple[torch.cuda.Stream, ...]:
    """The streams of a device, always the same: memory once used by one is kept for it."""
    return tuple(torch.cuda.Stream(device) for _ in range(count))  # type: ignore[no-untyped-call]
