"""The tensors of an LLM.int8() layer as its kernels take them, and the launch for one token."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from whit.kernels.launching import choose_tile, interpreted, power_of_two, processors, registers, starts_early

PICKED = 8
"""Outliers of one token without a 16-bit weight that are picked; more are multiplied as a whole row."""
ITEMS, MOST_ITEMS = 16, 128
"""Stored 16-bit columns that are multiplied at a time: at least and at most."""


@dataclass(frozen=True)
class Weight:
    """The tensors of a layer as `OutlierInt8` stores them, its bias, and how outliers are found."""

    codes: Tensor
    absmax: Tensor
    index: Tensor | None
    wide: Tensor | None
    bias: Tensor | None
    threshold: float
    dynamic: bool

    @property
    def rows(self) -> int:
        """Outputs."""
        return self.codes.shape[0]

    @property
    def columns(self) -> int:
        """Inputs."""
        return self.codes.shape[1]

    @property
    def stored(self) -> int:
        """Listed outlier columns."""
        return 0 if self.index is None else len(self.index)

    @property
    def loose(self) -> bool:
        """Whether there may be outlier columns without a 16-bit weight."""
        return self.dynamic or (self.index is not None and self.wide is None)

    @property
    def absmax_step(self) -> int:
        """0 where one constant is for all rows."""
        return 0 if len(self.absmax) == 1 else 1

    def or_any(self, tensor: Tensor | None) -> Tensor:
        """The tensor, or one that stands in for it where the kernel does not read it."""
        return self.absmax if tensor is None else tensor

    def place(self) -> Tensor:
        """`place_of` the listed columns."""
        return self.absmax if self.index is None else place_of(self.index, self.columns)

    def is_settled(self) -> bool:
        """Whether nothing that a kernel reads is computed by the launch right before it."""
        return self.index is None or _kept(self.index) is not None


def _kept(index: Tensor) -> Tensor | None:
    found = _PLACES.get(index)  # type: ignore[no-untyped-call]
    if found is None or found[0]() is not index or found[1] != _version(index):
        return None
    kept: Tensor = found[2]
    return kept


def place_of(index: Tensor, columns: int) -> Tensor:
    """int16 (columns,): where a column stands in the list `index`, else -1; kept as long as the list lives."""
    kept = _kept(index)
    if kept is not None:
        return kept
    place = torch.full((columns,), -1, dtype=torch.int16, device=index.device)
    place[index.long()] = torch.arange(len(index), dtype=torch.int16, device=index.device)
    if not (
        index.is_cuda and torch.cuda.is_current_stream_capturing()
    ):  # what a graph computes is there only when it is replayed
        _PLACES[index] = (weakref.ref(index), _version(index), place)
    return place


_PLACES = WeakTensorKeyDictionary()


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def one_token(x: Tensor, weight: Weight, out: Tensor) -> None:
    """The only launch for one token; columns and the address of the codes are multiples of 4."""
    from whit.kernels.triton import outlier_one as kernels

    tile = choose_tile("outlier-int8", 1, weight.rows, weight.columns, x.device)
    blocks, early = -(-weight.rows // tile.n), starts_early(x.device) and weight.is_settled()
    programs = min(blocks, tile.group * processors(x.device))
    words = weight.columns // 4
    kernels.one_token[(programs,)](
        x,
        weight.codes.view(torch.int32),
        weight.codes,
        weight.absmax,
        weight.place(),
        weight.or_any(weight.index),
        weight.or_any(weight.wide),
        weight.or_any(weight.bias),
        out,
        weight.rows,
        words,
        weight.columns,
        weight.stored,
        weight.absmax_step,
        weight.threshold,
        DYNAMIC=weight.dynamic,
        WIDE=weight.wide is not None,
        LISTED=weight.index is not None,
        BIAS=weight.bias is not None,
        WORDS=power_of_two(words),
        ROWS=tile.n,
        ITEMS=min(MOST_ITEMS, max(ITEMS, power_of_two(weight.stored))),
        PICKED=PICKED,
        LOOP=programs < blocks,
        HARDWARE=not interpreted(),
        EARLY=early,
        num_warps=tile.warps,
        maxnreg=registers(tile),
        enable_fp_fusion=False,
        launch_pdl=early,
    )
