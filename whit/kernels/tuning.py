"""Launch shapes measured on the machine at hand: the fastest is used from then on, and kept on disk per kind of device.

Without it kernels take shapes found on the devices that whit was measured on, or estimates. Shapes change speed alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from whit.formats.base import Format, Packed
from whit.kernels.linear import choose, choose_several
from whit.kernels.nvrtc import CompilationError
from whit.kernels.timing import copies_for, seconds_per_call

T = TypeVar("T")
Seconds = Callable[[], float]
QUICK = 8  # replays of a graph for each shape that is tried


@dataclass(frozen=True)
class Tuner:
    """Finds the launch shape of one kind of kernel.

    Attributes:
        supports: whether its kernel could multiply these.
        tune: (x, packed, seconds) tries every shape, timed by `seconds`, uses and keeps the fastest; returns how
            many could be launched.
    """

    supports: Callable[[Tensor, Packed], bool]
    tune: Callable[[Tensor, Packed, Seconds], int]


@dataclass(frozen=True)
class TunedProduct:
    """What tuning found for one kind of weight and number of vectors; times are seconds per product, from memory.

    `format` is that of the weight as JSON, `tried` the number of launch shapes that were timed. Of several weights in
    one launch, `parts` holds the rows of each and `rows` their sum. Where `kernel` is a step of decoding, the times are
    of a block of it (with its share of what else a short step takes).
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
    parts: tuple[int, ...] = ()


_TUNERS: dict[str, list[Tuner]] = {}


def register_tuner(format_name: str, tuner: Tuner) -> None:
    """Offer a tuner for weights of one format; later registrations are asked first."""
    _TUNERS.setdefault(format_name, []).insert(0, tuner)


def tuner_of(x: Tensor, packed: Packed) -> Tuner | None:
    """The tuner of the kernel that multiplies these, or None where there is nothing to choose."""
    return next((item for item in _TUNERS.get(packed.format.name, ()) if item.supports(x, packed)), None)


def fastest(
    shapes: Sequence[T], before: T | None, use: Callable[[T | None], None], seconds: Seconds, what: str
) -> tuple[T, dict[T, float]]:
    """Time a call in every launch shape, and use the fastest from then on.

    Args:
        shapes: those that may be tried.
        before: the shape in use, which stays in use whatever is raised: of a search that ended early nobody knows the
            fastest.
        use: takes a shape into use.
        seconds: measures the call; CompilationError passes over a shape.
        what: is tuned, for the error.

    Returns:
        The fastest, and the time of each that could be launched.

    Raises:
        CompilationError: none could.
    """
    times: dict[T, float] = {}
    best = before
    try:
        for shape in shapes:
            use(shape)
            with suppress(CompilationError):  # this compiler or device cannot do it; another shape will
                times[shape] = seconds()
        if not times:
            raise CompilationError(f"no launch for {what} works here")
        best = min(times, key=times.__getitem__)
    finally:
        use(best)
    return best, times


def distinct(products: Sequence[Sequence[Packed]]) -> list[Sequence[Packed]]:
    """One product of each kind, its weights' formats and shapes, in order of first appearance."""
    found: dict[tuple[tuple[Format, int, int], ...], Sequence[Packed]] = {}
    for weights in products:
        found.setdefault(tuple((packed.format, packed.rows, packed.columns) for packed in weights), weights)
    return list(found.values())


def tune_products(
    weights: Sequence[Packed],
    vectors: Sequence[int],
    dtype: torch.dtype,
    together: Sequence[Sequence[Packed]] = (),
) -> Iterator[TunedProduct]:
    """Tune every kind of weight for every number of vectors, one result at a time.

    Args:
        weights: packed weights on a CUDA device; one of each format and shape is measured, with copies of it that
            exceed the cache.
        vectors: numbers of input vectors, as 1 for decoding one text.
        dtype: of the inputs: float16 or bfloat16.
        together: weights that meet the same inputs, for the launches that take them all.
    """
    for product in distinct([*((packed,) for packed in weights), *together]):
        for count in vectors:
            try:
                found = _tune_one(product, count, dtype)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                warnings.warn(
                    f"not tuned for {count} vectors: {_name(product)} does not fit into the memory that is free; it "
                    "runs with the launch it had (remedy: free memory, or a smaller --vectors)",
                    stacklevel=2,
                )
                continue
            except CompilationError as error:
                warnings.warn(f"not tuned for {count} vectors: {error}", stacklevel=2)
                continue
            if found is not None:
                yield found


def _name(weights: Sequence[Packed]) -> str:
    rows = " + ".join(str(packed.rows) for packed in weights)
    return f"{weights[0].format} of {rows} x {weights[0].columns}"


@dataclass(frozen=True)
class _Found:
    """How a product is multiplied now: by which kernel, called how, and what tunes it."""

    kernel: str
    call: Callable[[Tensor, Sequence[Packed]], object]
    tune: Callable[[Seconds], int]


def _find(x: Tensor, weights: Sequence[Packed]) -> _Found | None:
    """As `packed_linear` and `several_products` choose, but a launch that cannot be compiled is an error: nothing else
    is timed in its place. None where there is nothing to choose."""
    if len(weights) > 1:
        several = choose_several(x, weights)
        if several is None or several.tune is None:
            return None
        return _Found(several.name, several.products, partial(several.tune, x, weights))
    tuner = tuner_of(x, weights[0])
    if tuner is None:
        return None
    return _Found(choose(x, weights[0]).name, _product, partial(tuner.tune, x, weights[0]))


def _product(x: Tensor, weights: Sequence[Packed]) -> Tensor:
    return choose(x, weights[0]).linear(x, weights[0], None)


def _tune_one(weights: Sequence[Packed], vectors: int, dtype: torch.dtype) -> TunedProduct | None:
    device, columns = next(iter(weights[0].tensors.values())).device, weights[0].columns
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(vectors, columns, device=device, generator=generator).to(dtype)
    before = _find(x, weights)
    if before is None:
        return None
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    parts = tuple(packed.rows for packed in weights)
    size = sum(packed.format.bytes(packed.rows, columns) for packed in weights)
    copies = copies_for(size, cache, 2 * vectors * sum(parts)) - 1
    every = [weights, *([_copied(packed) for packed in weights] for _ in range(copies))]

    calls = [partial(before.call, x, item) for item in every]
    with torch.cuda.device(device), torch.inference_mode():
        first = seconds_per_call(calls)[0]
        tried = before.tune(lambda: seconds_per_call(calls, QUICK)[0])
        last = seconds_per_call(calls)[0]
    after = _find(x, weights)
    assert after is not None
    layout = weights[0].format.to_json()
    several = parts if len(parts) > 1 else ()
    return TunedProduct(layout, sum(parts), columns, vectors, before.kernel, after.kernel, first, last, tried, several)


def _copied(packed: Packed) -> Packed:
    tensors = {name: tensor.clone() for name, tensor in packed.tensors.items()}
    return Packed(packed.format, packed.rows, packed.columns, tensors)
