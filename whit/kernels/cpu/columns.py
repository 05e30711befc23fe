"""The loops of `whit.kernels.columns` on a CPU: a tile of rows in the cache, all columns of the block in turn."""

# mypy: ignore-errors
from __future__ import annotations

import numpy as np

from whit.kernels.cpu.compiling import compiled

ROWS_PER_TILE = 64
MOST_COLUMNS = 128


@compiled
def round_rows(values, gradient, inner, table, book, codes, errors, kept, top, masked, grid, descend, first, last):
    """Rows `first` to `last` of a block; see `whit.kernels.columns` for the arguments.

    A row takes the same operations in the same order whatever tile or thread it falls to: the bytes do not depend on
    the number of threads. Reads four finished columns at a time, since the loop is bound by loads.
    """
    columns = values.shape[0]
    levels = table.shape[1]
    done = np.empty((MOST_COLUMNS, ROWS_PER_TILE), np.float32)
    passed = np.empty(ROWS_PER_TILE, np.float32)
    target = np.empty(ROWS_PER_TILE, np.float32)
    nearest = np.empty(ROWS_PER_TILE, np.float32)
    code = np.empty(ROWS_PER_TILE, np.float32)
    half = np.float32(0.5)
    zero = np.float32(0)
    one = np.float32(1)
    for start in range(first, last, ROWS_PER_TILE):
        size = min(ROWS_PER_TILE, last - start)
        for j in range(columns):
            for r in range(size):
                passed[r] = zero
            whole = j - j % 4
            for i in range(0, whole, 4):
                a, b, c, d = inner[i, j], inner[i + 1, j], inner[i + 2, j], inner[i + 3, j]
                for r in range(size):
                    passed[r] += a * done[i, r] + b * done[i + 1, r] + (c * done[i + 2, r] + d * done[i + 3, r])
            for i in range(whole, j):
                a = inner[i, j]
                for r in range(size):
                    passed[r] += a * done[i, r]
            diagonal = inner[j, j]
            if descend:
                for r in range(size):
                    target[r] = values[j, start + r] + (gradient[j, start + r] - passed[r]) / diagonal
            else:
                for r in range(size):
                    target[r] = values[j, start + r] - passed[r]
            number = book[j]
            if grid:
                for r in range(size):
                    scale = table[number, 0, start + r]
                    shift = table[number, 1, start + r]
                    divisor = one if scale == zero else scale
                    code[r] = min(max(np.rint(target[r] / divisor) + shift, zero), top)
                    nearest[r] = (code[r] - shift) * scale
            else:
                for r in range(size):
                    nearest[r] = table[number, 0, start + r]
                    code[r] = zero
                for level in range(1, levels):
                    for r in range(size):
                        upper = table[number, level, start + r]
                        above = target[r] >= (table[number, level - 1, start + r] + upper) * half
                        nearest[r] = upper if above else nearest[r]
                        code[r] = code[r] + one if above else code[r]
            if masked:
                for r in range(size):
                    nearest[r] = nearest[r] if kept[j, start + r] else zero
            if descend:
                for r in range(size):
                    done[j, r] = nearest[r] - values[j, start + r]
            else:
                for r in range(size):
                    done[j, r] = (target[r] - nearest[r]) / diagonal
            for r in range(size):
                errors[j, start + r] = done[j, r]
                codes[j, start + r] = np.uint8(code[r])
