"""Launch shapes measured on the machine at hand: the fastest is used from then on, and kept on disk per kind of device.

Without it kernels take shapes found on the devices that whit was measured on, or estimates. Shapes change speed alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from whit.formats.base import Format, Packed
from whit.kernels.linear import choose, explain
from whit.kernels.nvrtc import CompilationError
from whit.kernels.timing import copies_for, seconds_per_call

Seconds = Callable[[], float]
QUICK = 8  # replays of a graph for each shape that is tried


@dataclass(frozen=True)
class Tuner:
    """Finds the launch shape of one kind of kernel.

    Attributes:
        supports: whether its kernel could multiply these.
        tune: (x, packed, seconds) tries every shape, timed by `seconds`, uses and keeps the fastest; returns how
            many it tried.
    """

    supports: Callable[[Tensor, Packed], bool]
    tune: Callable[[Tensor, Packed, Seconds], int]


@dataclass(frozen=True)
class TunedProduct:
    """What tuning found for one kind of weight and number of vectors; times are seconds per product, from memory.

    `format` is that of the weight as JSON, `tried` the number of launch shapes.
    """

    format: dict[str, Any]
    rows: int
    columns: int
    vectors: int
    kernel_before: str
    kernel: str
    seconds_before: float
    seconds: float
    tried: int


_TUNERS: dict[str, list[Tuner]] = {}


def register_tuner(format_name: str, tuner: Tuner) -> None:
    """Offer a tuner for weights of one format; later registrations are asked first."""
    _TUNERS.setdefault(format_name, []).insert(0, tuner)


def tuner_of(x: Tensor, packed: Packed) -> Tuner | None:
    """The tuner of the kernel that multiplies these, or None where there is nothing to choose."""
    return next((item for item in _TUNERS.get(packed.format.name, ()) if item.supports(x, packed)), None)


def distinct(weights: Sequence[Packed]) -> list[Packed]:
    """One weight of each format and shape, in order of first appearance."""
    found: dict[tuple[Format, int, int], Packed] = {}
    for packed in weights:
        found.setdefault((packed.format, packed.rows, packed.columns), packed)
    return list(found.values())


def tune_products(weights: Sequence[Packed], vectors: Sequence[int], dtype: torch.dtype) -> Iterator[TunedProduct]:
    """Tune every kind of weight for every number of vectors, one result at a time.

    Args:
        weights: packed weights on a CUDA device; one of each format and shape is measured, with copies of it that
            exceed the cache.
        vectors: numbers of input vectors, as 1 for decoding one text.
        dtype: of the inputs: float16 or bfloat16.
    """
    for packed in distinct(weights):
        for count in vectors:
            try:
                found = _tune_one(packed, count, dtype)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                warnings.warn(
                    f"not tuned for {count} vectors: {packed.format} of {packed.rows} x {packed.columns} does not fit "
                    "into the memory that is free; it runs with the launch it had (remedy: free memory, or a smaller "
                    "--vectors)",
                    stacklevel=2,
                )
                continue
            except CompilationError as error:
                warnings.warn(f"not tuned for {count} vectors: {error}", stacklevel=2)
                continue
            if found is not None:
                yield found


def _tune_one(packed: Packed, vectors: int, dtype: torch.dtype) -> TunedProduct | None:
    device = next(iter(packed.tensors.values())).device
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(vectors, packed.columns, device=device, generator=generator).to(dtype)
    tuner = tuner_of(x, packed)
    if tuner is None:
        return None
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    size = packed.format.bytes(packed.rows, packed.columns)
    copies = copies_for(size, cache, 2 * vectors * packed.rows) - 1
    others = [
        Packed(packed.format, packed.rows, packed.columns, {key: item.clone() for key, item in packed.tensors.items()})
        for _ in range(copies)
    ]
    calls = [partial(_product, x, weight) for weight in (packed, *others)]
    with torch.cuda.device(device), torch.inference_mode():
        name, before = explain(x, packed), seconds_per_call(calls)[0]
        tried = tuner.tune(x, packed, lambda: seconds_per_call(calls, QUICK)[0])
        after = seconds_per_call(calls)[0]
    kernel = explain(x, packed)
    layout = packed.format.to_json()
    return TunedProduct(layout, packed.rows, packed.columns, vectors, name, kernel, before, after, tried)


def _product(x: Tensor, packed: Packed) -> Tensor:
    """As `packed_linear`, but a launch that cannot be compiled is an error: nothing else is timed in its place."""
    return choose(x, packed).linear(x, packed, None)
