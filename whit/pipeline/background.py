"""Work handed to one thread, in order: a finished unit is written while its outputs are computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self


class InOrder:
    """Runs jobs one after the other on a thread. Leaving the context waits for all of them, whatever happened inside.

    A job that fails says so at the next `wait`, or at the end of the context; jobs after it are not run.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="whit-write")
        self._waiting: deque[Future[None]] = deque()
        self._failed = False

    def submit(self, job: Callable[[], None]) -> None:
        """Hand a job over."""
        self._waiting.append(self._pool.submit(self._run, job))

    def wait(self) -> None:
        """Until every job is done."""
        while self._waiting:
            self._waiting.popleft().result()

    def _run(self, job: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            job()
        except BaseException:
            self._failed = True
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.wait()
        finally:
            self._pool.shutdown()
