"""The heap of the C library: keeping what was freed for the next call, or giving it back."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

# Parameters of mallopt (glibc's malloc.h), and what they are set to while freed memory is kept, and afterwards.
TRIM_THRESHOLD, MMAP_MAX = -1, -4
KEEPING = {TRIM_THRESHOLD: (1 << 31) - 1, MMAP_MAX: 0}
USUAL = {TRIM_THRESHOLD: 64 << 20, MMAP_MAX: 1 << 16}  # the threshold that glibc's own adjustment ends at


@contextmanager
def freed_memory_kept() -> Iterator[bool]:
    """Within it the process keeps up to 2 GiB of what it frees, whatever the size of a block (glibc).

    Activations and logits are otherwise mapped anew at every call, and every page of them is a fault, which a virtual
    machine can take 10 us for. What was kept is given back at the end.

    Yields:
        whether the C library took the settings.
    """
    set_option = _function("mallopt")
    if set_option is None:
        yield False
        return
    try:
        yield all(set_option(name, value) for name, value in KEEPING.items())
    finally:
        for name, value in USUAL.items():
            set_option(name, value)
        return_freed_memory()


def return_freed_memory() -> None:
    """Hand the free pages of the C library's heap back to the system (glibc; elsewhere nothing happens).

    Tensors of changing sizes, block after block, leave holes in the heap: without this the resident memory of a run
    creeps up by a quarter of each block's weights, although nothing holds them (measured with glibc 2.36).
    """
    trim = _function("malloc_trim")
    if trim is not None:
        trim(0)


@lru_cache(maxsize=2)
def _function(name: str) -> Callable[..., int] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        found: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError):  # another C library (musl)
        return None
    return found
