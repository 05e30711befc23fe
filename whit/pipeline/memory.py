"""High-water marks of memory, as the operating system and the device report them."""

from __future__ import annotations

import resource
import sys

import torch


def peak_host_bytes() -> int:
    """Largest resident set of this process so far (kilobytes on Linux, bytes on macOS)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_device_bytes(device: torch.device) -> int | None:
    """Largest allocation on a CUDA device so far, or None elsewhere."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
