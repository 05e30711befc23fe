"""Products of bfloat16 numbers on CPUs with matrix units (AMX), about four times as fast as those of float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch


@lru_cache(maxsize=1)
def has_matrix_units() -> bool:
    """Whether this CPU, and this build of torch, multiply bfloat16 in matrix units."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return bool(supported()) and hasattr(torch.backends.mkldnn, "matmul")


@contextmanager
def products_of_bfloat16() -> Iterator[None]:
    """Matrix products of float32 tensors inside the context round their factors to bfloat16 and add in float32.

    Factors that are bfloat16 numbers held in float32 lose nothing by it. Nothing changes without matrix units.
    """
    if not has_matrix_units():
        yield
        return
    setting: Any = getattr(torch.backends.mkldnn, "matmul")  # noqa: B009 - unknown to its type stubs
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before
