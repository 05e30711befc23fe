"""8-bit layers for up to 32 vectors on Hopper, in CUDA C++: one launch that rounds its inputs (`cuda/eight.cu`).

LLM.int8(), rounded inputs of INT8 or E4M3, and INT8, E4M3 and E5M2 weights
alone, with a scale per row or one. With one vector the kernel may make its input itself, a normalisation. Bounds on the
difference from the plain meaning are those of `outlier_int8` and `eight_bit`; codes are the same, bit for bit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

import whit.kernels.eight_bit  # its versions, and those of LLM.int8(), are asked after these
import whit.kernels.outlier_int8  # noqa: F401
from whit.formats.base import Packed
from whit.formats.outlier_int8 import OutlierInt8
from whit.formats.quantised_inputs import QuantisedInputs
from whit.formats.scaled_codes import ScaledCodes
from whit.kernels.calling import call
from whit.kernels.cuda_inputs import Normed, input_of, makes_input, register_maker
from whit.kernels.cuda_ops import aligned, device_limits, has_warpgroups
from whit.kernels.cuda_step import MOST_EIGHTS, alone, input_options
from whit.kernels.eight_few import MOST_VECTORS, FewLaunch, few_options, few_source, fits_few, launch_few, place_few
from whit.kernels.eight_layer import EightBit, eight_bit_of
from whit.kernels.eight_shapes import (
    LISTED,
    FewKind,
    FewShape,
    few_shapes,
    found_key,
    found_shapes,
    keep_found,
    likeliest,
)
from whit.kernels.linear import Implementation, register_implementation
from whit.kernels.nvrtc import CompilationError, compile_together, failed, give_up
from whit.kernels.tuning import Tuner, fastest, register_tuner

NAME = "few 8-bit (cuda)"
ADDRESSED = 2**31
MEASURED = 16
"""Most vectors for which the kernel was measured against others."""
HALVES = (torch.float16, torch.bfloat16)


@lru_cache(maxsize=4096)
def choice(
    kind: FewKind, vectors: int, rows: int, columns: int, index: int, *, chained: bool = False, made: bool = False
) -> FewLaunch | None:
    """The launch of a call, None where none fits: the found shape, else the likeliest.

    Args:
        kind: what is multiplied.
        vectors: of the call.
        rows: outputs.
        columns: inputs.
        index: number of the device.
        chained: among the kernels of a decoding step, for which shapes found for a product alone are not meant.
        made: the kernel makes its input.
    """
    device, processors, memory = device_limits(index)
    found = found_shapes(device).get(found_key(kind, vectors, rows, columns))
    known = [found] if found in few_shapes(vectors) and not chained else []
    for shape in [*known, *likeliest(kind, vectors, rows, columns)]:
        assert shape is not None
        launch = place_few(kind, vectors, rows, columns, processors, memory, shape, made)
        if launch is not None:
            return launch
    return None


def multiply_eight(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    input_scale: Tensor | None,
    index: Tensor | None,
    cached: Tensor | None,
    bias: Tensor | None,
    kind: list[int],
    threshold: float,
    maximum: float,
) -> Tensor:
    """x (m, columns), contiguous, times an 8-bit weight: (m, rows). See the top of this file.

    Args:
        x: float16 or bfloat16.
        codes: bytes (rows, columns).
        scales: of rows, or one.
        input_scale: float32 (1,), if it is stored.
        index: listed outlier columns.
        cached: their weights (rows, listed), of the type of x.
        bias: (rows,) of the type of x, or float32.
        kind: `FewKind`, as numbers.
        threshold: of outliers.
        maximum: of the numbers of the inputs.
    """
    (vectors, columns), rows = x.shape, len(codes)
    described = FewKind(kind[0], bool(kind[1]), kind[2], kind[3], bool(kind[4]), bool(kind[5]), kind[6])
    given, (x, codes) = codes, aligned([x, codes])
    out = torch.empty(vectors, rows, dtype=x.dtype, device=x.device)
    with torch.cuda.device(x.device):
        launch = choice(described, vectors, rows, columns, x.device.index)
        if launch is None:
            raise CompilationError(f"no launch of {rows} x {columns} fits for {vectors} vectors")
        launch_few(
            described, launch, ctypes.c_void_p(x.data_ptr()), codes, scales, out,
            input_scale=input_scale, index=index, cached=cached, bias=bias, threshold=threshold, maximum=maximum,
            early=codes is given,
        )  # fmt: skip
    return out


eight_product = torch.library.custom_op("whit::eight_product", multiply_eight, mutates_args=(), device_types="cuda")


@eight_product.register_fake
def _(x: Tensor, codes: Tensor, *rest: object) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])


def _layer(x: Tensor, packed: Packed) -> EightBit | None:
    """What the kernel multiplies, where it can be launched for this call."""
    if x.device.type != "cuda" or x.dtype not in HALVES or x.shape[-1:] != (packed.columns,) or x.numel() == 0:
        return None
    if packed.rows == 0 or packed.columns % 16 or not has_warpgroups(x.device.index):
        return None
    if (x.requires_grad and torch.is_grad_enabled()) or packed.rows * packed.columns >= ADDRESSED:
        return None
    if any(item.device != x.device or not item.is_contiguous() for item in packed.tensors.values()):
        return None
    return eight_bit_of(packed, x.dtype == torch.bfloat16)


def wins(kind: FewKind, vectors: int) -> bool:
    """Whether the kernel was faster than Triton's on an H200: up to 16 vectors, except with listed outlier columns.

    Those are few, as a rule, and stored columns of LLM.int8() go the old way through shared memory.
    """
    return vectors <= MEASURED and not (kind.llm and kind.outliers == LISTED)


def _supports(x: Tensor, packed: Packed) -> bool:
    vectors = x.numel() // max(1, packed.columns)
    if vectors > MOST_VECTORS:
        return False
    layer = _layer(x, packed)
    return layer is not None and wins(layer.kind, vectors) and fits_few(layer.kind, vectors, packed.columns)


def _product(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    layer = eight_bit_of(packed, x.dtype == torch.bfloat16)
    assert layer is not None
    flat = x.detach().reshape(-1, packed.columns).contiguous()
    given = None if bias is None else bias.detach().contiguous()
    if given is not None and given.dtype != x.dtype:
        given = given.to(x.dtype if layer.kind.llm else torch.float32)
    out = call(flat, multiply_eight, eight_product, flat, *layer.arguments(given))
    return out.reshape(*x.shape[:-1], packed.rows)


def _made(given: Normed | Tensor, weights: Sequence[Packed], bias: Tensor | None) -> tuple[Tensor, list[Tensor]] | None:
    """`products_of` for one 8-bit weight."""
    x = given.states if isinstance(given, Normed) else given
    if len(weights) > 1 or not makes_input(given, bias):
        return None
    (packed,) = weights
    layer = _layer(x, packed)
    if layer is None or not wins(layer.kind, 1) or failed((_KIND, packed.format)):
        return None
    index, normed = x.device.index, isinstance(given, Normed)
    launch = choice(layer.kind, 1, packed.rows, packed.columns, index, chained=True, made=normed)
    if launch is None or packed.columns > 8 * launch.shape.threads * MOST_EIGHTS:
        return None
    codes = aligned([layer.codes])[0]
    out = torch.empty(1, packed.rows, dtype=x.dtype, device=x.device)
    total, argument = input_of(given)
    add = isinstance(given, Normed) and given.update is not None
    extra = input_options(add, packed.columns, launch.shape.threads) if normed else ()
    try:
        with torch.cuda.device(index):
            launch_few(
                layer.kind, launch, argument, codes, layer.scales, out,
                input_scale=layer.input_scale, index=layer.index, cached=layer.cached, bias=bias,
                threshold=layer.threshold, maximum=layer.maximum, extra=extra, early=codes is layer.codes,
                least=alone(device_limits(index)[2]),
            )  # fmt: skip
    except CompilationError as error:
        give_up((_KIND, packed.format), f"{_KIND} of {packed.format}", error)
        return None
    return total, [out]


_KIND = "8-bit products that make their input"


def tune(x: Tensor, packed: Packed, seconds: Callable[[], float]) -> int:
    """Try every launch for one call, use and keep the fastest; how many could be launched.

    Raises:
        CompilationError: none could.
    """
    layer, index, vectors = _layer(x, packed), x.device.index, x.numel() // packed.columns
    assert layer is not None
    device, processors, memory = device_limits(index)
    sizes = (vectors, packed.rows, packed.columns)
    launches = [place_few(layer.kind, *sizes, processors, memory, shape) for shape in few_shapes(vectors)]
    shapes = [shape for shape, launch in zip(few_shapes(vectors), launches, strict=True) if launch is not None]
    options = {few_options(layer.kind, launch, vectors) for launch in launches if launch is not None}
    compile_together([(few_source(), option, False) for option in options], index)
    key, known = found_key(layer.kind, *sizes), found_shapes(device)

    def use(shape: FewShape | None) -> None:
        if shape is None:
            known.pop(key, None)
        else:
            known[key] = shape
        choice.cache_clear()

    best, times = fastest(shapes, known.get(key), use, seconds, f"{vectors} vectors and {packed.format}")
    keep_found(device, {key: best})
    return len(times)


# The last one registered is asked first.
for _format in (OutlierInt8, QuantisedInputs, ScaledCodes):
    register_implementation(_format.name, Implementation(NAME, _supports, _product))
    register_tuner(_format.name, Tuner(_supports, tune))
    register_maker(_format.name, _made)
