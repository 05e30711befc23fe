"""Codes of LLM.int8() in Triton kernels: those of `whit.formats.outlier_int8.quantise`, bit for bit.

Divisions are rounded correctly, and kernels that round must be compiled without fused multiply-adds
(`enable_fp_fusion=False`), which would round once where the plain meaning rounds twice. Largest magnitudes are found as
integers: the order of non-negative floats is that of their bits, and NaN, above infinity, spreads.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from whit.kernels.triton.small_numbers import ROUNDER

LEVELS = tl.constexpr(127.0)
SMALLEST = tl.constexpr(2.0**-100)

NO_OUTLIERS = tl.constexpr(0)
STORED = tl.constexpr(1)
ALL_TOKENS = tl.constexpr(2)
FLAGS = tl.constexpr(3)
"""Where the columns of outliers are known from."""

DIVIDED = tl.constexpr(1024)  # most tiles that are divided


@triton.jit
def codes_of(values, largest):
    """rint(127 values / largest) as int32; 0 where largest is 0. torch's 127 / largest is 127 (1 / largest)."""
    factor = tl.div_rn(1.0, tl.maximum(largest, SMALLEST)) * LEVELS
    scaled = tl.minimum(tl.maximum(values * factor, -LEVELS), LEVELS)
    return ((scaled + ROUNDER) - ROUNDER).to(tl.int32)
