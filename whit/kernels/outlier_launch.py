"""How the launches of `whit.kernels.outlier_int8` are put together: buffers, grids and constants of the kernels."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from whit.kernels.launching import Tile, choose_tile, interpreted, power_of_two, processors, registers, starts_early

FEW = 32
"""Most tokens of which every program of the rounding launch looks at all."""
TOKENS_PER_SHARE = 64
MOST_SHARES = 16
ITEMS = 16
"""Outlier columns that cost next to nothing; of more, each costs a little."""
MOST_ITEMS = 128
WEIGHT_ROWS = 128
MOST_PARTS = 4
DIVIDED = 1024
"""Most tiles that are divided among programs."""


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
    from whit.kernels.triton import outlier_int8 as kernels

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
        LOOP=programs < blocks,
        HARDWARE=not interpreted(),
        EARLY=early,
        num_warps=tile.warps,
        maxnreg=registers(tile),
        enable_fp_fusion=False,
        launch_pdl=early,
    )


@dataclass(frozen=True)
class _Split:
    """What the launches before the product leave behind; see `split_tokens`."""

    rounded: Tensor
    largest: Tensor
    loose: Tensor
    placed: Tensor
    spots: Tensor
    counts: Tensor
    loose_inputs: Tensor
    placed_inputs: Tensor
    loose_codes: Tensor
    arrived: Tensor


def _room(x: Tensor, weight: Weight) -> _Split:
    """Buffers; a static list of outlier columns stands for what would be listed."""
    tokens, columns = x.shape

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    loose = placed = spots = counts = weight.or_any(weight.index)
    if weight.dynamic:
        loose, placed, spots = empty(torch.int32, 3, columns)
        counts = empty(torch.int32, 2)
    return _Split(
        rounded=empty(torch.int8, tokens, columns),
        largest=empty(torch.float32, tokens),
        loose=loose,
        placed=placed,
        spots=spots,
        counts=counts,
        loose_inputs=empty(x.dtype, tokens, ITEMS),
        placed_inputs=empty(x.dtype, tokens, ITEMS),
        loose_codes=empty(torch.int8, weight.rows if weight.loose else 0, ITEMS),
        arrived=empty(torch.int32, DIVIDED),
    )


def many_tokens(x: Tensor, weight: Weight, out: Tensor) -> None:
    """Two launches, or three where outliers are looked for among many tokens."""
    split = _room(x, weight)
    _split_tokens(x, weight, split)
    _product(x, weight, split, out)


def _split_tokens(x: Tensor, weight: Weight, split: _Split) -> None:
    from whit.kernels.triton import outlier_int8 as kernels

    (tokens, columns), early = x.shape, starts_early(x.device)
    flags, shares = weight.codes, 1
    source = kernels.NO_OUTLIERS if weight.index is None else kernels.STORED
    if weight.dynamic:
        source = kernels.ALL_TOKENS if tokens <= FEW else kernels.FLAGS
    if source.value == kernels.FLAGS.value:
        shares = min(MOST_SHARES, power_of_two(-(-tokens // TOKENS_PER_SHARE)))
        flags = torch.empty(shares, -(-columns // 8), dtype=torch.uint8, device=x.device)
        kernels.column_flags[(-(-columns // 128), shares)](
            x,
            flags,
            tokens,
            columns,
            -(-tokens // shares),
            weight.threshold,
            COLUMNS=128,
            TOKENS=64,
            EARLY=early,
            num_warps=4,
            launch_pdl=early,
        )
    share = -(-tokens // (8 * processors(x.device)))
    gathering = -(-weight.rows // WEIGHT_ROWS) if weight.loose else 0
    size = power_of_two(max(columns, 8))
    kernels.split_tokens[(gathering + 1 + -(-tokens // share),)](
        x,
        split.rounded,
        split.largest,
        weight.place(),
        weight.or_any(weight.index),
        flags,
        split.loose,
        split.placed,
        split.spots,
        split.counts,
        split.loose_inputs,
        split.placed_inputs,
        weight.codes,
        split.loose_codes,
        torch.empty(gathering, ITEMS, dtype=torch.int32, device=x.device),
        split.arrived,
        tokens,
        weight.rows,
        columns,
        weight.stored,
        share,
        gathering,
        weight.threshold,
        SHARES=shares,
        FROM=source.value,
        PLACES=weight.wide is not None,
        LOOSE=weight.loose,
        BYTES=size // 8,
        ITEMS=ITEMS,
        ROWS=WEIGHT_ROWS,
        EARLY=early,
        num_warps=min(16, max(1, size // 512)),
        maxnreg=80 if size <= 8192 else None,  # the many programs that round tokens need no more
        enable_fp_fusion=False,
        launch_pdl=early,
    )


def divided(tiles: int, tile: Tile, columns: int, many: int) -> tuple[int, int, int]:
    """Tiles that one program takes each, those that are divided, and among how many programs.

    The last round of tiles, if it leaves at least half of `many` multiprocessors idle, is divided along the columns.
    """
    slots = tile.tail * many
    if not slots or tiles % slots == 0:
        return tiles, 0, 1
    rest = tiles % slots
    parts = min(slots // rest, MOST_PARTS, -(-columns // tile.k))
    return (tiles - rest, rest, parts) if parts > 1 and rest <= DIVIDED else (tiles, 0, 1)


def _product(x: Tensor, weight: Weight, split: _Split, out: Tensor) -> None:
    """The last launch: integer product, outlier columns, scales and bias into `out`."""
    from whit.kernels.triton import outlier_int8 as kernels

    (tokens, columns), rows, early = x.shape, weight.rows, starts_early(x.device)
    tile = choose_tile("outlier-int8", max(tokens, 2), rows, columns, x.device)
    left: Any = split.rounded
    right: Any = weight.codes
    descriptor = tile.descriptor and columns % 16 == 0 and weight.codes.data_ptr() % 16 == 0
    if descriptor:
        left, right = kernels.described(left, [tile.m, tile.k]), kernels.described(right, [tile.n, tile.k])
    tiles = -(-tokens // tile.m) * -(-rows // tile.n)
    whole, rest, parts = divided(tiles, tile, columns, processors(x.device))
    sums = torch.empty(rest * parts, tile.m, tile.n, dtype=torch.int32, device=x.device)
    kernels.split_product[(whole + rest * parts,)](
        left,
        right,
        x,
        weight.codes,
        split.largest,
        weight.absmax,
        split.loose,
        split.placed,
        split.spots,
        split.counts,
        split.loose_inputs,
        split.placed_inputs,
        split.loose_codes,
        weight.or_any(weight.wide),
        weight.or_any(weight.bias),
        out,
        sums,
        split.arrived,
        tokens,
        rows,
        columns,
        weight.stored,
        weight.absmax_step,
        whole,
        -(-columns // tile.k // parts) * tile.k,
        LOOSE=weight.loose,
        PLACED=weight.wide is not None,
        COUNTED=weight.dynamic,
        HALF=weight.wide is not None and weight.wide.dtype == x.dtype and not interpreted(),
        EXACT=not interpreted(),  # the interpreter has no products of bfloat16
        BIAS=weight.bias is not None,
        M=tile.m,
        N=tile.n,
        K=tile.k,
        ITEMS=ITEMS,
        GROUP=tile.group,
        DESCRIPTOR=descriptor,
        EVEN=columns % tile.k == 0,
        STAGES=tile.stages,
        PARTS=parts,
        EARLY=early,
        num_warps=tile.warps,
        launch_pdl=early,
    )
