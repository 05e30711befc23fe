"""The smallest kernel there is: whether it can be compiled and started says whether Triton works."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def one(out):
    """Write a one."""
    tl.store(out, 1)
