"""One library product for several weights that are decoded first: q, k and v; gate and up, where a prompt is read.

Weights that could stand in one are joined where they are kept (`whit.generation.products`). Others, as those of
`binary-residual`, whose marked columns differ, or codebooks, meet here: they are decoded into one dense matrix. One
large product leaves fewer multiprocessors without a tile than several small ones. The bound is that of every product
after decoding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from whit.formats.base import Packed
from whit.kernels.calling import call
from whit.kernels.cuda_linear import op_arguments, stored_of, usable
from whit.kernels.cuda_ops import choice, size_class
from whit.kernels.cuda_products import Decoder, Stored
from whit.kernels.cuda_wide import Decode
from whit.kernels.cuda_wide_plan import MANY
from whit.kernels.driver import on_device
from whit.kernels.linear import RunSeveral, SeveralProducts, register_several

MOST = 4
"""Weights that are decoded into one matrix: it is held while their product runs."""


def decode_weights(
    tensors: list[Tensor], layout: list[int], rows: list[int], columns: int, dtype: torch.dtype
) -> Tensor:
    """Dense weights of one layout, whose tensors follow one another, as one: (sum of rows, columns)."""
    each = len(tensors) // len(rows)
    with on_device(tensors[0].device.index):
        weights = [
            Stored.given(layout, tensors[number * each : (number + 1) * each], count, columns)
            for number, count in enumerate(rows)
        ]
        return Decoder(weights, dtype)()


decoded_weights = torch.library.custom_op("whit::decoded_weights", decode_weights, mutates_args=(), device_types="cuda")


@decoded_weights.register_fake
def _(tensors: list[Tensor], layout: list[int], rows: list[int], columns: int, dtype: torch.dtype) -> Tensor:
    return tensors[0].new_empty(sum(rows), columns, dtype=dtype)


def _supports(x: Tensor, weights: Sequence[Packed]) -> bool:
    vectors = x.numel() // max(1, x.shape[-1])
    if not 2 <= len(weights) <= MOST or vectors < MANY:
        return False
    layouts = [usable(x, packed) for packed in weights]
    first, columns = layouts[0], weights[0].columns
    if first is None or any(layout != first for layout in layouts):
        return False
    tokens, index = size_class(first, vectors), x.device.index
    return all(isinstance(choice(first, packed.rows, columns, tokens, index), Decode) for packed in weights)


def _products(x: Tensor, weights: Sequence[Packed]) -> list[Tensor]:
    given = [op_arguments(packed) for packed in weights]
    rows, columns = [packed.rows for packed in weights], weights[0].columns
    tensors = [tensor for part, _ in given for tensor in part]
    dense = call(x, decode_weights, decoded_weights, tensors, given[0][1], rows, columns, x.dtype)
    return list(torch.split(torch.nn.functional.linear(x, dense), rows, -1))


def _prepare(x: Tensor, weights: Sequence[Packed]) -> RunSeveral | None:
    layout = usable(x, weights[0])
    stored = [] if layout is None else [stored_of(packed, layout) for packed in weights]
    known = [one for one in stored if one is not None]
    if len(known) < len(weights):
        return None
    index, rows = known[0].index, [packed.rows for packed in weights]
    with on_device(index):
        decode = Decoder(known, x.dtype)

    def run(x: Tensor) -> list[Tensor]:
        with on_device(index):
            return list(torch.split_with_sizes(torch.nn.functional.linear(x, decode()), rows, -1))

    return run


for _format in ("binary-residual", "level-table", "grouped-integer", "vector-codebook", "structured-binary"):
    register_several(_format, SeveralProducts("cuda decode + matmul", _supports, _products, prepare=_prepare))
