"""The Triton kernel of `whit.kernels.columns`, apart because Triton is not installed everywhere."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def round_block(
    values,
    gradient,
    inner,
    table,
    book,
    codes,
    errors,
    kept,
    rows,
    columns,
    top,
    LEVELS: tl.constexpr,
    MASKED: tl.constexpr,
    GRID: tl.constexpr,
    DESCEND: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
):
    """One program: R rows, all columns of the block in turn; see `whit.kernels.columns` for the arguments."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    here = row < rows
    place = tl.arange(0, C)
    done = tl.zeros((C, R), dtype=tl.float32)
    for j in range(columns):
        offset = j * rows
        factor = tl.load(inner + place * columns + j, mask=place < j, other=0.0)
        diagonal = tl.load(inner + j * columns + j)
        before = tl.load(values + offset + row, mask=here, other=0.0)
        passed = tl.sum(done * factor[:, None], axis=0)
        if DESCEND:
            slope = tl.load(gradient + offset + row, mask=here, other=0.0) - passed
            target = before + slope / diagonal
        else:
            target = before - passed
        chosen = tl.load(book + j)
        base = table + chosen * LEVELS * rows
        if GRID:
            scale = tl.load(base + row, mask=here, other=0.0)
            zero = tl.load(base + rows + row, mask=here, other=0.0)
            divisor = tl.where(scale == 0.0, 1.0, scale)
            # Adding and taking away 1.5 * 2**23 rounds to nearest, ties to even; larger values are cut off anyway.
            ratio = tl.minimum(tl.maximum(target / divisor, -4194304.0), 4194303.0)
            whole = (ratio + 12582912.0) - 12582912.0
            code = tl.minimum(tl.maximum(whole + zero, 0.0), top.to(tl.float32))
            nearest = (code - zero) * scale
        else:
            nearest = tl.load(base + row, mask=here, other=0.0)
            code = tl.zeros((R,), dtype=tl.float32)
            lower = nearest
            for level in tl.static_range(1, LEVELS):
                upper = tl.load(base + level * rows + row, mask=here, other=0.0)
                above = target >= (lower + upper) * 0.5
                nearest = tl.where(above, upper, nearest)
                code = tl.where(above, code + 1.0, code)
                lower = upper
        if MASKED:
            nearest = tl.where(tl.load(kept + offset + row, mask=here, other=0) != 0, nearest, 0.0)
        error = nearest - before if DESCEND else (target - nearest) / diagonal
        tl.store(codes + offset + row, code.to(tl.uint8), mask=here)
        tl.store(errors + offset + row, error, mask=here)
        done = tl.where(place[:, None] == j, error[None, :], done)
