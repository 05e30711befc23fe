"""numba's cache of compiled loops on disk, with a checksum: what is damaged there is compiled again and replaced.

numba compiles a function anew when the file changes that it stands in, but not when one does that holds functions it
calls: so the names of what is kept hold a sum of all the sources here. An interrupted write or a full disk leaves files
that numba cannot read, and code that was changed would be run as it is. Both are treated as if nothing had been kept; a
place that cannot be written only costs the next process time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from numba.core.caching import CompileResultCacheImpl, FunctionCache


@lru_cache(maxsize=1)
def sources_sum() -> str:
    """A sum of all files of this folder: what is compiled here is made of nothing else."""
    sums = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        sums.update(hashlib.sha256(path.read_bytes()).digest())
    return sums.hexdigest()[:16]


class _SealedEntries(CompileResultCacheImpl):  # type: ignore[misc]
    """Entries of (checksum of the machine code, what numba keeps), in files named apart from numba's own."""

    def get_filename_base(self, fullname: str, abiflags: str) -> str:
        """Name of the files of a function."""
        return f"sealed-{sources_sum()}-{super().get_filename_base(fullname, abiflags)}"

    def reduce(self, data: Any) -> tuple[bytes, Any]:
        """What is kept of a compiled function."""
        kept = super().reduce(data)
        return _checksum(kept[0]), kept

    def rebuild(self, target_context: Any, payload: tuple[bytes, Any]) -> Any:
        """The compiled function. Raises: ValueError: the code is not what was kept."""
        checksum, kept = payload
        if checksum != _checksum(kept[0]):
            raise ValueError("the checksum differs")
        return super().rebuild(target_context, kept)


class SealedCache(FunctionCache):  # type: ignore[misc]
    """The cache of one function. Raises: RuntimeError: there is no folder that can be written."""

    _impl_class = _SealedEntries

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The compiled function for a signature, None if there is none or its files are damaged."""
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # reading damaged files can raise anything
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep a compiled function, if possible."""
        try:
            super().save_overload(sig, data)
        except Exception:  # as above: the list of what is kept is read before it is written
            with suppress(Exception):
                self.flush()
                super().save_overload(sig, data)


def _checksum(library: Iterable[Any]) -> bytes:
    """Of all bytes in nested tuples of a library: its machine code, and the code for linking."""
    sums = hashlib.sha256()
    for part in library:
        if isinstance(part, tuple):
            sums.update(_checksum(part))
        elif isinstance(part, bytes):
            sums.update(hashlib.sha256(part).digest())
    return sums.digest()


def cached(compiling: Any, function: Callable[..., None]) -> Any:
    """numba's object that compiles `function` (a dispatcher or a callback), with such a cache where one can be kept."""
    with suppress(RuntimeError):  # neither the package's folder nor the user's cache can be written
        compiling._cache = SealedCache(function)  # what its `enable_caching` does
    return compiling
