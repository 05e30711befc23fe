"""Which launch shapes of the CUDA kernels were found fastest.

They are kept in a JSON file per kind of device: those shipped with the package (`tuned/`), and over them those that
`whit tune` (or `benchmarks/kernels.py --tune`) has written to the cache folder of this machine. Shapes change speed
alone: the sums of a row are the same numbers in another order.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

from whit.formats.memory import Memory
from whit.kernels.cuda_layout import Layout
from whit.kernels.cuda_shapes import Outside, Shape
from whit.kernels.cuda_wide import Decode, WideShape
from whit.kernels.found import keep_shapes, read_shapes, shape_from
from whit.kernels.nvrtc import cache_folder

Tuned: TypeAlias = Shape | WideShape | Decode | Outside
"""What can be found fastest for a call."""


def tuning_key(layout: Layout, rows: int, columns: int, tokens: int) -> str:
    """What a found shape is filed under."""
    group = "row" if layout.groups == 1 else str(layout.group)
    numbers = "".join(f"-{number}" for number in layout.numbers)
    kind = f"{layout.kind}-{layout.bits}-{layout.scalars}{'-zeros' if layout.asymmetric else ''}{numbers}"
    return f"{kind}/{group}/{rows}x{columns}/{tokens}"


def tuning_file(device: str) -> Path:
    """Where shapes found on this machine are kept."""
    return cache_folder() / _own_file(device)


def _own_file(device: str) -> str:
    return f"tuned-{device.replace(' ', '-')}.json"


def _tuned_from(values: dict[str, Any]) -> Tuned:
    kinds: dict[str, type[Tuned]] = {"decode": Decode, "outside": Outside, "splits": WideShape}
    return shape_from(next((kind for name, kind in kinds.items() if name in values), Shape), values)


@lru_cache(maxsize=8)
def tuned_shapes(device: str) -> dict[str, Tuned]:
    """Shapes found for a kind of device: the shipped ones, and over them those of this machine."""
    return read_shapes(f"{device.replace(' ', '-')}.json", _own_file(device), _tuned_from)


def keep_tuned(device: str, shapes: Mapping[str, Tuned]) -> None:
    """Add found shapes to this machine's file.

    Raises:
        OutputError: it cannot be written.
    """
    keep_shapes(_own_file(device), shapes, _tuned_from)
    tuned_shapes.cache_clear()


def use_shape(device: str, key: str, shape: Tuned | None) -> None:
    """Take a shape (or with None no longer any) for what `key` names, in this process and until one is kept."""
    found = tuned_shapes(device)
    if shape is None:
        found.pop(key, None)
    else:
        found[key] = shape
    Memory.forget_all()
