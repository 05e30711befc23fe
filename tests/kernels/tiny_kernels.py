"""A kernel with what the interpreted ones need from Triton's interpreter; run as a program, it checks the result."""

# mypy: ignore-errors
from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _count(given, out, LENGTH: tl.constexpr):
    """Twice the sum of `given` (LENGTH,), by a loop and a branch whose bounds are numbers of the device."""
    total = tl.sum(tl.load(given + tl.arange(0, LENGTH)), axis=0)
    first = tl.program_id(0)
    found = first
    for _ in range(first, total, tl.num_programs(0)):
        found += 1
    while found < 2 * total:
        found += 1
    if found > 0:
        tl.store(out, found)


if __name__ == "__main__":
    result = torch.zeros(1, dtype=torch.int32)
    _count[(1,)](torch.arange(4, dtype=torch.int32), result, LENGTH=4)
    assert result.item() == 12, result
