"""What `outlier_wide` multiplies: tokens rounded, outlier columns side by side (`cuda/outlier_split.cu`)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from whit.kernels.cuda_sources import source_of
from whit.kernels.nvrtc import Argument, Kernel, kernel
from whit.kernels.outlier_launch import Weight

SLICE = 64
"""Outlier columns that are multiplied at a time; 128 bytes, as of 128 codes."""
SPLIT_THREADS = 256
MARKED_AT_ONCE = 256
"""Columns that a block of `mark_columns` looks at."""
MOST_SHARES, TOKENS_PER_SHARE = 16, 32
ROUNDING_BLOCKS = 6
"""Thread blocks that round tokens, for each multiprocessor."""
ROWS_PER_BLOCK = 16
"""Rows of the weight of which a block gathers outlier columns."""


def split_options(
    columns: int, *, bfloat: bool, loose: bool, placed: bool, counted: bool, early: bool
) -> tuple[str, ...]:
    """Preprocessor options of the launches before the product; `counted`: outliers are found, not listed."""
    values = {
        "WORDS": -(-columns // 32),
        "ITEMS": -(-columns // (8 * SPLIT_THREADS)),
        "BF16": bfloat,
        "LOOSE": loose,
        "PLACED": placed,
        "COUNTED": counted,
        "MOST_SHARES": MOST_SHARES,
        "EARLY": early,
    }
    return tuple(f"-D{key}={int(value)}" for key, value in values.items())


class Split(ctypes.Structure):
    """`Split` of the kernel."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in (
                "x", "flags", "index", "place", "codes", "wide", "rounded", "largest",
                "loose_inputs", "loose_weight", "placed_inputs", "placed_weight", "counts",
            )
        ),
        *(
            (name, ctypes.c_int)
            for name in (
                "tokens", "rows", "columns", "stored", "shares", "capacity", "placed_capacity", "weight_blocks",
            )
        ),
    )  # fmt: skip


@dataclass(frozen=True)
class Prepared:
    """What the product multiplies.

    Attributes:
        rounded: int8 (tokens, columns).
        largest: float32 (tokens,).
        loose: outlier columns of inputs (tokens, capacity) and of codes (rows, capacity), in 16 bit.
        placed: likewise those of which the weight is stored in 16 bit.
        counts: int32 (2,): how many of each there are; None if there are none.
    """

    rounded: Tensor
    largest: Tensor
    loose: tuple[Tensor, Tensor] | None = None
    placed: tuple[Tensor, Tensor] | None = None
    counts: Tensor | None = None


@lru_cache(maxsize=256)
def _splitter(name: str, columns: int, bfloat: bool, loose: bool, placed: bool, counted: bool, index: int) -> Kernel:
    options = split_options(columns, bfloat=bfloat, loose=loose, placed=placed, counted=counted, early=True)
    return kernel(source_of("words.cuh", "outlier_split.cu"), name, options, index)


def prepare(x: Tensor, weight: Weight, many: int) -> Prepared:
    """Outlier columns found, tokens rounded, outlier columns gathered: two launches, or one where they are known.

    Args:
        x: (tokens, columns), contiguous, at an address that is a multiple of 16.
        weight: whose columns are a multiple of 16.
        many: multiprocessors.
    """
    (tokens, columns), rows, device = x.shape, weight.rows, x.device
    placed_capacity = -(-weight.stored // SLICE) * SLICE
    capacity = -(-columns // SLICE) * SLICE if weight.dynamic else placed_capacity
    words, shares = -(-columns // 32), 0
    loose, placed = weight.loose, weight.wide is not None
    variant = (columns, x.dtype == torch.bfloat16, loose, placed, weight.dynamic, device.index)

    def pair(there: bool, width: int) -> tuple[Tensor, Tensor] | None:
        return (x.new_empty(tokens, width), x.new_empty(rows, width)) if there else None

    ready = Prepared(
        torch.empty(tokens, columns, dtype=torch.int8, device=device),
        torch.empty(tokens, dtype=torch.float32, device=device),
        pair(loose, capacity),
        pair(placed, placed_capacity),
        torch.empty(2, dtype=torch.int32, device=device),
    )
    flags = None
    if weight.dynamic:
        shares = min(MOST_SHARES, -(-tokens // TOKENS_PER_SHARE))
        flags = torch.empty(shares, words, dtype=torch.int32, device=device)
        numbers = (ctypes.c_int(tokens), ctypes.c_int(columns), ctypes.c_int(-(-tokens // shares)))
        arguments: list[Argument] = [ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(flags.data_ptr()), *numbers]
        arguments.append(ctypes.c_float(weight.threshold))
        run = _splitter("mark_columns", *variant)
        run.launch(-(-columns // MARKED_AT_ONCE) * shares, SPLIT_THREADS, 0, arguments, early=True)
    pointers = [
        x, flags, weight.index, weight.place() if placed else None, weight.codes, weight.wide, ready.rounded,
        ready.largest, *(ready.loose or (None, None)), *(ready.placed or (None, None)), ready.counts,
    ]  # fmt: skip
    gathering = min(-(-rows // ROWS_PER_BLOCK), 4 * many) if loose or placed else 0
    split = Split(
        *(None if tensor is None else tensor.data_ptr() for tensor in pointers),
        tokens, rows, columns, weight.stored, shares, capacity, placed_capacity, gathering,
    )  # fmt: skip
    shared = 8 * words + 128 + 64 * words * (loose + placed)
    run = _splitter("split_tokens", *variant)
    run.launch(gathering + min(-(-tokens // 2), ROUNDING_BLOCKS * many), SPLIT_THREADS, shared, [split], early=True)
    return ready
