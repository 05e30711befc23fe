"""Dense packing of three-valued codes along the last axis: five to a byte, since 3^5 = 243 <= 256.

Code j of five is digit j of the byte in base 3, lowest first, so a trit takes 1.6 bits (log2 3 = 1.585). Rows are
padded with zeros to a multiple of five codes.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

PER_BYTE = 5


def trit_bytes(columns: int) -> int:
    """Bytes that a row of `columns` trits takes: ceil(columns / 5)."""
    return -(-columns // PER_BYTE)


def pack_trits(trits: Tensor) -> Tensor:
    """Pack codes 0, 1, 2 of any integer dtype (..., m): uint8 (..., trit_bytes(m))."""
    columns = trits.shape[-1]
    padded = torch.nn.functional.pad(trits.int(), (0, trit_bytes(columns) * PER_BYTE - columns))
    powers = 3 ** torch.arange(PER_BYTE, dtype=torch.int32, device=trits.device)
    return (padded.reshape(*trits.shape[:-1], trit_bytes(columns), PER_BYTE) * powers).sum(-1).to(torch.uint8)


def unpack_trits(packed: Tensor, columns: int) -> Tensor:
    """Inverse of `pack_trits`: uint8 (..., trit_bytes(columns)) -> int64 codes (..., columns)."""
    return _digits(packed.device)[packed.long()].flatten(-2)[..., :columns]


@lru_cache(maxsize=8)
def _digits(device: torch.device) -> Tensor:
    """int64 (256, 5): the base-3 digits of every byte."""
    values = torch.arange(256, device=device).unsqueeze(1)
    return values // 3 ** torch.arange(PER_BYTE, device=device) % 3
