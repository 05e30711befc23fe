"""One code for several neighbouring weights: a codebook of short vectors per layer, a scale per row.

With groups of d = `width` consecutive columns and K = `codes` codewords,

    w[i, g d : (g + 1) d] = scale[i] * codeword(code[i, g]),    codeword(k + K/2) = -codeword(k) for k < K/2,

so half the codewords are stored, and the highest bit of a code is a sign. Their entries are whole numbers: int8 / 128,
or, if `ternary`, one of -1, 0, 1, five to a byte. A last group narrower than d uses the first entries of its codeword.

Stored bits per weight for n rows and m columns: log2(K) / d + 16 / m + 4 K d / (n m), or with ternary codewords
(d <= 5: 4 K / (n m), d <= 10: 8 K / (n m)) for the last term; plus padding of each row to eight codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from whit.formats.base import Format, Packed, TensorSpec, register_format
from whit.formats.bits import pack_codes, packed_width, unpack_codes
from whit.formats.trits import pack_trits, trit_bytes, unpack_trits

STEPS = 128  # a power of two: dividing by it is exact


@register_format
@dataclass(frozen=True)
class VectorCodebook(Format):
    """`codes` (4 to 256, a power of two) signed codewords of `width` entries, whole numbers / 128 or `ternary`."""

    name: ClassVar[str] = "vector-codebook"
    codes: int
    width: int
    ternary: bool

    def __post_init__(self) -> None:
        if self.codes not in (4, 8, 16, 32, 64, 128, 256):
            raise ValueError(f"codes must be a power of two from 4 to 256, got {self.codes!r}")
        if self.width < 1:
            raise ValueError(f"width must be at least 1, got {self.width!r}")

    @property
    def code_bits(self) -> int:
        """Bits of one code."""
        return self.codes.bit_length() - 1

    def groups(self, columns: int) -> int:
        """Number of column groups; the last may be narrower."""
        return -(-columns // self.width)

    def specs(self, rows: int, columns: int) -> dict[str, TensorSpec]:
        """codes uint8 (rows, packed), scales float16 (rows,), codebook (K/2, width) int8 or uint8 of packed trits."""
        packed = TensorSpec((self.codes // 2, trit_bytes(self.width)), torch.uint8)
        return {
            "codes": TensorSpec((rows, packed_width(self.groups(columns), self.code_bits)), torch.uint8),
            "scales": TensorSpec((rows,), torch.float16),
            "codebook": packed if self.ternary else TensorSpec((self.codes // 2, self.width), torch.int8),
        }

    def pack(self, codes: Tensor, scales: Tensor, codebook: Tensor, columns: int) -> Packed:
        """Store a weight.

        Args:
            codes: integers in [0, K), (rows, groups).
            scales: float16-rounded, (rows,).
            codebook: whole numbers in any dtype, (K/2, width): -127 ... 127, or -1, 0, 1 if ternary.
            columns: m.
        """
        stored = pack_trits(codebook.int() + 1) if self.ternary else codebook.to(torch.int8).contiguous()
        tensors = {
            "codes": pack_codes(codes, self.code_bits),
            "scales": scales.to(torch.float16).contiguous(),
            "codebook": stored,
        }
        return Packed(self, codes.shape[0], columns, tensors)

    def codewords(self, stored: Tensor) -> Tensor:
        """All K codewords of a stored codebook: float32 (K, width)."""
        half = unpack_trits(stored, self.width).float() - 1 if self.ternary else stored.float() / STEPS
        return torch.cat([half, -half])

    def unpack(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        """float32 (rows, columns) by the equation at the top of this file."""
        codes = unpack_codes(tensors["codes"], self.code_bits, self.groups(columns), torch.int64)
        words = self.codewords(tensors["codebook"])[codes].flatten(1)[:, :columns]
        return words * tensors["scales"].float().unsqueeze(1)

    def unpack_rows(self, tensors: Mapping[str, Tensor], rows: int, columns: int, index: Tensor) -> Tensor:
        """Only the asked rows are decoded."""
        part = {name: tensor if name == "codebook" else tensor[index] for name, tensor in tensors.items()}
        return self.unpack(part, len(index), columns)
