"""Values of a GGUF tensor's bytes, in float32.

The plain block types, in which most files are stored, are a few operations over the whole tensor here: the gguf
package takes sixteen rows at a time, which for a small model costs several times the arithmetic. All other types are
left to it. Both give the same bits: a code times a 16-bit scale is exact in float32, so at most one rounding follows.

Source of the layouts: ggml, `ggml-common.h`, block_q4_0, block_q4_1 and block_q8_0.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

BLOCK = 32


def values_of(kind: str, content: Tensor, rows: int) -> Tensor:
    """What the bytes of a tensor stand for.

    Args:
        kind: name of the type, for example "Q4_1".
        content: uint8, all bytes of the tensor; a row is a whole number of blocks. rows: all dimensions but the last.

    Returns:
        float32 (rows, columns).
    """
    plain = _PLAIN.get(kind)
    if plain is not None:
        return plain(content).reshape(rows, -1)
    import gguf

    found = gguf.dequantize(content.numpy().reshape(rows, -1), gguf.GGMLQuantizationType[kind])
    return torch.from_numpy(np.asarray(found, dtype=np.float32))


def _q4_0(content: Tensor) -> Tensor:
    """A float16 scale, 32 codes of 4 bits: scale * (code - 8)."""
    blocks = content.view(-1, 2 + BLOCK // 2)
    return _nibbles(blocks[:, 2:]).sub_(8).mul_(_halves(blocks[:, :2]))


def _q4_1(content: Tensor) -> Tensor:
    """A float16 scale and minimum, 32 codes of 4 bits: scale * code + minimum."""
    blocks = content.view(-1, 4 + BLOCK // 2)
    numbers = _halves(blocks[:, :4])
    return _nibbles(blocks[:, 4:]).mul_(numbers[:, :1]).add_(numbers[:, 1:])


def _q8_0(content: Tensor) -> Tensor:
    """A float16 scale, 32 signed codes of 8 bits: scale * code."""
    blocks = content.view(-1, 2 + BLOCK)
    return blocks[:, 2:].view(torch.int8).float().mul_(_halves(blocks[:, :2]))


def _halves(content: Tensor) -> Tensor:
    """Bytes (blocks, 2 k) as float16 numbers, in float32: (blocks, k)."""
    return content.contiguous().view(torch.float16).float()


def _nibbles(content: Tensor) -> Tensor:
    """Codes of bytes (blocks, 16): all lower halves, then all upper ones, float32 (blocks, 32)."""
    values = torch.empty(len(content), 2, content.shape[1])
    values[:, 0] = content & 15
    values[:, 1] = content >> 4
    return values.view(len(content), -1)


_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {"Q4_0": _q4_0, "Q4_1": _q4_1, "Q8_0": _q8_0}
