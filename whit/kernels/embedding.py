"""Embeddings of packed integers in one launch (Triton): nothing waits for the device, however many ids there are."""

from __future__ import annotations

import torch
from torch import Tensor

from whit.formats.base import Packed
from whit.formats.grouped_integer import GroupedInteger
from whit.kernels.launching import HALVES, runs_triton, starts_early
from whit.kernels.linear import register_look_up

BLOCK = 1024
WIDTHS = (2, 4, 8)
"""Bits of codes that lie within a byte and stand for whole numbers."""


@torch.library.custom_op("whit::embedding_rows", mutates_args=())
def embedding_rows(
    ids: Tensor, codes: Tensor, scales: Tensor, bits: int, group: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """Rows `ids` of symmetric integers, (len(ids), columns): rounded once to `dtype`, as the plain meaning is.

    Args:
        ids: integer (n,). An id without a row gives NaN.
        codes, scales: as `GroupedInteger` stores them.
        group: columns that share a scale.
    """
    from whit.kernels.triton.embedding import look_up

    out = torch.empty(len(ids), columns, dtype=dtype, device=ids.device)
    early = starts_early(ids.device)
    if out.numel():
        look_up[(len(ids), -(-columns // BLOCK))](
            ids,
            codes,
            scales,
            out,
            len(codes),
            columns,
            codes.shape[1],
            scales.shape[1],
            group,
            BITS=bits,
            BLOCK=BLOCK,
            EARLY=early,
            num_warps=4,
            launch_pdl=early,
        )
    return out


@embedding_rows.register_fake
def _(ids: Tensor, codes: Tensor, scales: Tensor, bits: int, group: int, columns: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(ids.shape[0], columns, dtype=dtype)


def _supports(ids: Tensor, packed: Packed, dtype: torch.dtype) -> bool:
    layout = packed.format
    assert isinstance(layout, GroupedInteger)
    if not layout.symmetric or layout.bits not in WIDTHS or dtype not in HALVES or not runs_triton(ids.device):
        return False
    return all(tensor.device == ids.device and tensor.is_contiguous() for tensor in packed.tensors.values())


def _look_up(ids: Tensor, packed: Packed, dtype: torch.dtype) -> Tensor:
    layout, columns = packed.format, packed.columns
    assert isinstance(layout, GroupedInteger)
    codes, scales = packed.tensors["codes"], packed.tensors["scales"]
    flat = ids.reshape(-1).contiguous()
    out: Tensor = torch.ops.whit.embedding_rows(
        flat, codes, scales, layout.bits, layout.group_size or columns, columns, dtype
    )
    return out.view(*ids.shape, columns)


register_look_up(GroupedInteger.name, _supports, _look_up)
