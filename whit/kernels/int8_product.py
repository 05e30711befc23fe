"""Exact products of INT8 matrices on the hardware at hand, for layers whose inputs are rounded to INT8.

    tensor cores, VNNI    `torch._int_mm`: INT8 in, INT32 out
    any other CPU         float32 products of 1024 columns at a time: 127^2 * 1024 < 2^24, so every sum is exact

Both give the integers of `float64_product`, so that the layer's output has the same bits.
"""

from __future__ import annotations

from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from whit.formats.base import Packed
from whit.formats.outlier_int8 import LEVELS, IntegerProduct, OutlierInt8
from whit.kernels.linear import Implementation, register_implementation

EXACT_COLUMNS = 2**24 // LEVELS**2 // 8 * 8
# What cuBLASLt asks of the shapes of an INT8 product.
CUDA_ROWS = 17
CUDA_MULTIPLE = 8


def int32_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right.T of int8 (tokens, columns) and (rows, columns): int32 (tokens, rows).

    On a GPU, shapes that the library refuses are padded with zeros: few tokens always, the weight only if its sides are
    no multiples of 8.
    """
    tokens, rows = len(left), len(right)
    if left.is_cuda:
        more_columns = -left.shape[1] % CUDA_MULTIPLE
        left = _padded(left, max(0, CUDA_ROWS - tokens), more_columns)
        right = _padded(right, -rows % CUDA_MULTIPLE, more_columns)
    return torch._int_mm(left, right.T)[:tokens, :rows]


def float32_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right.T of int8 (tokens, columns) and (rows, columns): int32 (tokens, rows)."""
    out = torch.zeros(len(left), len(right), dtype=torch.int32, device=left.device)
    for start in range(0, left.shape[1], EXACT_COLUMNS):
        part = slice(start, start + EXACT_COLUMNS)
        out += (left[:, part].float() @ right[:, part].float().T).int()
    return out


def _padded(matrix: Tensor, rows: int, columns: int) -> Tensor:
    return pad(matrix, (0, columns, 0, rows)) if rows or columns else matrix


def multiplies_int8(device: torch.device) -> bool:
    """Whether `_int_mm` runs on INT8 units there: tensor cores, or a CPU with dot products (VNNI)."""
    if device.type == "cuda":
        return _gpu_multiplies_int8(device)
    return device.type == "cpu" and _cpu_multiplies_int8()


@lru_cache(maxsize=1)
def _cpu_multiplies_int8() -> bool:
    """Whether this processor has INT8 dot products (VNNI); without, `_int_mm` is a plain loop."""
    if not hasattr(torch.cpu, "get_capabilities"):  # older torch cannot tell
        return False
    return bool(torch.cpu.get_capabilities().get("avx512_vnni", False))


@lru_cache(maxsize=16)
def _gpu_multiplies_int8(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (7, 5)


def _linear(product: IntegerProduct, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    assert isinstance(packed.format, OutlierInt8)
    return packed.format.linear_with(product, x, packed.tensors, packed.rows, packed.columns, bias)


register_implementation(
    OutlierInt8.name,
    Implementation("float32 blocks", lambda x, packed: x.device.type == "cpu", partial(_linear, float32_product)),
)
register_implementation(
    OutlierInt8.name,
    Implementation("int8 to int32", lambda x, packed: multiplies_int8(x.device), partial(_linear, int32_product)),
)
