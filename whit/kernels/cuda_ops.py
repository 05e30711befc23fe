"""The ops of packed products on CUDA, and which kernel each call takes, launched as `cuda_plan` and `cuda_wide` say."""

from __future__ import annotations

import ctypes
from dataclasses import astuple
from functools import lru_cache

import torch
from torch import Tensor

from whit.kernels.cuda_bulk import Maps, maps_of
from whit.kernels.cuda_decode import SHAPE, decode_grid, decode_options, decode_shared, decode_source
from whit.kernels.cuda_layout import Layout
from whit.kernels.cuda_plan import Launch, choose
from whit.kernels.cuda_shapes import Shape
from whit.kernels.cuda_sources import options_of, parts_of, source_of, wide_source
from whit.kernels.cuda_tuned import tuned_shapes, tuning_key
from whit.kernels.cuda_wide import (
    BOX,
    Decode,
    WideShape,
    bucket,
    decodes_first,
    shared_bytes,
    stages_codes,
    wide_options,
    wide_plan,
    wide_shapes,
    wide_supports,
)
from whit.kernels.nvrtc import Argument, Kernel, kernel, tensor_map

FEW = 32
"""Most vectors that `small` multiplies."""


class Weight(ctypes.Structure):
    """A packed weight as the kernels take it."""

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


class BulkWeight(ctypes.Structure):
    """A packed weight with what the tensor copy engine must know of it, as `gemv` takes it where that brings it."""

    _fields_ = (("weight", Weight), ("pad", ctypes.c_uint64), ("maps", Maps))  # maps begin at a multiple of 64 bytes


@lru_cache(maxsize=16)
def device_limits(index: int) -> tuple[str, int, int]:
    """Name, multiprocessors, and bytes of shared memory that a block may have."""
    properties = torch.cuda.get_device_properties(index)
    shared_memory: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return properties.name, properties.multi_processor_count, shared_memory


def counts_bits(index: int) -> bool:
    """Whether the device has tensor cores for one-bit operands: Ampere to Hopper."""
    return torch.cuda.get_device_capability(index) < (10, 0)


def starts_early(index: int) -> bool:
    """Whether the device has programmatic dependent launch, and clusters of blocks."""
    return torch.cuda.get_device_capability(index) >= (9, 0)


def has_warpgroups(index: int) -> bool:
    """Whether the device has the tensor cores that `wide` is written for, which no other architecture has."""
    return torch.cuda.get_device_capability(index) == (9, 0)


def size_class(layout: Layout, vectors: int) -> int:
    """The number of vectors that a kernel is chosen for."""
    return 1 if vectors == 1 and layout.multiplies else bucket(vectors)


@lru_cache(maxsize=4096)
def choice(layout: Layout, rows: int, columns: int, tokens: int, index: int) -> Launch | WideShape | Decode:
    """What multiplies a weight by `tokens` vectors (a `size_class`): `gemv` or `small`, `wide`, or a library."""
    device, processors, memory = device_limits(index)
    found = tuned_shapes(device).get(tuning_key(layout, rows, columns, tokens))
    wide = tokens > 1 and has_warpgroups(index) and wide_supports(layout, columns)
    if wide and isinstance(found, WideShape) and found in wide_shapes(layout, tokens, columns, memory):
        return found
    if layout.multiplies if tokens == 1 else tokens <= FEW and layout.expands:
        return choose(
            device,
            layout,
            rows,
            columns,
            tokens,
            processors,
            memory,
            binary=counts_bits(index),
            clusters=starts_early(index),
        )
    if wide and not isinstance(found, Decode) and not decodes_first(layout, tokens):
        return wide_plan(layout, rows, columns, tokens, processors, memory)
    return Decode()


def build(
    layout: Layout, launch: Launch | WideShape, tokens: int, bfloat: bool, early: bool
) -> tuple[str, str, tuple[str, ...], bool]:
    """Source, name and options of a kernel, and whether it needs instructions of one architecture alone."""
    if isinstance(launch, WideShape):
        return wide_source(launch.tokens), "wide", wide_options(layout, launch, bfloat, early=True), True
    name = "gemv" if tokens == 1 else "small"
    options = options_of(layout, launch, tokens, bfloat, early)
    return source_of(*parts_of(name, launch.shape)), name, options, False


@lru_cache(maxsize=4096)
def _compiled(layout: Layout, launch: Launch | WideShape, tokens: int, bfloat: bool, index: int) -> Kernel:
    source, name, options, specific = build(layout, launch, tokens, bfloat, starts_early(index))
    return kernel(source, name, options, index, specific=specific)


@lru_cache(maxsize=256)
def _decoder(layout: Layout, columns: int, bfloat: bool, index: int) -> Kernel:
    options = decode_options(layout, bfloat, starts_early(index))
    return kernel(decode_source(layout, columns), "decode", options, index)


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def weight_of(layout: Layout, tensors: list[Tensor], rows: int, columns: int) -> Weight:
    """The tensors that a layout names, in its order, as an argument of a kernel."""
    given = iter(tensors)
    pointers = [next(given).data_ptr() if name else None for name in layout.names]
    return Weight(*pointers, rows, columns, layout.width, layout.groups)


def operand_of(layout: Layout, shape: Shape, tensors: list[Tensor], rows: int, columns: int) -> Weight | BulkWeight:
    """`weight_of`, for `gemv` in a shape."""
    weight = weight_of(layout, tensors, rows, columns)
    if not shape.bulk:
        return weight
    third = weight.zeros if layout.planes > 2 else None
    codes = [address for address in (weight.codes, weight.second, third) if address]
    return BulkWeight(weight, 0, maps_of(layout, codes, weight.scalars, rows, shape.item))


def aligned(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors, copied where they start at no multiple of 16 bytes (views into a larger buffer may)."""
    return [tensor if tensor.data_ptr() % 16 == 0 else tensor.clone() for tensor in tensors]


def waits_for_nothing(index: int, given: list[Tensor], tensors: list[Tensor]) -> bool:
    """Whether a kernel may read its weight while the kernel before it still runs: not where that one copied it."""
    return starts_early(index) and all(mine is one for mine, one in zip(tensors, given, strict=True))


@lru_cache(maxsize=256)
def _layout_fields(layout: Layout) -> tuple[int, ...]:
    present = sum(1 << i for i, name in enumerate(layout.names) if name)
    return (present, *(int(value) for value in astuple(layout)[:7]), *layout.numbers)


def layout_fields(layout: Layout) -> list[int]:
    """A layout as an op takes it."""
    return list(_layout_fields(layout))


def layout_from(fields: list[int]) -> Layout:
    """Inverse of `layout_fields`; names of tensors are lost."""
    present, kind, bits, scalars, asymmetric, group, width, groups, *numbers = fields
    names = tuple("?" if present >> i & 1 else "" for i in range(5))
    return Layout(kind, bits, scalars, bool(asymmetric), group, width, groups, names, tuple(numbers))  # type: ignore[arg-type]


def decode_into(out: Tensor, layout: Layout, weight: Weight, early: bool) -> None:
    """Decode a weight into `out` (rows, columns), contiguous; `early`: no kernel before this one writes the weight."""
    rows, columns = out.shape
    index = out.device.index
    run = _decoder(layout, columns, out.dtype == torch.bfloat16, index)
    grid = decode_grid(layout, rows, columns, device_limits(index)[1])
    run.launch(grid, SHAPE.threads, decode_shared(layout, columns), [weight, _pointer(out)], early=early)


def multiply_packed(
    x: Tensor, tensors: list[Tensor], bias: Tensor | None, layout: list[int], rows: int, columns: int
) -> Tensor:
    """x (m, columns), contiguous, times the packed weight: (m, rows). See `whit/kernels/cuda_linear.py`."""
    described, given, tensors = layout_from(layout), tensors, aligned(tensors)
    m, bfloat, index = x.shape[0], x.dtype == torch.bfloat16, x.device.index
    tokens = size_class(described, m)
    with torch.cuda.device(x.device):
        weight = weight_of(described, tensors, rows, columns)
        launch = choice(described, rows, columns, tokens, index)
        if isinstance(launch, Decode):
            dense = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
            decode_into(dense, described, weight, waits_for_nothing(index, given, tensors))
            return torch.nn.functional.linear(x, dense, bias)
        out = torch.empty(m, rows, dtype=x.dtype, device=x.device)
        if isinstance(launch, WideShape):
            x = x if x.data_ptr() % 16 == 0 else x.clone()
            boxes = tensor_map(x.data_ptr(), m, columns, launch.tokens, BOX)
            codes = boxes
            if stages_codes(described, launch):
                codes = tensor_map(tensors[0].data_ptr(), rows, columns // 2, 64 * launch.row_groups, BOX)
            early = waits_for_nothing(index, given, tensors)
            for shape, first, tiles in launch.parts(rows, m, device_limits(index)[1]):
                run, shared = _compiled(described, shape, tokens, bfloat, index), shared_bytes(described, shape)
                numbers = (ctypes.c_int(m), ctypes.c_int(first))
                arguments: list[Argument] = [boxes, codes, weight, _pointer(bias), _pointer(out), *numbers]
                run.launch(tiles * shape.splits, shape.threads, shared, arguments, early=early, cluster=shape.splits)
            return out
        run = _compiled(described, launch, tokens, bfloat, index)
        x = x if x.data_ptr() % 16 == 0 else x.clone()
        operand = operand_of(described, launch.shape, tensors, rows, columns) if m == 1 else weight
        arguments = [_pointer(x), operand, _pointer(bias), _pointer(out)]
        arguments += [ctypes.c_int(m)] * (m > 1) + [ctypes.c_int(launch.chunk), ctypes.c_int(launch.tiles)]
        threads, share = launch.shape.threads, launch.shape.share
        early = waits_for_nothing(index, given, tensors)
        run.launch(launch.grid, threads, launch.shared, arguments, early=early, cluster=share)
    return out


packed_product = torch.library.custom_op("whit::packed_product", multiply_packed, mutates_args=(), device_types="cuda")


@packed_product.register_fake
def _(x: Tensor, tensors: list[Tensor], bias: Tensor | None, layout: list[int], rows: int, columns: int) -> Tensor:
    return x.new_empty(x.shape[0], rows)


def decode_weight(tensors: list[Tensor], layout: list[int], rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """The dense weight (rows, columns) in float16 or bfloat16: `unpack().to(dtype)`, value for value."""
    described, given, tensors = layout_from(layout), tensors, aligned(tensors)
    out = torch.empty(rows, columns, dtype=dtype, device=tensors[0].device)
    with torch.cuda.device(out.device):
        early = waits_for_nothing(out.device.index, given, tensors)
        decode_into(out, described, weight_of(described, tensors, rows, columns), early)
    return out


decoded_weight = torch.library.custom_op("whit::decoded_weight", decode_weight, mutates_args=(), device_types="cuda")


@decoded_weight.register_fake
def _(tensors: list[Tensor], layout: list[int], rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return tensors[0].new_empty(rows, columns, dtype=dtype)
