"""One thread for all tests: tiny models lose time to threads, and the thread count is part of a run's identity."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[int]:
    """Yields the number of threads there were before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield threads
    torch.set_num_threads(threads)
