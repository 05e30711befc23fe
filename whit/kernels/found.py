"""Launch shapes found fastest: JSON files shipped with the package, and over them one of this machine for each device.

Shapes change speed alone. A file may come from another version, or from an editor: entries that are none of the wanted
kind are passed over one by one, and what a kernel can do is for its own module to check.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from importlib.resources import files
from typing import Any, Protocol, TypeVar

from whit.cache import whole_file
from whit.errors import OutputError
from whit.kernels.nvrtc import cache_folder


class Readable(Protocol):
    """A file that may lie in a package."""

    def read_text(self, encoding: str) -> str:
        """Its content."""


T = TypeVar("T")
Parse = Callable[[dict[str, Any]], T]


def shape_from(kind: type[T], values: dict[str, Any]) -> T:
    """A dataclass of whole numbers and truth values from JSON.

    Raises:
        ValueError, TypeError: the values are others.
    """
    truths = {item.name for item in fields(kind) if item.type in (bool, "bool")}  # type: ignore[arg-type]
    for name, value in values.items():
        if type(value) is not (bool if name in truths else int):
            raise ValueError(f"{name} is {value!r}")
    return kind(**values)


def read_shapes(shipped: str, own: str, parse: Parse[T]) -> dict[str, T]:
    """Shapes by key, from a shipped file and over it from one in this machine's cache folder.

    Args:
        parse: makes a shape, or raises ValueError or TypeError.
    """
    found = _entries(files("whit.kernels") / "tuned" / shipped, parse)
    try:
        return found | _entries(cache_folder() / own, parse)
    except FileNotFoundError:  # there is no such folder
        return found


def keep_shapes(own: str, shapes: Mapping[str, Any], parse: Parse[Any]) -> None:
    """Add shapes to this machine's file, which holds nothing that was shipped: a later version may ship better ones.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        path = cache_folder() / own
        merged = {key: asdict(shape) for key, shape in sorted((_entries(path, parse) | dict(shapes)).items())}
        with whole_file(path) as file:
            file.write((json.dumps(merged, indent=0) + "\n").encode())
    except OSError as error:
        raise OutputError(
            f"what was found cannot be kept in {own!r} ({error.strerror or error}): free or unlock its folder, or set "
            "WHIT_CACHE to another"
        ) from error


def _entries(source: Readable, parse: Parse[T]) -> dict[str, T]:
    try:
        content = json.loads(source.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    found: dict[str, T] = {}
    for key, values in content.items() if isinstance(content, dict) else ():
        try:
            found[key] = parse(dict(values))
        except (ValueError, TypeError):
            continue
    return found
