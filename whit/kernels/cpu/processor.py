"""Which instructions compiled code may use."""

# mypy: ignore-errors
from __future__ import annotations

from functools import lru_cache


@lru_cache(maxsize=1)
def features() -> frozenset[str]:
    """LLVM's names of what numba compiles for: this processor, or what NUMBA_CPU_FEATURES says."""
    from numba.core import codegen, config

    listed = config.CPU_FEATURES if config.CPU_FEATURES is not None else codegen.get_host_cpu_features()
    return frozenset(item[1:] for item in listed.split(",") if item.startswith("+"))
