"""Time of short calls on a GPU: a CUDA graph of many, between device events."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

LEAST_CALLS = 24
"""Of a graph: its own start and end take 6 to 8 µs on an H200, which are no part of a call in a stream of calls."""


def seconds_per_call(calls: Sequence[Callable[[], Any]], replays: int = 20) -> tuple[float, float]:
    """Median time of one call and its spread (width of the middle half), from replays of a graph that makes them all.

    Calls that read weights of their own, together larger than twice the L2 cache, are timed as they run in a model:
    from memory. Each is made once before it is recorded, and all are recorded as often as makes `LEAST_CALLS`.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())  # what the calls read may still be being written there
    with torch.cuda.stream(stream):
        for call in calls:  # each may keep something of its own
            call()
    torch.cuda.synchronize()
    rounds = -(-LEAST_CALLS // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            outputs = [call() for call in calls]
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3 / (rounds * len(calls)))
    del outputs
    times.sort()
    return statistics.median(times), times[replays * 3 // 4] - times[replays // 4]


def copies_for(weight_bytes: int, cache_bytes: int, result_bytes: int = 0, most: int = 200) -> int:
    """Copies of a weight that together exceed twice the cache: at least two, fewer where results would fill memory."""
    wanted = -(-2 * cache_bytes // max(1, weight_bytes))
    return max(2, min(wanted, most, (1 << 33) // max(1, result_bytes)))
