"""Packed weights as GGUF block types, exactly or not at all.

A block of 32 (ternary types: 256) consecutive weights of a row shares a float16 scale d (Q4_1 also a float16 m):

    TQ1_0, TQ2_0    w = d * {-1, 0, 1}               1.6875 and 2.0625 stored bits
    Q4_0            w = d * (q - 8),   4-bit q       4.5
    Q4_1            w = d * q + m,     4-bit q       5.0
    Q5_0            w = d * (q - 16),  5-bit q       5.5
    Q8_0            w = d * q,         8-bit q       8.5

(https://github.com/ggml-org/ggml, types and layouts). A weight of whit's grouped integers is s * k with k a whole
number, code - zero. It fits the types without a minimum if every k is in their range and each block lies in one group;
so 4-bit codes with zero points (k from -15 to 15) are exact in Q5_0. Q4_1 fits where a whole offset o brings k + o into
[0, 15] with s * o exact in float16. The ternary types are recognised by the values alone, whatever the layout. Every
encoding is decoded again by the gguf package and compared bit by bit before it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from whit.formats.base import Format, Packed
from whit.formats.bits import unpack_codes
from whit.formats.grouped_integer import GroupedInteger

BLOCK = 32
TERNARY_BLOCK = 256
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Multiples:
    """Weights as whole multiples of a scale per block of 32.

    Attributes:
        numbers: int16 (blocks, 32), row after row.
        scales: float16 (blocks, 1).
        rows: of the matrix.
    """

    numbers: NDArray[np.int16]
    scales: NDArray[np.float16]
    rows: int

    def within(self, low: int, high: int) -> bool:
        """Whether every number is in [low, high]."""
        return bool(self.numbers.min() >= low and self.numbers.max() <= high)

    def join(self, *parts: NDArray[np.generic]) -> Bytes:
        """Blocks of bytes made of `parts` (blocks, ...): uint8 (rows, bytes)."""
        blocks = [np.ascontiguousarray(part).view(np.uint8).reshape(len(self.numbers), -1) for part in parts]
        return np.concatenate(blocks, axis=1).reshape(self.rows, -1)


MultiplesOf = Callable[[Packed], Multiples | None]
_READERS: dict[str, MultiplesOf] = {}


def reads_multiples(format_name: str) -> Callable[[MultiplesOf], MultiplesOf]:
    """Decorator: the function reads packed weights of that format as `Multiples` (None: their blocks do not fit)."""

    def register(reader: MultiplesOf) -> MultiplesOf:
        _READERS[format_name] = reader
        return reader

    return register


@reads_multiples("grouped-integer")
def _grouped_integer(packed: Packed) -> Multiples | None:
    layout, rows, columns = packed.format, packed.rows, packed.columns
    assert isinstance(layout, GroupedInteger)
    if columns % BLOCK or layout.group_size % BLOCK:
        return None
    groups, bits = layout.groups(columns), layout.bits
    codes = unpack_codes(packed.tensors["codes"], bits, columns, torch.int16)
    scales = packed.tensors["scales"]
    group = torch.arange(columns) // (layout.group_size or columns)
    if not layout.symmetric:
        zeros = unpack_codes(packed.tensors["zeros"], bits, rows * groups, torch.int16).reshape(rows, groups)
        numbers = codes - zeros[:, group]
    else:
        numbers = codes - 2 ** (bits - 1) if bits > 1 else 2 * codes - 1
    blocks = scales[:, group[::BLOCK]]
    return Multiples(numbers.numpy().reshape(-1, BLOCK), blocks.contiguous().numpy().reshape(-1, 1), rows)


def _q4_0(packed: Packed, found: Multiples | None) -> Bytes | None:
    if found is None or not found.within(-8, 7):
        return None
    return found.join(found.scales, _nibbles(found.numbers + 8))


def _q4_1(packed: Packed, found: Multiples | None) -> Bytes | None:
    if found is None:
        return None
    low, high = found.numbers.min(1, keepdims=True), found.numbers.max(1, keepdims=True)
    offsets = np.full(low.shape, -1, dtype=np.int16)
    for offset in range(16):
        minimum = (found.scales.astype(np.float64) * -offset).astype(np.float16)
        exact = minimum.astype(np.float64) == found.scales.astype(np.float64) * -offset
        offsets[(offsets < 0) & exact & (low + offset >= 0) & (high + offset <= 15)] = offset
    if bool((offsets < 0).any()):
        return None
    minimum = (found.scales.astype(np.float64) * -offsets).astype(np.float16)
    return found.join(found.scales, minimum, _nibbles(found.numbers + offsets))


def _q5_0(packed: Packed, found: Multiples | None) -> Bytes | None:
    if found is None or not found.within(-16, 15):
        return None
    codes = (found.numbers + 16).astype(np.uint8)
    return found.join(found.scales, np.packbits(codes >> 4, axis=1, bitorder="little"), _nibbles(codes & 15))


def _q8_0(packed: Packed, found: Multiples | None) -> Bytes | None:
    if found is None or not found.within(-128, 127):
        return None
    return found.join(found.scales, found.numbers.astype(np.int8))


def _ternary(name: str) -> Callable[[Packed, Multiples | None], Bytes | None]:
    def encode(packed: Packed, found: Multiples | None) -> Bytes | None:
        import gguf

        if packed.columns % TERNARY_BLOCK:
            return None
        values = packed.unpack().reshape(-1, TERNARY_BLOCK)
        scale = values.abs().amax(1, keepdim=True)
        if not bool(((values == 0) | (values.abs() == scale)).all() and (scale.half().float() == scale).all()):
            return None
        matrix = values.reshape(packed.rows, packed.columns).numpy()
        encoded: Bytes = gguf.quantize(matrix, gguf.GGMLQuantizationType[name])
        return encoded

    return encode


def _nibbles(codes: NDArray[np.integer]) -> Bytes:
    """4-bit codes (blocks, 32) as bytes (blocks, 16): the first half in the low nibbles, the second in the high."""
    small = codes.astype(np.uint8)
    both: Bytes = small[:, : BLOCK // 2] | (small[:, BLOCK // 2 :] << np.uint8(4))
    return both


#: Block types in the order of their stored bits: the first that is exact is used.
BLOCK_TYPES: dict[str, Callable[[Packed, Multiples | None], Bytes | None]] = {
    "TQ1_0": _ternary("TQ1_0"),
    "TQ2_0": _ternary("TQ2_0"),
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q8_0": _q8_0,
}


def exact_blocks(packed: Packed, prefer: str | None = None) -> tuple[str, Bytes] | None:
    """The smallest block type that holds a packed weight exactly, and its bytes: uint8 (rows, bytes); None: none does.

    With `prefer`, that type where it is exact.

    Needs the gguf package.
    """
    import gguf

    if packed.format.changes_inputs:
        return None
    reader = _READERS.get(packed.format.name)
    found = None if reader is None else reader(packed)
    values = packed.unpack().numpy()
    for name in sorted(BLOCK_TYPES, key=lambda name: name != prefer):  # stable: the others keep their order
        encoded = BLOCK_TYPES[name](packed, found)
        if encoded is not None and np.array_equal(
            gguf.dequantize(encoded, gguf.GGMLQuantizationType[name]).reshape(values.shape), values
        ):
            return name, encoded
    return None


def exact_halves(packed: Packed) -> Bytes | None:
    """A packed weight as F16, uint8 (rows, bytes), if that is exact and takes at most twice what is stored.

    That is for pruned weights: GGUF has no sparse type. What is smaller by more is not blown up behind one's back.
    """
    if packed.format.changes_inputs or packed.stored_bytes() < packed.rows * packed.columns:
        return None
    values = packed.unpack()
    halves = values.half()
    if not torch.equal(halves.float(), values):
        return None
    dense: Bytes = halves.contiguous().view(torch.uint8).numpy()
    return dense


def why_not(layout: Format, columns: int) -> str:
    """Why no block type is exact for a layer, for one line of text."""
    if layout.changes_inputs:
        return "GGUF stores weights, and this layer also rounds its inputs"
    if columns % BLOCK:
        return f"GGUF blocks are {BLOCK} columns wide, and {columns} columns are not a multiple"
    group = getattr(layout, "group_size", 0)
    if group % BLOCK:
        return f"GGUF blocks are {BLOCK} columns wide, and a group of {group} is not a multiple"
    return f"none of {', '.join(BLOCK_TYPES)} gives back its weights exactly"
