"""CUDA versions of the packed product, for float16 and bfloat16 inputs on compute capability 8.0 and above.

    one vector          `cuda/gemv.cu`    bit planes on the binary or integer tensor cores
    2 to 32 vectors     `cuda/small.cu`   codes expanded in registers for the 16-bit tensor cores
    2 and more          `cuda/wide.cu`    codes expanded in registers for the warpgroup tensor cores (Hopper)
    otherwise           `cuda/decode.cu`  the weight decoded to 16 bits, then the library's matrix product

Stored tensors are read as they are: no second copy of a weight is kept. The ops are functional, have fake
implementations (torch.compile) and neither synchronise nor allocate anything but their result and, where the weight is
decoded, that weight for the time of the product.

Bounds, with u the unit roundoff of the type of x (2^-11, 2^-8), against the product in exact arithmetic:
    gemv           |error| <= u |y| + 2^-16 sum_blocks max|x_b| sum_j |w_ij| + 2^-20 sum_j |w_ij x_j|
    otherwise      |error| <= u |y| + (u + 2^-20) sum_j |w_ij x_j|      (the u is the plain meaning's own rounding of w)
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable
from dataclasses import astuple
from functools import lru_cache

import torch
from torch import Tensor

from whit.formats.base import Packed
from whit.kernels.cuda_decode import THREADS as DECODE_THREADS
from whit.kernels.cuda_decode import decode_options, decode_shared, decode_source
from whit.kernels.cuda_layout import Layout, layout_of
from whit.kernels.cuda_plan import (
    Launch,
    Shape,
    choose,
    gemv_shapes,
    options_of,
    parts_of,
    plan,
    small_shapes,
    source_of,
    tuned_shapes,
    tuning_key,
    use_shape,
    wide_source,
)
from whit.kernels.cuda_wide import (
    BOX,
    WideShape,
    bucket,
    shared_bytes,
    wide_options,
    wide_plan,
    wide_shapes,
    wide_supports,
)
from whit.kernels.linear import Implementation, register_implementation
from whit.kernels.nvrtc import Argument, CompilationError, Kernel, kernel, tensor_map

FEW = 32
"""Most vectors that `small` multiplies."""

_ADDRESSED = 2**31  # bytes of a tensor that the kernels' 32-bit offsets reach


class _Weight(ctypes.Structure):
    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("second", ctypes.c_void_p),
        ("salient", ctypes.c_void_p),
        ("scalars", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("rows", ctypes.c_int),
        ("columns", ctypes.c_int),
        ("width", ctypes.c_int),
        ("groups", ctypes.c_int),
    )


@lru_cache(maxsize=16)
def _device_limits(index: int) -> tuple[str, int, int]:
    properties = torch.cuda.get_device_properties(index)
    shared_memory: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return properties.name, properties.multi_processor_count, shared_memory


def _counts_bits(index: int) -> bool:
    """Whether the device has tensor cores for one-bit operands: Ampere to Hopper."""
    return torch.cuda.get_device_capability(index) < (10, 0)


def _starts_early(index: int) -> bool:
    """Whether the device has programmatic dependent launch."""
    return torch.cuda.get_device_capability(index) >= (9, 0)


@lru_cache(maxsize=4096)
def _prepared(
    name: str, layout: Layout, rows: int, columns: int, tokens: int, bfloat: bool, index: int
) -> tuple[Kernel, Launch]:
    if name == "decode":
        shape = Shape(DECODE_THREADS, 128, 1)
        launch = Launch(8 * _device_limits(index)[1], shape, 2, 0, 0, decode_shared(layout))
        return kernel(decode_source(layout), name, decode_options(layout, bfloat), index), launch
    limits = _device_limits(index)
    launch = choose(limits[0], layout, rows, columns, tokens, *limits[1:], binary=_counts_bits(index))
    options = options_of(layout, launch.shape, launch.depth, tokens, bfloat, _starts_early(index))
    return kernel(source_of(*parts_of(name, launch.shape)), name, options, index), launch


def _has_warpgroups(index: int) -> bool:
    """Whether the device has the tensor cores that `wide` is written for, which no other architecture has."""
    return torch.cuda.get_device_capability(index) == (9, 0)


@lru_cache(maxsize=4096)
def _wide_shape(layout: Layout, rows: int, columns: int, tokens: int, index: int) -> WideShape | None:
    """How `wide` multiplies up to `tokens` (see `bucket`) vectors; None if another kernel does."""
    if not (_has_warpgroups(index) and wide_supports(layout, columns)):
        return None
    device, processors, memory = _device_limits(index)
    found = tuned_shapes(device).get(tuning_key(layout, rows, columns, tokens))
    if isinstance(found, WideShape):
        return found
    if tokens <= FEW and layout.multiplies:
        return None
    return wide_plan(layout, rows, columns, tokens, processors, memory)


@lru_cache(maxsize=4096)
def _prepared_wide(layout: Layout, shape: WideShape, bfloat: bool, index: int) -> Kernel:
    options = wide_options(layout, shape, bfloat, early=True)
    return kernel(wide_source(shape.tokens), "wide", options, index, specific=True)


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _weight(layout: Layout, tensors: list[Tensor], rows: int, columns: int) -> _Weight:
    given = iter(tensors)
    pointers = [next(given).data_ptr() if name else None for name in layout.names]
    return _Weight(*pointers, rows, columns, layout.width, layout.groups)


def _aligned(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors, copied where they start at no multiple of 16 bytes (views into a larger buffer may)."""
    return [tensor if tensor.data_ptr() % 16 == 0 else tensor.clone() for tensor in tensors]


def _layout_fields(layout: Layout) -> list[int]:
    present = sum(1 << i for i, name in enumerate(layout.names) if name)
    return [present, *(int(value) for value in astuple(layout)[:7]), *layout.numbers]


def _layout_from(fields: list[int]) -> Layout:
    present, kind, bits, scalars, asymmetric, group, width, groups, *numbers = fields
    names = tuple("?" if present >> i & 1 else "" for i in range(5))
    return Layout(kind, bits, scalars, bool(asymmetric), group, width, groups, names, tuple(numbers))  # type: ignore[arg-type]


@torch.library.custom_op("whit::packed_product", mutates_args=(), device_types="cuda")
def packed_product(
    x: Tensor, tensors: list[Tensor], bias: Tensor | None, layout: list[int], rows: int, columns: int
) -> Tensor:
    """x (m, columns), contiguous, times the packed weight: (m, rows). See the top of this file."""
    described, tensors = _layout_from(layout), _aligned(tensors)
    m, bfloat, index = x.shape[0], x.dtype == torch.bfloat16, x.device.index
    out = torch.empty(m, rows, dtype=x.dtype, device=x.device)
    with torch.cuda.device(x.device):
        weight = _weight(described, tensors, rows, columns)
        shape = None if m == 1 and described.multiplies else _wide_shape(described, rows, columns, bucket(m), index)
        arguments: list[Argument] = [_pointer(x), weight, _pointer(bias), _pointer(out)]
        if shape is not None:
            run = _prepared_wide(described, shape, bfloat, index)
            x = x if x.data_ptr() % 16 == 0 else x.clone()
            arguments[0] = tensor_map(x.data_ptr(), m, columns, shape.tokens // shape.shares, BOX)
            arguments.append(ctypes.c_int(m))
            grid = shape.grid(rows, m)
            run.launch(
                grid, shape.threads, shared_bytes(described, shape), arguments, early=True, cluster=shape.cluster
            )
            return out
        tokens = 1 if m == 1 else 8 if m <= 8 else 16 if m <= 16 else 32
        run, launch = _prepared("gemv" if m == 1 else "small", described, rows, columns, tokens, bfloat, index)
        arguments += [ctypes.c_int(m)] * (m > 1) + [ctypes.c_int(launch.chunk), ctypes.c_int(launch.tiles)]
        run.launch(launch.grid, launch.shape.threads, launch.shared, arguments, early=_starts_early(index))
    return out


@packed_product.register_fake
def _(x: Tensor, tensors: list[Tensor], bias: Tensor | None, layout: list[int], rows: int, columns: int) -> Tensor:
    return x.new_empty(x.shape[0], rows)


@torch.library.custom_op("whit::decoded_weight", mutates_args=(), device_types="cuda")
def decoded_weight(tensors: list[Tensor], layout: list[int], rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """The dense weight (rows, columns) in float16 or bfloat16: `unpack().to(dtype)`, value for value."""
    described, tensors = _layout_from(layout), _aligned(tensors)
    device = tensors[0].device
    out = torch.empty(rows, columns, dtype=dtype, device=device)
    with torch.cuda.device(device):
        run, launch = _prepared("decode", described, 0, 0, 8, dtype == torch.bfloat16, device.index)
        run.launch(
            launch.grid,
            launch.shape.threads,
            launch.shared,
            [_weight(described, tensors, rows, columns), ctypes.c_void_p(out.data_ptr())],
        )
    return out


@decoded_weight.register_fake
def _(tensors: list[Tensor], layout: list[int], rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return tensors[0].new_empty(rows, columns, dtype=dtype)


@lru_cache(maxsize=16)
def _compiles(index: int) -> bool:
    try:
        with torch.cuda.device(index):
            kernel('extern "C" __global__ void probe() {}', "probe", (), index)
    except (CompilationError, OSError) as error:
        warnings.warn(f"packed layers run in their plain version on CUDA device {index}: {error}", stacklevel=2)
        return False
    return True


def _device_works(index: int) -> bool:
    """Whether kernels can be compiled for a device and loaded; says once why not."""
    if torch.version.cuda is None or torch.cuda.get_device_capability(index) < (8, 0):
        return False
    return torch.compiler.is_compiling() or _compiles(index)  # tracing cannot look for libraries


def _usable(x: Tensor, packed: Packed) -> Layout | None:
    if x.device.type != "cuda" or x.dtype not in (torch.float16, torch.bfloat16):
        return None
    if x.shape[-1:] != (packed.columns,) or min(packed.rows, packed.columns) == 0:
        return None
    if torch.is_grad_enabled() and x.requires_grad:  # the plain version has a derivative
        return None
    if any(tensor.device != x.device or not tensor.is_contiguous() for tensor in packed.tensors.values()):
        return None
    if any(tensor.numel() * tensor.element_size() >= _ADDRESSED for tensor in packed.tensors.values()):
        return None
    return layout_of(packed.format, packed.columns) if _device_works(x.device.index) else None


def _vectors(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def _supports_one(x: Tensor, packed: Packed) -> bool:
    layout = _usable(x, packed)
    return layout is not None and layout.multiplies and _vectors(x) == 1


def _supports_few(x: Tensor, packed: Packed) -> bool:
    layout = _usable(x, packed)
    return layout is not None and layout.multiplies and 2 <= _vectors(x) <= FEW


def _supports_wide(x: Tensor, packed: Packed) -> bool:
    layout = _usable(x, packed)
    if layout is None or _vectors(x) < (2 if layout.multiplies else 1):
        return False
    return _wide_shape(layout, packed.rows, packed.columns, bucket(_vectors(x)), x.device.index) is not None


def _supports_many(x: Tensor, packed: Packed) -> bool:
    return _usable(x, packed) is not None


def _arguments(packed: Packed) -> tuple[list[Tensor], list[int]]:
    layout = layout_of(packed.format, packed.columns)
    assert layout is not None
    return [packed.tensors[name] for name in layout.names if name], _layout_fields(layout)


def _product(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    tensors, layout = _arguments(packed)
    flat = x.reshape(-1, packed.columns).contiguous()
    bias = None if bias is None else bias.detach().to(x.dtype).contiguous()
    out: Tensor = torch.ops.whit.packed_product(flat, tensors, bias, layout, packed.rows, packed.columns)
    return out.reshape(*x.shape[:-1], packed.rows)


def _decoded_product(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    tensors, layout = _arguments(packed)
    weight = torch.ops.whit.decoded_weight(tensors, layout, packed.rows, packed.columns, x.dtype)
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def tune(x: Tensor, packed: Packed, seconds: Callable[[], float]) -> tuple[str, Shape | WideShape]:
    """Find the fastest launch shape for one call and use it from now on in this process.

    Args:
        x: inputs that a kernel multiplies: 1 to 32 vectors, on Hopper any number.
        packed: weight of the layout and shape to tune for.
        seconds: measures the call; run once per shape.

    Returns:
        The key of `cuda_plan.tuning_key` and the shape, for `cuda_plan.keep_tuned`.

    Raises:
        ValueError: no kernel multiplies these.
    """
    layout, count, index = _usable(x, packed), _vectors(x), x.device.index
    tokens = 1 if count == 1 and layout is not None and layout.multiplies else bucket(count)
    wide = layout is not None and tokens > 1 and _has_warpgroups(index) and wide_supports(layout, packed.columns)
    few = layout is not None and layout.multiplies and 1 <= count <= FEW
    if layout is None or not (few or wide):
        raise ValueError(f"no kernel to tune for {count} vectors and {packed.format}")
    device, processors, memory = _device_limits(index)
    key = tuning_key(layout, packed.rows, packed.columns, tokens)
    shapes: list[Shape | WideShape] = [*wide_shapes(layout, tokens, packed.columns, memory)] if wide else []
    for shape in (gemv_shapes(layout, _counts_bits(index)) if tokens == 1 else small_shapes(layout)) if few else ():
        try:
            plan(layout, packed.rows, packed.columns, tokens, processors, memory, [shape])
        except ValueError:
            continue
        shapes.append(shape)
    times: dict[Shape | WideShape, float] = {}
    for candidate in shapes:
        use_shape(device, key, candidate)
        _prepared.cache_clear()
        _wide_shape.cache_clear()
        try:
            times[candidate] = seconds()
        except CompilationError:
            continue  # this compiler or device cannot do it; another shape will
    best = min(times, key=times.__getitem__)
    use_shape(device, key, best)
    _prepared.cache_clear()
    _wide_shape.cache_clear()
    return key, best


# The last one registered is asked first.
for _format in ("binary-residual", "level-table", "grouped-integer", "vector-codebook", "structured-binary"):
    register_implementation(_format, Implementation("cuda decode + matmul", _supports_many, _decoded_product))
    register_implementation(_format, Implementation("cuda tensor-core product", _supports_few, _product))
    register_implementation(_format, Implementation("cuda warpgroup product", _supports_wide, _product))
    register_implementation(_format, Implementation("cuda bit-plane gemv", _supports_one, _product))
