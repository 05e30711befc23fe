"""Which kernel a product with a packed weight takes on CUDA, compiled, and the weight as the kernels take it."""

from __future__ import annotations

import ctypes
from dataclasses import astuple
from functools import lru_cache

import torch
from torch import Tensor

from whit.kernels.cuda_bulk import Maps, maps_of
from whit.kernels.cuda_decode import decode_options, decode_source
from whit.kernels.cuda_layout import Layout
from whit.kernels.cuda_plan import Launch, choose
from whit.kernels.cuda_shapes import Shape
from whit.kernels.cuda_sources import options_of, parts_of, source_of, wide_source
from whit.kernels.cuda_tuned import tuned_shapes, tuning_key
from whit.kernels.cuda_wide import Decode, WideShape, bucket, wide_options, wide_supports
from whit.kernels.cuda_wide_plan import decodes_first, wide_plan, wide_shapes
from whit.kernels.nvrtc import Kernel, kernel

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
    few = layout.multiplies if tokens == 1 else tokens <= FEW and layout.expands
    if few and (isinstance(found, Shape) or not wide):
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
    if wide and not (layout.decodes and (isinstance(found, Decode) or decodes_first(layout, tokens))):
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
def compiled(layout: Layout, launch: Launch | WideShape, tokens: int, bfloat: bool, index: int) -> Kernel:
    """The kernel of a launch."""
    source, name, options, specific = build(layout, launch, tokens, bfloat, starts_early(index))
    return kernel(source, name, options, index, specific=specific)


@lru_cache(maxsize=256)
def decoder(layout: Layout, columns: int, bfloat: bool, index: int) -> Kernel:
    """`decode` for weights of a layout and width."""
    options = decode_options(layout, bfloat, starts_early(index))
    return kernel(decode_source(layout, columns), "decode", options, index)


def address_of(tensor: Tensor | None) -> int:
    """Where a tensor lies; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


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
