"""Two-bit codes of two magnitudes, bit 0 = positive and bit 1 = the larger: sums over their patterns, and decoding.

Everything is held transposed, (columns, rows). On a CPU with numba each is one pass over the codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from whit.kernels.cpu.compiling import runs_compiled, shared_out


def signed_sums(products: Tensor, codes: Tensor) -> Tensor:
    """sum_c s_cr [code_cr is of that magnitude] products_ckr, s = -1 or 1, for both magnitudes.

    Args:
        products: float32 (columns, k, rows).
        codes: uint8 (columns, rows).

    Returns:
        float32 (k, 2, rows): smaller, larger magnitude.
    """
    if not _compiled(products):
        signed = products * patterns(codes).sum(0).unsqueeze(1)
        large = (codes > 1).unsqueeze(1)
        return torch.stack([(signed * ~large).sum(0), (signed * large).sum(0)], 1)
    from whit.kernels.cpu.signs import ROWS_PER_TILE, signed_sum_rows

    sums = torch.empty(products.shape[1], 2, products.shape[2])
    arrays = [item.contiguous().numpy() for item in (products, codes)] + [sums.numpy()]
    shared_out(lambda first, last: signed_sum_rows(*arrays, first, last), codes.shape[1], ROWS_PER_TILE)
    return sums


def patterns(codes: Tensor) -> Tensor:
    """-1 and 1 where a code is of the smaller, the larger magnitude, else 0: float32 (2, columns, rows)."""
    signs, large = (codes & 1).float().mul_(2).sub_(1), codes > 1
    upper = signs * large
    return torch.stack([signs.sub_(upper), upper])


def decode_signs(codes: Tensor, low: Tensor, high: Tensor, book: Tensor) -> Tensor:
    """Values of the codes: float32 (columns, rows).

    Args:
        codes: uint8 (columns, rows).
        low, high: the two magnitudes, float32 (books, rows).
        book: int64 (columns,), which magnitudes a column uses.
    """
    if not _compiled(low):
        magnitude = torch.where(codes > 1, high[book], low[book])
        return torch.where(codes % 2 == 1, magnitude, -magnitude)
    from whit.kernels.cpu.signs import ROWS_PER_TILE, decode_rows

    values = torch.empty(codes.shape, dtype=torch.float32)
    arrays = [item.contiguous().numpy() for item in (codes, low, high, book)] + [values.numpy()]
    shared_out(lambda first, last: decode_rows(*arrays, first, last), codes.shape[1], ROWS_PER_TILE)
    return values


def _compiled(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and runs_compiled(tensor)
