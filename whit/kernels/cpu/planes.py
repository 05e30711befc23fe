"""Decoding bit planes on a CPU: one pass from packed bytes to values."""

# mypy: ignore-errors
from __future__ import annotations

import numpy as np

from whit.kernels.cpu.compiling import compiled


@compiled
def plane_rows(first_plane, second_plane, marks, levels, values, block_size, first, last):
    """Rows `first` to `last`: values[r, c] = levels[r, c // block_size, first + 2 second + 4 mark].

    Planes uint8 (rows, bytes) and marks uint8 (bytes,), eight columns a byte, lowest bits first; levels float32
    (rows, blocks, 8); values float32 (rows, columns).
    """
    columns = values.shape[1]
    single = block_size >= columns
    whole = columns >> 3 if single else 0
    one = np.uint32(1)
    for r in range(first, last):
        eight = levels[r, 0]
        for byte in range(whole):
            low, high, mark = np.uint32(first_plane[r, byte]), np.uint32(second_plane[r, byte]), np.uint32(marks[byte])
            for bit in range(8):
                shift = np.uint32(bit)
                index = ((low >> shift) & one) | (((high >> shift) & one) << one) | (((mark >> shift) & one) << 2)
                values[r, 8 * byte + bit] = eight[index]
        for c in range(8 * whole, columns):
            byte, shift = c >> 3, np.uint32(c & 7)
            low = (np.uint32(first_plane[r, byte]) >> shift) & one
            high = (np.uint32(second_plane[r, byte]) >> shift) & one
            mark = (np.uint32(marks[byte]) >> shift) & one
            values[r, c] = levels[r, c // block_size, low + 2 * high + 4 * mark]
