"""LLM.int8() for many tokens on the warpgroup tensor cores of Hopper.

    mark_columns      ("dynamic") bits: does a column reach the threshold in a share of the tokens?
    split_tokens      codes and largest magnitudes of tokens; outlier columns of inputs and weight, side by side, 16 bit
    outlier_product   codes times codes, then outlier columns, as many as the device counted, in slices of 64

Buffers of outlier columns have room for every column, so that any number is right and nothing waits for the device. An
outlier column costs its share of a 16-bit product, twice that of an 8-bit one. The kernels are in `cuda/outlier_*.cu`.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from whit.kernels.cuda_ops import has_warpgroups
from whit.kernels.cuda_plan import source_of
from whit.kernels.launching import processors
from whit.kernels.nvrtc import Argument, Kernel, TensorMap, failed, kernel, tensor_map
from whit.kernels.outlier_gather import SLICE, prepare
from whit.kernels.outlier_launch import Weight

KIND = "LLM.int8() layers for many tokens"
"""As warnings name these kernels."""
THREADS = 384


@dataclass(frozen=True)
class WideTile:
    """Tile of `m` tokens x `n` rows, in slices of which `depth` are on their way."""

    m: int
    n: int
    depth: int
    group: int = 8

    @property
    def chunk(self) -> int:
        """Results of a token that a warp stores at a time."""
        return SLICE if self.n % SLICE == 0 else self.n // 2

    @property
    def shared(self) -> int:
        """Bytes of shared memory."""
        stride = self.chunk + 8 if self.chunk % 32 == 0 else self.chunk
        return self.depth * ((self.m + self.n) * 128 + 16) + 8 * 16 * stride * 2

    def tiles(self, tokens: int, rows: int) -> int:
        """Tiles of a product."""
        return -(-tokens // self.m) * -(-rows // self.n)


TILES = (WideTile(128, 256, 4), WideTile(128, 192, 5), WideTile(128, 128, 6))


@lru_cache(maxsize=1024)
def wide_tile(tokens: int, rows: int, many: int) -> WideTile:
    """The tile whose rounds over `many` multiprocessors compute least; of equals the largest."""
    return min(TILES, key=lambda tile: -(-tile.tiles(tokens, rows) // many) * tile.m * tile.n)


def wide_fits(x: Tensor, weight: Weight) -> bool:
    """Whether the kernels take these: Hopper, rows of whole 16 bytes, 16-bit weights of the type of the inputs."""
    if not x.is_cuda or weight.columns % 16 or weight.rows % 8 or weight.codes.data_ptr() % 16:
        return False
    if weight.wide is not None and weight.wide.dtype != x.dtype:
        return False
    return has_warpgroups(x.device.index) and not failed(KIND)


class Work(ctypes.Structure):
    """`Work` of the kernel."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("input_absmax", "absmax", "counts", "bias", "out")),
        *((name, ctypes.c_int) for name in ("tokens", "rows", "columns", "absmax_step", "group")),
    )


@lru_cache(maxsize=16)
def product_source(rows: int) -> str:
    """The CUDA C++ of the product for tiles of `rows` rows.

    The instructions name every sum, so their text depends on the number of rows. Descriptors: address over 16, 1024
    bytes between groups of eight lines, swizzled by 128 bytes; the next 32 bytes of a line are 2 on.
    """
    count = rows // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+r"(c[{i}])' for i in range(count))
    left, right, high, more = (f"%{count + i}" for i in range(4))

    def function(name: str, depth: int, kinds: str, signs: str) -> str:
        return f"""
__device__ __forceinline__ void {name}(u32 (&c)[N / 2], u32 left, u32 right, int more)
{{
    asm volatile("{{.reg .pred p; .reg .b64 a, b; setp.ne.s32 p, {more}, 0; "
        "mov.b64 a, {{{left}, {high}}}; mov.b64 b, {{{right}, {high}}}; "
        "wgmma.mma_async.sync.aligned.m64n{rows}k{depth}." {kinds} " {{{sums}}}, a, b, p{signs};}}"
        : {outputs} : "r"(left), "r"(right), "n"(0x40000040), "r"(more) : "memory");
}}
"""

    products = (
        function("codes_product", 32, '"s32.s8.s8"', ""),
        function("columns_product", 16, "HALVES", ", 1, 1, 0, 0"),
    )
    return source_of("words.cuh", "warpgroup.cuh") + "".join(products) + source_of("outlier_product.cu")


def product_options(
    tile: WideTile, *, bfloat: bool, loose: bool, placed: bool, bias: bool, early: bool
) -> tuple[str, ...]:
    """Preprocessor options of the product: which outlier columns there may be, and whether there is a bias."""
    values = {
        "M": tile.m,
        "N": tile.n,
        "DEPTH": tile.depth,
        "CHUNK": tile.chunk,
        "BF16": bfloat,
        "LOOSE": loose,
        "PLACED": placed,
        "BIAS": bias,
        "EARLY": early,
    }
    return tuple(f"-D{key}={int(value)}" for key, value in values.items())


@lru_cache(maxsize=64)
def _compiled(tile: WideTile, bfloat: bool, loose: bool, placed: bool, bias: bool, index: int) -> Kernel:
    options = product_options(tile, bfloat=bfloat, loose=loose, placed=placed, bias=bias, early=True)
    return kernel(product_source(tile.n), "outlier_product", options, index, specific=True)


def _map(matrix: Tensor, lines: int) -> TensorMap:
    words = matrix.shape[1] * matrix.element_size() // 2
    return tensor_map(matrix.data_ptr(), len(matrix), words, lines, SLICE)


def wide_product(
    tile: WideTile,
    rounded: Tensor,
    codes: Tensor,
    largest: Tensor,
    absmax: Tensor,
    loose: tuple[Tensor, Tensor] | None,
    placed: tuple[Tensor, Tensor] | None,
    counts: Tensor,
    bias: Tensor | None,
    out: Tensor,
    processors: int,
) -> None:
    """Product of codes and outlier columns into `out`.

    Args:
        rounded: int8 (tokens, columns). codes: int8 (rows, columns). largest: float32 (tokens,).
        loose: outlier columns of inputs (tokens, capacity) and of codes (rows, capacity) in 16 bit, capacity even.
        placed: likewise with their 16-bit weights.
        counts: int32 (2,): how many of each.
        bias: of the type of `out`.
    """
    left, right = _map(rounded, tile.m), _map(codes, tile.n)
    maps = [left, right]
    for pair in (loose, placed):
        maps += [left, right] if pair is None else [_map(pair[0], tile.m), _map(pair[1], tile.n)]
    work = Work(
        largest.data_ptr(),
        absmax.data_ptr(),
        counts.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        len(rounded),
        len(codes),
        codes.shape[1],
        0 if len(absmax) == 1 else 1,
        tile.group,
    )
    run = _compiled(
        tile, out.dtype == torch.bfloat16, loose is not None, placed is not None, bias is not None, out.device.index
    )
    arguments: list[Argument] = [*maps, work]
    grid = min(processors, tile.tiles(len(rounded), len(codes)))
    run.launch(grid, THREADS, tile.shared, arguments, early=True)


def wide_product_of(x: Tensor, weight: Weight, out: Tensor) -> None:
    """An LLM.int8() layer for many tokens into `out`; as `wide_layer`."""
    many = processors(x.device)
    with torch.cuda.device(x.device):
        wide_layer(x, weight, out, wide_tile(len(x), weight.rows, many), many)


def wide_layer(x: Tensor, weight: Weight, out: Tensor, tile: WideTile, many: int) -> None:
    """An LLM.int8() layer for many tokens into `out`.

    Raises:
        CompilationError: a kernel cannot be compiled or launched here; `out` may hold anything then.
    """
    x = x if x.data_ptr() % 16 == 0 else x.clone()
    ready = prepare(x, weight, many)
    bias = None if weight.bias is None else weight.bias.to(x.dtype)
    wide_product(
        tile, ready.rounded, weight.codes, ready.largest, weight.absmax, ready.loose, ready.placed, ready.counts,
        bias, out, many,
    )  # fmt: skip
