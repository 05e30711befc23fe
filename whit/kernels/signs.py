"""Two-bit codes of two magnitudes, bit 0 = positive and bit 1 = the larger: sums over their patterns, and decoding.

Everything is held transposed, (columns, rows). On a CPU with numba, and on a GPU with NVRTC, each is one pass over the
codes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from whit.kernels.columns import nvrtc_found
from whit.kernels.cpu.compiling import runs_compiled, shared_out
from whit.kernels.nvrtc import attempted, failed, kernel

CUDA_THREADS = 128
# Blocks beside each other along the columns; and parts in which sums over columns are taken.
COLUMN_BLOCKS = 1024
SUM_PARTS = 32
_KIND = "sums over two-bit codes"


def signed_sums(products: Tensor, codes: Tensor) -> Tensor:
    """sum_c s_cr [code_cr is of that magnitude] products_ckr, s = -1 or 1, for both magnitudes.

    Args:
        products: float32 (columns, k, rows).
        codes: uint8 (columns, rows).

    Returns:
        float32 (k, 2, rows): smaller, larger magnitude.
    """
    if _on_cuda(products):
        found = _cuda_sums(products.contiguous(), codes.contiguous())
        if found is not None:
            return found
    if not _compiled(products):
        signed = products * patterns(codes).sum(0).unsqueeze(1)
        large = (codes > 1).unsqueeze(1)
        return torch.stack([(signed * ~large).sum(0), (signed * large).sum(0)], 1)
    return _sums_of_columns(products, codes, torch.arange(len(codes)))


@dataclass(frozen=True, eq=False)
class ColumnsAt:
    """Some columns of a matrix of codes.

    Attributes:
        codes: uint8 (columns, rows), of all. places: int64, numbers of these columns.
    """

    codes: Tensor
    places: Tensor

    @cached_property
    def own(self) -> Tensor:
        """Codes of these columns, gathered once."""
        return self.codes[self.places]


def signed_sums_at(products: Tensor, columns: ColumnsAt) -> Tensor:
    """`signed_sums` over some of the columns, which on a CPU with numba are read where they lie.

    Args:
        products: float32 (all columns, k, rows).
    """
    if _on_cuda(products) or not _compiled(products):
        return signed_sums(products[columns.places], columns.own)
    return _sums_of_columns(products, columns.codes, columns.places)


def _sums_of_columns(products: Tensor, codes: Tensor, places: Tensor) -> Tensor:
    from whit.kernels.cpu.signs import ROWS_PER_TILE, signed_sum_rows

    sums = torch.empty(products.shape[1], 2, products.shape[2])
    arrays = [item.contiguous().numpy() for item in (products, codes, places)] + [sums.numpy()]
    shared_out(lambda first, last: signed_sum_rows(*arrays, first, last), codes.shape[1], ROWS_PER_TILE)
    return sums


def patterns(codes: Tensor) -> Tensor:
    """-1 and 1 where a code is of the smaller, the larger magnitude, else 0: float32 (2, columns, rows)."""
    signs, large = (codes & 1).float().mul_(2).sub_(1), codes > 1
    upper = signs * large
    return torch.stack([signs.sub_(upper), upper])


def pattern_rows(codes: Tensor) -> Tensor:
    """`patterns` of each column side by side, (columns, 2 rows); on a GPU in bfloat16, which holds them exactly."""
    columns, rows = codes.shape
    if _on_cuda(codes):
        out = torch.empty(columns, 2 * rows, dtype=torch.bfloat16, device=codes.device)
        if _ran("pattern_rows", rows, min(columns, COLUMN_BLOCKS), (codes.contiguous(), out), (columns, rows)):
            return out
    if codes.dtype == torch.uint8 and runs_compiled(codes):
        from whit.kernels.cpu.signs import ROWS_PER_TILE, pattern_parts

        made = torch.empty(columns, 2 * rows)
        arrays = [codes.contiguous().numpy(), made.numpy()]
        shared_out(lambda first, last: pattern_parts(*arrays, first, last), columns, ROWS_PER_TILE)
        return made
    return patterns(codes).transpose(0, 1).reshape(columns, 2 * rows)


def decode_signs(codes: Tensor, low: Tensor, high: Tensor, book: Tensor) -> Tensor:
    """Values of the codes: float32 (columns, rows).

    Args:
        codes: uint8 (columns, rows).
        low, high: the two magnitudes, float32 (books, rows).
        book: int64 (columns,), which magnitudes a column uses.
    """
    if _on_cuda(low):
        values = torch.empty(codes.shape, device=codes.device)
        columns, rows = codes.shape
        tensors = (codes.contiguous(), low.contiguous(), high.contiguous(), book.contiguous(), values)
        if _ran("decode_signs", rows, min(columns, COLUMN_BLOCKS), tensors, (columns, rows)):
            return values
    if not _compiled(low):
        magnitude = torch.where(codes > 1, high[book], low[book])
        return torch.where(codes % 2 == 1, magnitude, -magnitude)
    from whit.kernels.cpu.signs import ROWS_PER_TILE, decode_rows

    values = torch.empty(codes.shape, dtype=torch.float32)
    arrays = [item.contiguous().numpy() for item in (codes, low, high, book)] + [values.numpy()]
    shared_out(lambda first, last: decode_rows(*arrays, first, last), codes.shape[1], ROWS_PER_TILE)
    return values


def _cuda_sums(products: Tensor, codes: Tensor) -> Tensor | None:
    """Sums over parts of the columns by the kernel, then over the parts: the same order on every run."""
    columns, count, rows = products.shape
    chunk = max(1, -(-columns // SUM_PARTS))
    parts = -(-columns // chunk)
    sums = torch.empty(parts, count, 2, rows, device=products.device)
    ran = _ran("signed_sums", rows, parts, (products, codes, sums), (columns, count, rows, chunk))
    return sums.sum(0) if ran else None


def _ran(name: str, rows: int, height: int, tensors: Sequence[Tensor], numbers: Sequence[int]) -> bool:
    """Run a kernel of signs.cu on blocks of rows, `height` of each; False if it cannot be compiled."""
    return attempted(_KIND, _launch, name, rows, height, tensors, numbers)


def _launch(name: str, rows: int, height: int, tensors: Sequence[Tensor], numbers: Sequence[int]) -> None:
    if not rows or not height:
        return
    device = tensors[0].device.index
    arguments: list[ctypes._SimpleCData[Any] | ctypes.Structure] = []
    arguments += [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    arguments += [ctypes.c_int(number) for number in (*numbers, height)]
    grid = -(-rows // CUDA_THREADS) * height
    with torch.cuda.device(device):
        kernel(cuda_source(), name, (f"-DTHREADS={CUDA_THREADS}",), device).launch(grid, CUDA_THREADS, 0, arguments)


@lru_cache(maxsize=1)
def cuda_source() -> str:
    """CUDA C++ of the kernels; THREADS is defined by the compiler's options."""
    return (files("whit.kernels") / "cuda" / "signs.cu").read_text(encoding="utf-8")


def _on_cuda(tensor: Tensor) -> bool:
    return tensor.is_cuda and tensor.dtype in (torch.float32, torch.uint8) and nvrtc_found() and not failed(_KIND)


def _compiled(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and runs_compiled(tensor)
