"""Files that whit keeps for itself between runs: where they lie, and that they appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def cache_directory() -> Path:
    """Where whit keeps files it made: $WHIT_CACHE, else `whit` in the user's cache folder.

    Raises:
        FileNotFoundError: the user has no home folder, and nothing else says where.
    """
    if os.environ.get("WHIT_CACHE"):
        return Path(os.environ["WHIT_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "whit"
    except RuntimeError:  # a container may run as a user that it does not know
        raise FileNotFoundError("there is no home folder: set WHIT_CACHE to a folder that can be written") from None


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that appears in its place, folders included, when the context ends; not at all if that fails.

    Whoever reads it meanwhile sees the one before. Several processes may write it at once: one of them wins.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as part:
        try:
            yield part
            part.flush()
            Path(part.name).replace(path)
        except BaseException:
            Path(part.name).unlink(missing_ok=True)  # on a full disk its space is needed
            raise
