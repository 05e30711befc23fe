"""Work handed to a thread is done in order, and its failures are not lost."""

from __future__ import annotations

import threading

import pytest
import torch

from whit.pipeline.background import InOrder
from whit.pipeline.prepare import BATCH_BYTES, LARGEST_BATCH, batch_size_for


def test_jobs_are_done_in_order_by_another_thread() -> None:
    done: list[int] = []
    threads = set()
    with InOrder() as writer:
        for number in range(5):
            writer.submit(lambda number=number: (done.append(number), threads.add(threading.current_thread().name))[0])
        writer.wait()
        assert done == [0, 1, 2, 3, 4]
    assert threading.current_thread().name not in threads


def test_leaving_waits_even_after_an_error() -> None:
    done: list[int] = []
    gate = threading.Event()
    with pytest.raises(KeyboardInterrupt), InOrder() as writer:
        writer.submit(lambda: (gate.wait(10), done.append(1))[1])
        gate.set()
        raise KeyboardInterrupt
    assert done == [1]


def test_a_failure_is_raised_and_later_jobs_are_not_run() -> None:
    done: list[int] = []

    def fail() -> None:
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"), InOrder() as writer:
        writer.submit(fail)
        writer.submit(lambda: done.append(1))
        writer.wait()
    assert done == []


def test_the_batch_size_follows_from_the_device_and_the_size_of_a_sequence() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert batch_size_for(cpu, BATCH_BYTES["cpu"] // 11, 64) == 8
    assert batch_size_for(torch.device("mps"), 1, 64) == 1
    assert batch_size_for(cuda, 1, 10_000) == LARGEST_BATCH
    assert batch_size_for(cuda, BATCH_BYTES["cuda"] // 11, 128) == 8
    assert batch_size_for(cuda, 2 * BATCH_BYTES["cuda"], 128) == 1


def test_eight_processes_have_a_batch_each() -> None:
    assert batch_size_for(torch.device("cuda"), 1, 128) == 16
    assert batch_size_for(torch.device("cuda"), 1, 127) == 8
    assert batch_size_for(torch.device("cuda"), 1, 7) == 1
