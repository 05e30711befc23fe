"""Is there room? Refusals before any work, as pure functions of numbers."""

from __future__ import annotations

import shutil
from pathlib import Path

import psutil

from whit.errors import ResourceError
from whit.pipeline.events import Plan

# Estimates of memory are upper bounds for the most part: a run is refused only when they are missed by a margin.
MEMORY_MARGIN = 0.8


def check_resources(output: Path, plan: Plan, stored_bytes: int = 0) -> None:
    """Measure this machine and refuse a run that cannot end well.

    Args:
        output: directory of the run, which need not exist.
        plan: of the run.
        stored_bytes: what an interrupted run has already stored there.

    Raises:
        ResourceError: says how much is needed and how much there is.
    """
    place = output.absolute()
    while not place.exists():
        place = place.parent
    check_disk(
        str(output), disk_bytes(plan.file_bytes) + plan.working_bytes - stored_bytes, shutil.disk_usage(place).free
    )
    available = psutil.virtual_memory().available + psutil.Process().memory_info().rss
    check_memory(plan.host_bytes, available)


def disk_bytes(file_bytes: int) -> int:
    """Most disk a run takes: shards and final files side by side, tokenizer and reports."""
    return int(2.1 * file_bytes) + (8 << 20)


def check_disk(output: str, needed: int, free: int) -> None:
    """Refuse if the disk of `output` lacks room (bytes).

    Raises:
        ResourceError: `needed` is more than `free`.
    """
    if free < needed:
        raise ResourceError(
            f"{output!r} needs {needed / 1e6:,.0f} MB of disk (shards and final file), {free / 1e6:,.0f} MB are "
            "free: free some, or choose another disk with -o"
        )


def check_memory(needed: int, available: int) -> None:
    """Refuse if host memory (bytes) is clearly too small.

    Raises:
        ResourceError: `available` is less than `MEMORY_MARGIN` times `needed`.
    """
    if available < MEMORY_MARGIN * needed:
        raise ResourceError(
            f"the run needs about {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are available: "
            "lower --samples, --sequence-length or --window, or use a larger machine"
        )
