"""Layers of other projects, for the same tables where they are installed: bitsandbytes and GemLite.

    pip install bitsandbytes gemlite

Both are optional; what cannot be imported or fails is left out, with one line that says why.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GEMLITE_BITS = (1, 2, 4)
GEMLITE_GROUP = 128


def imported(name: str) -> Any | None:
    """A module, or None where it is not installed or cannot be loaded."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
    except Exception as error:  # whatever a library of another CUDA version leads to
        print(f"{name} cannot be used: {type(error).__name__}: {str(error)[:200]}", flush=True)
        return None


def bitsandbytes_calls(
    rows: int, columns: int, copies: int, threshold: float, x: Tensor
) -> tuple[str, list[Callable[[], Tensor]]] | None:
    """Its version and calls of LLM.int8() layers with float16 inputs, one for each copy of the weight."""
    module = imported("bitsandbytes")
    if module is None:
        return None
    half = x.half()
    layers = []
    for _ in range(copies):
        layer = module.nn.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False, threshold=threshold).cuda()
        layer(half)
        layers.append(layer)
    return module.__version__, [partial(own, half) for own in layers]


def gemlite_calls(
    bits: int, rows: int, columns: int, copies: int, x: Tensor
) -> tuple[str, list[Callable[[], Tensor]]] | None:
    """Its version and calls of layers whose weights have 1, 2 or 4 bits and a scale and zero for 128 columns.

    It tunes itself when first called; for an H200 it brings no shapes found before, so those for an H100 are loaded.
    """
    module = imported("gemlite")
    if module is None:
        return None
    shapes = Path(module.__file__).parent / "configs" / "h100.json"
    if "H200" in torch.cuda.get_device_name() and shapes.is_file():
        module.load_config(str(shapes))
    processor = getattr(importlib.import_module("gemlite.helper"), f"A16W{bits}_HQQ_INT")
    layers = []
    for _ in range(copies):
        codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, device=x.device)
        scales = 0.02 + 0.02 * torch.rand(rows * columns // GEMLITE_GROUP, 1, device=x.device)
        zeros = torch.full_like(scales, (2**bits - 1) / 2)
        layers.append(processor(device=str(x.device), dtype=x.dtype).from_weights(codes, scales, zeros))
    return module.__version__, [partial(own, x) for own in layers]
