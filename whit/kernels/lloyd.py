"""Lloyd's iteration of weighted k-means in one dimension, all rows in one launch; on a GPU with NVRTC."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from whit.kernels.columns import nvrtc_found
from whit.kernels.nvrtc import attempted, failed, kernel

WARPS = 4
_KIND = "iterations of weighted k-means"


def available(device: torch.device) -> bool:
    """Whether the kernel can run there."""
    return device.type == "cuda" and nvrtc_found() and not failed(_KIND)


def lloyd(values: Tensor, mass: Tensor, levels: Tensor, iterations: int) -> bool:
    """Move the levels of each row, in place: values go to the nearest level (the upper one in the middle), and every
    level to the weighted mean of its values, until nothing moves. A level without values stays.

    Args:
        values: float32 (rows, k), in any order.
        mass: positive weights of the columns, float64 (k,).
        levels: ascending, float64 (rows, count); changed.
        iterations: at most.

    Returns:
        False, and nothing has changed, if the kernel cannot be compiled.
    """
    return attempted(_KIND, _launch, values, mass, levels, iterations)


def _launch(values: Tensor, mass: Tensor, levels: Tensor, iterations: int) -> None:
    rows, count = values.shape
    if not rows or not count:
        return
    number = values.device.index
    tensors = (values.contiguous(), mass.contiguous(), levels)
    arguments: list[ctypes._SimpleCData[Any] | ctypes.Structure] = []
    arguments += [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    arguments += [ctypes.c_int(value) for value in (rows, count, iterations)]
    options = (f"-DLEVELS={levels.shape[1]}", f"-DWARPS={WARPS}")
    with torch.cuda.device(number):
        kernel(cuda_source(), "lloyd", options, number).launch(-(-rows // WARPS), 32 * WARPS, 0, arguments)


@lru_cache(maxsize=1)
def cuda_source() -> str:
    """CUDA C++ of the kernel."""
    return (files("whit.kernels") / "cuda" / "lloyd.cu").read_text(encoding="utf-8")
