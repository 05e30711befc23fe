"""Sums over signed codes without writing the signs out as numbers."""

# mypy: ignore-errors
from __future__ import annotations

import numpy as np

from whit.kernels.cpu.compiling import compiled

ROWS_PER_TILE = 64


@compiled
def signed_sum_rows(products, codes, places, sums, first, last):
    """Rows `first` to `last` of `whit.kernels.signs.signed_sums_at`."""
    count = products.shape[1]
    small = np.empty((count, ROWS_PER_TILE), np.float32)
    large = np.empty((count, ROWS_PER_TILE), np.float32)
    zero = np.float32(0)
    for start in range(first, last, ROWS_PER_TILE):
        size = min(ROWS_PER_TILE, last - start)
        small[:] = zero
        large[:] = zero
        for column in places:
            for k in range(count):
                for r in range(size):
                    value = products[column, k, start + r]
                    code = codes[column, start + r]
                    signed = value if code & 1 else -value
                    high = code > 1
                    small[k, r] += zero if high else signed
                    large[k, r] += signed if high else zero
        for k in range(count):
            for r in range(size):
                sums[k, 0, start + r] = small[k, r]
                sums[k, 1, start + r] = large[k, r]


@compiled
def decode_rows(codes, low, high, book, values, first, last):
    """Rows `first` to `last` of `whit.kernels.signs.decode_signs`."""
    for column in range(codes.shape[0]):
        number = book[column]
        for r in range(first, last):
            code = codes[column, r]
            magnitude = high[number, r] if code > 1 else low[number, r]
            values[column, r] = magnitude if code & 1 else -magnitude


@compiled
def pattern_parts(codes, patterns, first, last):
    """Columns `first` to `last` of `whit.kernels.signs.pattern_rows`; zeros keep their signs."""
    rows = codes.shape[1]
    for column in range(first, last):
        for r in range(rows):
            code = codes[column, r]
            sign = np.float32(1) if code & 1 else np.float32(-1)
            upper = sign * np.float32(code > 1)
            patterns[column, r] = sign - upper
            patterns[column, rows + r] = upper
