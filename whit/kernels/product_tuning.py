"""The launches worth trying for products of packed weights on CUDA (`cuda_linear`), and the search among them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from whit.formats.base import Packed
from whit.kernels.cuda_layout import Layout
from whit.kernels.cuda_linear import usable, vectors_of
from whit.kernels.cuda_ops import (
    FEW,
    build,
    choice,
    counts_bits,
    device_limits,
    has_warpgroups,
    size_class,
    starts_early,
)
from whit.kernels.cuda_plan import Launch, plan
from whit.kernels.cuda_shapes import Shape, gemv_shapes, small_shapes
from whit.kernels.cuda_tuned import Tuned, keep_tuned, tuned_shapes, tuning_key, use_shape
from whit.kernels.cuda_wide import Decode, WideShape, wide_supports
from whit.kernels.cuda_wide_plan import wide_shapes
from whit.kernels.nvrtc import Source, compile_together
from whit.kernels.tuning import Tuner, fastest, register_tuner


def candidates(layout: Layout, rows: int, columns: int, tokens: int, index: int) -> list[Tuned]:
    """The launches worth trying for a weight and `tokens` vectors (a `size_class`) on device number `index`."""
    _, processors, memory = device_limits(index)
    found: list[Tuned] = []
    if tokens > 1 and has_warpgroups(index) and wide_supports(layout, columns):
        found += wide_shapes(layout, tokens, columns, memory)
    if layout.multiplies if tokens == 1 else tokens <= FEW and layout.expands:
        for shape in (
            gemv_shapes(layout, counts_bits(index), starts_early(index)) if tokens == 1 else small_shapes(layout)
        ):
            try:
                plan(layout, rows, columns, tokens, processors, memory, [shape])
            except ValueError:
                continue
            found.append(shape)
    return [*found, Decode()] if found and tokens > FEW and layout.decodes else found


def sources(layout: Layout, rows: int, columns: int, vectors: int, bfloat: bool, index: int) -> list[Source]:
    """What the launches worth trying for a weight and so many vectors are compiled from."""
    _, processors, memory = device_limits(index)
    tokens, early = size_class(layout, vectors), starts_early(index)
    found: list[Source] = []
    for shape in candidates(layout, rows, columns, tokens, index):
        parts: list[Launch | WideShape]
        if isinstance(shape, WideShape):
            parts = [part for part, _, _ in shape.parts(rows, vectors, processors)]
        elif isinstance(shape, Shape):
            parts = [plan(layout, rows, columns, tokens, processors, memory, [shape])]
        else:  # a library multiplies
            continue
        for part in parts:
            source, _, options, specific = build(layout, part, tokens, bfloat, early)
            found.append((source, options, specific))
    return found


def tune(x: Tensor, packed: Packed, seconds: Callable[[], float]) -> tuple[str, Tuned, int]:
    """Find the fastest launch for one call and use it from now on in this process.

    Args:
        x: inputs that a kernel multiplies: 1 to 32 vectors, on Hopper any number.
        packed: weight of the layout and shape to tune for.
        seconds: measures the call; run once per launch.

    Returns:
        The key of `cuda_tuned.tuning_key` and the launch, for `cuda_tuned.keep_tuned`, and how many were timed.

    Raises:
        ValueError: no kernel multiplies these. CompilationError: no launch can be compiled.

    Whatever is raised, the launch before stays in use.
    """
    layout, index = usable(x, packed), x.device.index
    tokens = 0 if layout is None else size_class(layout, vectors_of(x))
    possible = [] if layout is None else candidates(layout, packed.rows, packed.columns, tokens, index)
    if layout is None or not possible:
        raise ValueError(f"no kernel to tune for {vectors_of(x)} vectors and {packed.format}")
    device = device_limits(index)[0]
    key = tuning_key(layout, packed.rows, packed.columns, tokens)

    def use(launch: Tuned | None) -> None:
        use_shape(device, key, launch)
        choice.cache_clear()

    bfloat = x.dtype == torch.bfloat16
    compile_together(sources(layout, packed.rows, packed.columns, vectors_of(x), bfloat, index), index)
    what = f"{vectors_of(x)} vectors and {packed.format}"
    best, times = fastest(possible, tuned_shapes(device).get(key), use, seconds, what)
    return key, best, len(times)


def _tunes(x: Tensor, packed: Packed) -> bool:
    layout = usable(x, packed)
    return layout is not None and bool(
        candidates(layout, packed.rows, packed.columns, size_class(layout, vectors_of(x)), x.device.index)
    )


def _tune_and_keep(x: Tensor, packed: Packed, seconds: Callable[[], float]) -> int:
    key, best, tried = tune(x, packed, seconds)
    keep_tuned(device_limits(x.device.index)[0], {key: best})
    return tried


for _format in (
    "binary-residual",
    "level-table",
    "grouped-integer",
    "vector-codebook",
    "structured-binary",
    "signed-levels",
):
    register_tuner(_format, Tuner(_tunes, _tune_and_keep))
