"""Compiling loops for the CPU with numba, and sharing them out among torch's number of threads."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import torch


@lru_cache(maxsize=1)
def numba_works() -> bool:
    """Whether numba is installed and can be imported (it refuses versions of NumPy that it does not know)."""
    try:
        import numba  # noqa: F401
    except ImportError:
        return False
    return True


def runs_compiled(tensor: torch.Tensor) -> bool:
    """Whether a compiled loop can take this tensor: real values on a CPU, and torch is not tracing."""
    return tensor.device.type == "cpu" and numba_works() and not torch.compiler.is_compiling()


def compiled(function: Callable[..., None]) -> Callable[..., None]:
    """A loop compiled at its first call, kept on disk where a place can be written; it runs beside Python's lock.

    Products and sums may be contracted into one rounding; nothing is reordered.
    """
    from numba import njit

    from whit.kernels.cpu.cache import cached

    options: dict[str, Any] = {"nogil": True, "fastmath": {"contract"}, "error_model": "numpy"}
    made: Callable[..., None] = cached(njit(**options)(function), function)
    return made


def address_of(name: str) -> int:
    """The address of a step, "module.function" of this folder, compiled at its first use like other loops.

    A step is called with the address of its arguments (64-bit words) and a range of items, and never raises.
    """
    return int(_step(name).address)


@lru_cache(maxsize=64)
def _step(name: str) -> Any:
    from numba import types
    from numba.core.ccallback import CFunc

    from whit.kernels.cpu.cache import cached

    module, _, function = name.rpartition(".")
    body = getattr(importlib.import_module(f"{__package__}.{module}"), function)
    signature = (types.int64, types.int64, types.int64), types.void
    options: dict[str, Any] = {"fastmath": {"contract"}, "error_model": "numpy"}
    made = cached(CFunc(body, signature, locals={}, options=options), body)
    made.compile()
    return made


def shared_out(call: Callable[[int, int], None], count: int, step: int) -> None:
    """Run `call(first, last)` for parts of `count`, multiples of `step` long, on as many threads as torch uses.

    The caller waits, so torch's own threads are idle meanwhile: no more threads work than torch was allowed.
    """
    threads = torch.get_num_threads()
    length = max(step, -(-count // (threads * step)) * step)
    parts = [(first, min(first + length, count)) for first in range(0, count, length)]
    if len(parts) < 2:
        for part in parts:
            call(*part)
        return
    others = [(part, pool(threads).submit(call, *part)) for part in parts[1:]]
    try:
        call(*parts[0])
        for part, other in others:
            if other.cancel():  # no thread has come to it yet: sooner done than waited for
                call(*part)
    finally:
        for _, other in others:
            if not other.cancel():
                other.result()


@lru_cache(maxsize=1)
def pool(threads: int) -> ThreadPoolExecutor:
    """Threads that wait for work."""
    return ThreadPoolExecutor(threads, thread_name_prefix="whit-kernel")
