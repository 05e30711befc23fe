"""Tiles of products in Triton kernels: their order, and how their operands are fetched."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


def described(matrix: Tensor, block: list[int]) -> TensorDescriptor:
    """A matrix as the copy engine takes it, in blocks (rows, columns)."""
    return TensorDescriptor.from_tensor(matrix, block)


@triton.jit
def tile_start(tile, tokens, rows, M: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr):
    """First token and first row of a tile: GROUP tiles of tokens are taken before the next rows."""
    down, across = tl.cdiv(tokens, M), tl.cdiv(rows, N)
    band = tile // (GROUP * across)
    height = tl.minimum(down - band * GROUP, GROUP)
    inner = tile % (GROUP * across)
    return (band * GROUP + inner % height) * M, (inner // height) * N


@triton.jit
def operand(
    source, first, start, limit, columns, R: tl.constexpr, C: tl.constexpr, DESCRIPTOR: tl.constexpr, EVEN: tl.constexpr
):
    """A tile (R, C) of a matrix (limit, columns), zeros beyond its ends."""
    if DESCRIPTOR:
        return source.load([first, start])
    else:
        row = first + tl.arange(0, R)
        column = start + tl.arange(0, C)
        pointers = source + row.to(tl.int64)[:, None] * columns + column[None, :]
        if EVEN:
            return tl.load(pointers, mask=(row < limit)[:, None], other=0.0)
        else:
            return tl.load(pointers, mask=(row < limit)[:, None] & (column < columns)[None, :], other=0.0)
