"""Dense little-endian packing of small unsigned integers along the last axis.

Eight consecutive codes of `bits` bits each fill exactly `bits` bytes: code j of the eight occupies bits
[j*bits, (j+1)*bits) of that little-endian group. For 1, 2, 4 and 8 bits this is the usual layout of 8, 4, 2 and 1
codes per byte, lowest bits first; for 3, 5, 6 and 7 bits codes cross byte borders. Rows are padded to a multiple
of eight codes with zeros, so a row of m codes takes ceil(m / 8) * bits bytes.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def packed_width(columns: int, bits: int) -> int:
    """Bytes that a row of `columns` codes of `bits` bits takes: ceil(columns / 8) * bits."""
    return -(-columns // 8) * bits


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack integer codes in [0, 2**bits).

    Args:
        codes: any integer or bool dtype, shape (..., m).
        bits: 1 to 8.

    Returns:
        uint8 tensor of shape (..., packed_width(m, bits)).
    """
    columns = codes.shape[-1]
    groups = -(-columns // 8)
    padded = torch.nn.functional.pad(codes.to(torch.uint8), (0, groups * 8 - columns))
    if bits == 8:
        return padded.contiguous()
    padded = padded.reshape(*codes.shape[:-1], groups, 8)
    out = torch.zeros(*codes.shape[:-1], groups, bits, dtype=torch.int16, device=codes.device)
    for position in range(8):
        byte, shift = divmod(position * bits, 8)
        value = padded[..., position].to(torch.int16) << shift
        out[..., byte] |= value & 0xFF
        if shift + bits > 8:
            out[..., byte + 1] |= value >> 8
    return out.to(torch.uint8).reshape(*codes.shape[:-1], groups * bits)


def unpack_codes(packed: Tensor, bits: int, columns: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Inverse of `pack_codes`: uint8 (..., packed_width(columns, bits)) -> codes (..., columns) of `dtype`.

    Asking for the dtype that is needed next saves a pass over the codes.
    """
    shape = packed.shape[:-1]
    if bits == 8:
        return packed[..., :columns].to(dtype)
    if 8 % bits == 0:
        rows = _byte_table(bits, dtype, packed.device).index_select(0, packed.reshape(-1).int())
        return rows.reshape(*shape, packed.shape[-1] * 8 // bits)[..., :columns]
    groups = packed.shape[-1] // bits
    wide = packed.reshape(*shape, groups, bits).to(torch.int16)
    mask = (1 << bits) - 1
    codes = torch.empty(*shape, groups, 8, dtype=dtype, device=packed.device)
    for position in range(8):
        byte, shift = divmod(position * bits, 8)
        value = wide[..., byte] >> shift
        if shift + bits > 8:
            value = value | (wide[..., byte + 1] << (8 - shift))
        codes[..., position] = value & mask
    return codes.flatten(-2)[..., :columns]


@lru_cache(maxsize=32)
def _byte_table(bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Table (256, 8 // bits): the codes each byte value holds. One gather replaces shifts and masks."""
    values = torch.arange(256, device=device).unsqueeze(1)
    shifts = torch.arange(0, 8, bits, device=device).unsqueeze(0)
    return ((values >> shifts) & ((1 << bits) - 1)).to(dtype)
