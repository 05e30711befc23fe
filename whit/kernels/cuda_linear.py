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
    """How a kernel is launched: blocks, threads, stages of the ring, columns of x held at once, row tiles per round."""

    grid: int
    threads: int
    depth: int
    chunk: int
    tiles: int
    shared: int


@lru_cache(maxsize=64)
def source_of(name: str) -> str:
    """Source of a kernel, with what all share put before it."""
    folder = files("whit.kernels") / "cuda"
    return (folder / "common.cuh").read_text(encoding="utf-8") + (folder / f"{name}.cu").read_text(encoding="utf-8")


def plan_gemv(layout: Layout, rows: int, columns: int, processors: int, memory: int) -> Launch:
    """Launch of `gemv` on a device with `processors` multiprocessors of `memory` bytes of shared memory.

    Columns of x are cut into the fewest equal chunks that fit; the ring gets up to four stages of what is left.
    """
    item, stage = layout.item_columns, layout.stage_bytes
    tiles, across = -(-rows // 16), -(-columns // item)
    grid = min(tiles, processors)
    per_round = max(1, min(-(-tiles // grid), memory // 512 // across))
    flushes = 1 if layout.group % 128 == 0 else 2
    for chunks in range(1, across + 1):
        chunk = -(-across // chunks) * item
        fixed = chunk * 8 + chunk // 128 * flushes * 32 + per_round * across * 64
        for threads, depth in ((512, 4), (512, 3), (512, 2), (256, 2)):
            shared = fixed + threads // 32 * depth * stage
            if shared <= memory:
                return Launch(grid, threads, depth, chunk, per_round, shared)
    raise ValueError(f"no plan for {rows} x {columns} in {memory} bytes of shared memory")


def plan_small(layout: Layout, rows: int, columns: int, tokens: int, processors: int, memory: int) -> Launch:
    """Launch of `small` for `tokens` vectors (8, 16 or 32 after rounding up); as `plan_gemv`."""
    item, stage = layout.item_columns, layout.stage_bytes
    tiles, across = -(-rows // 16), -(-columns // item)
    grid = min(tiles, processors)
    per_round = min(-(-tiles // grid), 8)
    for chunks in range(1, across + 1):
        chunk = -(-across // chunks) * item
        marks = chunk * 2 + -(-chunk // 512) * 16 if layout.kind == 0 else 0
        for threads, depth in ((256, 4), (256, 3), (256, 2), (128, 2)):
            sums = (2 * threads // 32 + per_round) * 16 * (tokens + 1) * 4
            shared = chunk * tokens * 2 + marks + sums + threads // 32 * depth * stage
            if shared <= memory:
                return Launch(grid, threads, depth, chunk, per_round, shared)
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
    options = [*layout.defines(), f"-DBF16={int(bfloat)}", f"-DEARLY={int(_starts_early(index))}"]
    if name == "decode":
        launch = Launch(processors * 8, 256, 0, 0, 0, 0)
    elif name == "gemv":
        launch = plan_gemv(layout, rows, columns, processors, memory)
    else:
        launch = plan_small(layout, rows, columns, tokens, processors, memory)
        options.append(f"-DTILES={tokens // 8}")
    options += [f"-DTHREADS={launch.threads}", f"-DDEPTH={launch.depth}"]
    return kernel(source_of(name), name, tuple(options), index), launch


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


@torch.compiler.assume_constant_result  # type: ignore[misc]
@lru_cache(maxsize=16)
def _device_works(index: int) -> bool:
    """Whether kernels can be compiled for a device; says once why not."""
    if torch.version.cuda is None or torch.cuda.get_device_capability(index) < (8, 0):
        return False
    try:
        compiler_library()
    except CompilationError as error:
        warnings.warn(f"packed layers run in their plain version: {error}", stacklevel=2)
        return False
    return True


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
