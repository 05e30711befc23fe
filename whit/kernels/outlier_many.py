"""LLM.int8() for many tokens: buffers, grids and constants of the two or three launches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from whit.kernels.launching import Tile, choose_tile, interpreted, power_of_two, processors, starts_early
from whit.kernels.outlier_launch import Weight

FEW = 32
"""Most tokens of which every program of the rounding launch looks at all."""
TOKENS_PER_SHARE = 64
MOST_SHARES = 16
ITEMS = 16
"""Outlier columns that cost next to nothing; of more, each costs a little."""
DENSE_SHARE, FEW_DENSE_SHARE = 16, 24
"""If more than one column in so many is an outlier, whole rows are multiplied; of up to `FEW` tokens, in one loop."""
GATHERED, LATE = FEW, 1024
"""Most tokens for which the product fetches, of outlier columns, codes and inputs for itself."""
DENSE = 1024
"""Most tokens for which whole rows are multiplied if so many columns are outliers; for more, that would cost all."""
WEIGHT_ROWS = 128
MOST_PARTS = 4
DIVIDED = 1024
"""Most tiles that are divided among programs."""


@dataclass(frozen=True)
class _Split:
    """What the launches before the product leave behind; see `split_tokens`."""

    rounded: Tensor
    largest: Tensor
    loose: Tensor
    placed: Tensor
    spots: Tensor
    counts: Tensor
    marks: Tensor
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
        marks=empty(torch.int8, columns if weight.loose else 0),
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
    from whit.kernels.triton import outlier_codes as sources
    from whit.kernels.triton import outlier_split as kernels

    (tokens, columns), early = x.shape, starts_early(x.device)
    flags, shares = weight.codes, 1
    source = sources.NO_OUTLIERS if weight.index is None else sources.STORED
    if weight.dynamic:
        source = sources.ALL_TOKENS if tokens <= FEW else sources.FLAGS
    if source.value == sources.FLAGS.value:
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
    late = is_late(tokens)
    gathering = -(-weight.rows // WEIGHT_ROWS) if weight.loose and gathers(tokens) else 0
    size = power_of_two(max(columns, 8))
    looks = source.value == sources.ALL_TOKENS.value
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
        split.marks,
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
        LATE=late,
        BYTES=size // 8,
        BATCH=8 if size <= 8192 else 4,
        ITEMS=ITEMS,
        ROWS=WEIGHT_ROWS,
        EARLY=early,
        num_warps=min(16, max(1, size // (256 if looks else 512))),
        # The many programs that round tokens need no more; those that look at all tokens hold a batch of them.
        maxnreg=80 if size <= 8192 and not looks else None,
        enable_fp_fusion=False,
        launch_pdl=early,
    )


def is_late(tokens: int) -> bool:
    """Whether the product fetches the inputs of outlier columns, not the launch before it."""
    return tokens <= LATE


def gathers(tokens: int) -> bool:
    """Whether the launch before the product gathers the codes of outlier columns."""
    return tokens > GATHERED


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
    from whit.kernels.triton import outlier_product as kernels
    from whit.kernels.triton.tiles import described

    (tokens, columns), rows, early = x.shape, weight.rows, starts_early(x.device)
    tile = choose_tile("outlier-int8", max(tokens, 2), rows, columns, x.device)
    left: Any = split.rounded
    right: Any = weight.codes
    descriptor = tile.descriptor and columns % 16 == 0 and weight.codes.data_ptr() % 16 == 0
    if descriptor:
        left, right = described(left, [tile.m, tile.k]), described(right, [tile.n, tile.k])
    tiles = -(-tokens // tile.m) * -(-rows // tile.n)
    whole, rest, parts = divided(tiles, tile, columns, processors(x.device)) if tokens > FEW else (tiles, 0, 1)
    one_pass = weight.loose and tokens <= FEW and (early or interpreted())  # it asks for more shared memory
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
        split.marks,
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
        max(ITEMS, columns // (FEW_DENSE_SHARE if one_pass else DENSE_SHARE)),
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
        LATE=is_late(tokens),
        GATHERED=gathers(tokens),
        DENSE=tokens <= DENSE,
        ONE_PASS=one_pass,
        CHUNK=tile.k if tile.m <= 32 else 64,
        GROUP=tile.group,
        DESCRIPTOR=descriptor,
        EVEN=columns % tile.k == 0,
        STAGES=tile.stages,
        PARTS=parts,
        EARLY=early,
        num_warps=tile.warps,
        launch_pdl=early,
    )
