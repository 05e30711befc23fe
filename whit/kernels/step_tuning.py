"""Launch shapes of products within a step of decoding, where a thread block has a multiprocessor for itself.

What is fastest in a stream of equal products is often not so there: blocks of two products never share a
multiprocessor, other kernels stand between, and what asks for much memory before its input has come delays that input.
Shapes found here are filed beside those of the products (`step_key`) and taken by `whit.kernels.cuda_step` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from whit.formats.base import Packed
from whit.kernels.cuda_linear import usable
from whit.kernels.cuda_ops import counts_bits, device_limits, starts_early
from whit.kernels.cuda_plan import Launch
from whit.kernels.cuda_shapes import Outside, Shape, step_sizes, step_timings
from whit.kernels.cuda_step import Call, call_source, place_step, step_key
from whit.kernels.cuda_tuned import keep_tuned, tuned_shapes, use_shape
from whit.kernels.nvrtc import compile_together
from whit.kernels.tuning import fastest

LEAST_GAIN = 0.995
"""A shape is kept if a step takes less than so much of the time before: others come and go with the measurement."""
Times = dict[Shape | None, float]
"""Seconds by shape; None is the one that holds outside of a step."""


def tune_in_step(
    x: Tensor, weights: Sequence[Packed], seconds: Callable[[], float], *, makes: bool, gated: bool = False
) -> tuple[Shape | None, Times]:
    """Find the fastest shape of the launch of one or several weights, use and keep it.

    First the sizes and what was found before are tried, then when the fastest of them asks for its weights and lets the
    next kernel start. A shape is kept only if it is faster than what holds outside of a step; otherwise that is kept.

    Args:
        x: (1, columns) in the type of the inputs, on the device.
        weights: of one layout.
        seconds: measures a step that multiplies by them.
        makes: whether the kernel makes its input, sum and normalisation.
        gated: whether it multiplies two products, which otherwise a kernel behind it does.

    Returns:
        The fastest shape (None: that which holds outside) and the time of each that was tried; none if there is no
        choice.
    """
    layout, index = usable(x, weights[0]), x.device.index
    if layout is None or not (starts_early(index) and counts_bits(index)):
        return None, {}
    device, processors, memory = device_limits(index)
    rows, columns = tuple(packed.rows for packed in weights), weights[0].columns
    call = Call(layout, rows, columns, x.dtype == torch.bfloat16, index, makes, makes, gated)
    key = step_key(layout, rows, columns, gated)
    before = tuned_shapes(device).get(key)
    times: Times = {}

    def place(shape: Shape) -> Launch | None:
        return place_step(layout, rows, columns, processors, memory, shape, gated=gated)

    def search(shapes: Sequence[Shape]) -> Shape | None:
        placed = {shape: launch for shape in shapes if shape not in times and (launch := place(shape)) is not None}
        compile_together([call_source(call, launch) for launch in placed.values()], index)
        tried = [*placed, *([] if None in times else [None])]
        _, found = fastest(tried, None, lambda shape: use_shape(device, key, shape), seconds, f"{weights[0].format}")
        times.update(found)
        return min(placed, key=times.__getitem__, default=None)

    try:
        best = search([*step_sizes(layout), *([before] if isinstance(before, Shape) else [])])
        if best is not None:
            others = [shape for shape in step_timings(best) if shape not in times]
            best = min(best, search(others) or best, key=times.__getitem__)
            best = best if times[best] < LEAST_GAIN * times[None] else None
    except BaseException:
        use_shape(device, key, before)
        raise
    if len(times) == 1:  # no shape can be launched, so that nothing was found
        use_shape(device, key, before)
        return None, times
    found = Outside() if best is None else best
    use_shape(device, key, found)
    keep_tuned(device, {key: found})
    return best, times


@contextmanager
def no_gated_launch(x: Tensor, weights: Sequence[Packed]) -> Iterator[None]:
    """Take no launch that multiplies two weights with each other while this is entered, and the same as before then.

    Such a launch is taken first, and the time of a step would be the same whatever launch of their products is tried.

    Args:
        x: (1, columns) in the type of the inputs, on the device.
        weights: two of one layout, or none.
    """
    layout = usable(x, weights[0]) if weights else None
    if layout is None:
        yield
        return
    device = device_limits(x.device.index)[0]
    key = step_key(layout, [packed.rows for packed in weights], weights[0].columns, gated=True)
    before = tuned_shapes(device).get(key)
    use_shape(device, key, None)
    try:
        yield
    finally:
        use_shape(device, key, before)
