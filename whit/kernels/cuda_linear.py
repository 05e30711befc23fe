"""CUDA versions of the packed product, for float16 and bfloat16 inputs on compute capability 8.0 and above.

    one vector          `cuda/gemv.cu`    bit planes on the integer tensor cores
    2 to 32 vectors     `cuda/small.cu`   codes expanded in registers for the 16-bit tensor cores
    more                `cuda/decode.cu`  the weight decoded to 16 bits, then the library's matrix product

Stored tensors are read as they are: no second copy of a weight is kept. The ops are functional, have fake
implementations (torch.compile) and neither synchronise nor allocate anything but their result and, for more than 32
vectors, the decoded weight for the time of the product.

Bounds, with u the unit roundoff of the type of x (2^-11, 2^-8), against the product in exact arithmetic:
    gemv           |error| <= u |y| + 2^-20 sum_blocks max|x_b| sum_j |w_ij| + 2^-20 sum_j |w_ij x_j|
    small, decode  |error| <= u |y| + (u + 2^-20) sum_j |w_ij x_j|      (the u is the plain meaning's own rounding of w)
"""

from __future__ import annotations

import ctypes
import warnings
from dataclasses import astuple, dataclass
from functools import lru_cache
from importlib.resources import files

import torch
from torch import Tensor

from whit.formats.base import Packed
from whit.kernels.cuda_layout import Layout, layout_of
from whit.kernels.linear import Implementation, register_implementation
from whit.kernels.nvrtc import CompilationError, Kernel, compiler_library, kernel

FEW = 32
"""Most vectors that the kernels multiply without decoding the weight to memory."""


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


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched.

    `grid` blocks of `threads`; items of `item` columns in rings of `depth` stages; `chunk` columns of x held at once;
    `tiles` row tiles per round; `shared` bytes of shared memory; `unroll` blocks of 128 columns interleaved.
    """

    grid: int
    threads: int
    item: int = 128
    depth: int = 2
    chunk: int = 0
    tiles: int = 0
    shared: int = 0
    unroll: int = 1


@lru_cache(maxsize=64)
def source_of(*names: str) -> str:
    """The CUDA C++ of a kernel: its parts, one after the other."""
    folder = files("whit.kernels") / "cuda"
    return "".join((folder / name).read_text(encoding="utf-8") for name in names)


GEMV_SHAPES = ((768, 3), (768, 2), (512, 4), (512, 3), (512, 2), (256, 2))
"""Threads and stages to try, best first (measured on an H200; see docs/kernels.md)."""
SMALL_SHAPES = ((512, 3), (512, 2), (256, 3), (256, 2), (128, 2))


def plan_gemv(layout: Layout, rows: int, columns: int, processors: int, memory: int) -> Launch:
    """Launch of `gemv` on a device with `processors` multiprocessors of `memory` bytes of shared memory.

    Columns of x are cut into the fewest equal chunks that fit.
    """
    item = 512 if layout.bits <= 2 else 256 if layout.bits <= 4 else 128
    stage = layout.stage_bytes(item)
    tiles, across = -(-rows // 16), -(-columns // item)
    grid = min(tiles, processors)
    per_round = max(1, min(-(-tiles // grid), memory // 512 // across))
    kinds = 2 if layout.kind == 0 else 1
    flushes = 1 if layout.group % 128 == 0 else 2
    # of x, per block of 128 columns: operand words and pairs of floats
    block = (1152 if layout.bits == 3 else 256 * kinds) + 32 * kinds if layout.bitwise else 1024 + 32 * flushes
    for chunks in range(1, across + 1):
        chunk = -(-across // chunks) * item
        for threads, depth in GEMV_SHAPES:
            shared = chunk // 128 * block + per_round * across * 64 + threads // 32 * depth * stage
            if shared <= memory:
                return Launch(grid, threads, item, depth, chunk, per_round, shared, unroll=4)
    raise ValueError(f"no plan for {rows} x {columns} in {memory} bytes of shared memory")


def plan_small(layout: Layout, rows: int, columns: int, tokens: int, processors: int, memory: int) -> Launch:
    """Launch of `small` for `tokens` vectors (8, 16 or 32 after rounding up); as `plan_gemv`."""
    item = 128 if layout.bits == 8 else 256
    stage = layout.stage_bytes(item)
    tiles, across = -(-rows // 16), -(-columns // item)
    grid = min(tiles, processors)
    cells = 16 * (tokens + 1) * 4
    for chunks in range(1, across + 1):
        chunk = -(-across // chunks) * item
        per_round = min(-(-tiles // grid), 16 if chunks > 1 else 1 << 20)
        marks = chunk * 2 + -(-chunk // 512) * 16 if layout.kind == 0 else 0
        totals = per_round * cells if chunks > 1 else 0
        for threads, depth in SMALL_SHAPES:
            shared = chunk * tokens * 2 + marks + threads // 32 * (cells + depth * stage) + totals
            if shared <= memory:
                return Launch(grid, threads, item, depth, chunk, per_round, shared, unroll=2)
    raise ValueError(f"no plan for {rows} x {columns} in {memory} bytes of shared memory")


@lru_cache(maxsize=16)
def _device_limits(index: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(index)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin


def _starts_early(index: int) -> bool:
    """Whether the device has programmatic dependent launch."""
    return torch.cuda.get_device_capability(index) >= (9, 0)


@lru_cache(maxsize=4096)
def _prepared(
    name: str, layout: Layout, rows: int, columns: int, tokens: int, bfloat: bool, index: int
) -> tuple[Kernel, Launch]:
    processors, memory = _device_limits(index)
    if name == "decode":
        launch, parts = Launch(processors * 8, 256), ["common.cuh", "decode.cu"]
    elif name == "gemv":
        launch = plan_gemv(layout, rows, columns, processors, memory)
        parts = ["common.cuh", "group.cuh", "bits.cuh" if layout.bitwise else "limbs.cuh", "gemv.cu"]
    else:
        launch = plan_small(layout, rows, columns, tokens, processors, memory)
        parts = ["common.cuh", "small.cu"]
    values = {
        "BF16": bfloat,
        "EARLY": _starts_early(index),
        "BITWISE": layout.bitwise,
        "TILES": tokens // 8,
        "PIECE": layout.piece(launch.item),
        "THREADS": launch.threads,
        "ITEM": launch.item,
        "DEPTH": launch.depth,
        "UNROLL": launch.unroll,
    }
    options = (*layout.defines(), *(f"-D{key}={int(value)}" for key, value in values.items()))
    return kernel(source_of(*parts), name, options, index), launch


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
    return [int(value) for value in astuple(layout)[:-1]]


def _layout_from(fields: list[int]) -> Layout:
    kind, bits, scalars, asymmetric, group, width, groups = fields
    names = {0: ("c", "2", "m", "s", ""), 1: ("c", "", "", "s", ""), 2: ("c", "", "", "s", "z" if asymmetric else "")}
    return Layout(kind, bits, scalars, bool(asymmetric), group, width, groups, names[kind])


@torch.library.custom_op("whit::packed_product", mutates_args=(), device_types="cuda")
def packed_product(
    x: Tensor, tensors: list[Tensor], bias: Tensor | None, layout: list[int], rows: int, columns: int
) -> Tensor:
    """x (m, columns), 1 <= m <= 32, contiguous, times the packed weight: (m, rows). See the top of this file."""
    described, tensors = _layout_from(layout), _aligned(tensors)
    m, bfloat = x.shape[0], x.dtype == torch.bfloat16
    out = torch.empty(m, rows, dtype=x.dtype, device=x.device)
    with torch.cuda.device(x.device):
        weight = _weight(described, tensors, rows, columns)
        tokens = 8 if m <= 8 else 16 if m <= 16 else 32
        name = "gemv" if m == 1 else "small"
        run, launch = _prepared(name, described, rows, columns, 0 if m == 1 else tokens, bfloat, x.device.index)
        sizes = [ctypes.c_int(launch.chunk), ctypes.c_int(launch.tiles)]
        if m > 1:
            sizes.insert(0, ctypes.c_int(m))
        run.launch(
            launch.grid,
            launch.threads,
            launch.shared,
            [_pointer(x), weight, _pointer(bias), _pointer(out), *sizes],
            early=_starts_early(x.device.index),
        )
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
        run, launch = _prepared("decode", described, 0, 0, 0, dtype == torch.bfloat16, device.index)
        run.launch(
            launch.grid, launch.threads, 0, [_weight(described, tensors, rows, columns), ctypes.c_void_p(out.data_ptr())]
        )
    return out


@decoded_weight.register_fake
def _(tensors: list[Tensor], layout: list[int], rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return tensors[0].new_empty(rows, columns, dtype=dtype)


@lru_cache(maxsize=16)
def _probed(index: int) -> bool:
    if torch.version.cuda is None or torch.cuda.get_device_capability(index) < (8, 0):
        return False
    try:
        compiler_library()
    except CompilationError as error:
        warnings.warn(f"packed layers run in their plain version: {error}", stacklevel=2)
        return False
    return True


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _device_works(index: int) -> bool:
    """Whether kernels can be compiled for a device; says once why not."""
    return _probed(index)


def _usable(x: Tensor, packed: Packed) -> Layout | None:
    if x.device.type != "cuda" or x.dtype not in (torch.float16, torch.bfloat16):
        return None
    if x.shape[-1:] != (packed.columns,) or min(packed.rows, packed.columns) == 0:
        return None
    if torch.is_grad_enabled() and x.requires_grad:  # the plain version has a derivative
        return None
    if any(tensor.device != x.device or not tensor.is_contiguous() for tensor in packed.tensors.values()):
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
    out = torch.ops.whit.packed_product(flat, tensors, bias, layout, packed.rows, packed.columns)
    return out.reshape(*x.shape[:-1], packed.rows)


def _decoded_product(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    tensors, layout = _arguments(packed)
    weight = torch.ops.whit.decoded_weight(tensors, layout, packed.rows, packed.columns, x.dtype)
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def register() -> None:
    """Offer the kernels for the formats they read; the last one registered is asked first."""
    for name in ("binary-residual", "level-table", "grouped-integer"):
        register_implementation(name, Implementation("cuda decode + matmul", _supports_many, _decoded_product))
        register_implementation(name, Implementation("cuda tensor-core product", _supports_few, _product))
        register_implementation(name, Implementation("cuda bit-plane gemv", _supports_one, _product))
