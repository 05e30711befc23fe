"""LLM.int8() for many tokens on the warpgroup tensor cores of Hopper.

    mark_columns      ("dynamic") bits: does a column reach the threshold in a share of the tokens?
    split_tokens      codes and largest magnitudes of tokens; outlier columns of inputs and weight, side by side, 16 bit
    outlier_product   codes times codes, then outlier columns, as many as the device counted, in slices of 64

Buffers of outlier columns have room for every column, so that any number is right and nothing waits for the device. An
outlier column costs its share of a 16-bit product, twice that of an 8-bit one. The kernels are in `cuda/outlier_*.cu`.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from whit.formats.outlier_int8 import LEVELS
from whit.kernels.cuda_ops import aligned, has_warpgroups
from whit.kernels.cuda_sources import source_of
from whit.kernels.launching import processors
from whit.kernels.nvrtc import Argument, Kernel, TensorMap, kernel, tensor_map
from whit.kernels.outlier_gather import SLICE, Prepared, prepare
from whit.kernels.outlier_launch import Weight

THREADS = 384


@dataclass(frozen=True)
class WideTile:
    """Tile of `m` tokens x `n` rows, in slices of which `depth` are on their way.

    A warp stores `chunk` results of a token at a time; `group` tiles of m are taken before the next n.
    """

    m: int
    n: int
    depth: int
    chunk: int
    group: int = 8

    @property
    def shared(self) -> int:
        """Bytes of shared memory."""
        return self.depth * ((self.m + self.n) * 128 + 16) + 16 * self.n + 8 * 16 * (self.chunk + 8) * 2

    def tiles(self, tokens: int, rows: int) -> int:
        """Tiles of a product."""
        return -(-tokens // self.m) * -(-rows // self.n)


TILES = {
    WideTile(256, 128, 4, 64): 1.0,
    WideTile(128, 256, 4, 64): 1.0,
    WideTile(256, 176, 4, 16): 1.0,
    WideTile(128, 192, 5, 64): 1.03,
    WideTile(128, 128, 6, 64): 1.15,
    WideTile(128, 96, 6, 32): 1.25,
    WideTile(128, 64, 8, 64): 1.3,
}
"""Tiles, and how much longer than with the best a result takes with each, as measured on an H200."""


@lru_cache(maxsize=1024)
def wide_tile(tokens: int, rows: int, many: int) -> WideTile:
    """The tile whose rounds over `many` multiprocessors take least; of equals the first."""
    return min(TILES, key=lambda tile: -(-tile.tiles(tokens, rows) // many) * tile.m * tile.n * TILES[tile])


def fits(x: Tensor, codes: Tensor) -> bool:
    """Whether the product takes codes (rows, columns): on Hopper, rows and results of whole 16 bytes."""
    rows, columns = codes.shape
    return x.is_cuda and columns % 16 == 0 and rows % 8 == 0 and has_warpgroups(x.device.index)


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
    return source_of("words.cuh", "barriers.cuh", "warpgroup.cuh") + "".join(products) + source_of("outlier_product.cu")


@dataclass(frozen=True)
class Variant:
    """What the product is compiled for.

    The type of inputs and outputs, which outlier columns there may be, whether there is a bias, by what magnitudes are
    divided to give scales, and whether codes of the weight may be asked for before the kernel ahead has ended.
    """

    bfloat: bool
    loose: bool = False
    placed: bool = False
    bias: bool = False
    levels: int = LEVELS
    ahead: bool = True


def product_options(tile: WideTile, variant: Variant, *, early: bool) -> tuple[str, ...]:
    """Preprocessor options of the product."""
    values = {
        "M": tile.m,
        "N": tile.n,
        "DEPTH": tile.depth,
        "CHUNK": tile.chunk,
        "BF16": variant.bfloat,
        "LOOSE": variant.loose,
        "PLACED": variant.placed,
        "BIAS": variant.bias,
        "LEVELS": variant.levels,
        "AHEAD": variant.ahead,
        "EARLY": early,
    }
    return tuple(f"-D{key}={int(value)}" for key, value in values.items())


@lru_cache(maxsize=64)
def _compiled(tile: WideTile, variant: Variant, index: int) -> Kernel:
    options = product_options(tile, variant, early=True)
    return kernel(product_source(tile.n), "outlier_product", options, index, specific=True)


def _map(matrix: Tensor, lines: int) -> TensorMap:
    words = matrix.shape[1] * matrix.element_size() // 2
    return tensor_map(matrix.data_ptr(), len(matrix), words, lines, SLICE)


def wide_product(
    tile: WideTile,
    ready: Prepared,
    codes: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    levels: int = LEVELS,
    ahead: bool = True,
) -> None:
    """Product of codes, and of outlier columns, into `out`.

    Args:
        tile: launch shape.
        ready: tokens and outlier columns.
        codes: int8 (rows, columns).
        absmax: float32 (rows,) or (1,): scales of rows times `levels`, as `ready.largest` are of tokens.
        bias: of the type of `out`.
        ahead: no kernel that may still run writes the codes.
    """
    left, right = _map(ready.rounded, tile.m), _map(codes, tile.n)
    maps = [left, right]
    for pair in (ready.loose, ready.placed):
        maps += [left, right] if pair is None else [_map(pair[0], tile.m), _map(pair[1], tile.n)]
    counts, bfloat = ready.counts, out.dtype == torch.bfloat16
    tensors = (ready.largest, absmax, counts, bias, out)
    sizes = (*out.shape, codes.shape[1], int(len(absmax) > 1), tile.group)
    work = Work(*(None if tensor is None else tensor.data_ptr() for tensor in tensors), *sizes)
    variant = Variant(bfloat, ready.loose is not None, ready.placed is not None, bias is not None, levels, ahead)
    arguments: list[Argument] = [*maps, work]
    grid = min(processors(out.device), tile.tiles(*out.shape))
    run = _compiled(tile, variant, out.device.index)
    run.launch(grid, THREADS, tile.shared, arguments, early=True)


def wide_layer(x: Tensor, weight: Weight, out: Tensor, tile: WideTile | None = None) -> None:
    """An LLM.int8() layer for many tokens into `out`.

    Raises:
        CompilationError: a kernel cannot be compiled or launched here; `out` may hold anything then.
    """
    many = processors(x.device)
    x, codes = aligned([x, weight.codes])
    there = codes is weight.codes  # and not being copied when the product starts
    weight = replace(weight, codes=codes)
    bias = None if weight.bias is None else weight.bias.to(x.dtype)
    with torch.cuda.device(x.device):
        ready = prepare(x, weight, many)
        wide_product(tile or wide_tile(*out.shape, many), ready, weight.codes, weight.absmax, bias, out, ahead=there)
