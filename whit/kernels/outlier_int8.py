"""LLM.int8() layers in one to three launches (Triton), for float16 and bfloat16 inputs on a CUDA device.

    1 token         one launch: each program rounds the token for itself and reads its rows of the weight once
    2 to 32         two: rows of the inputs are rounded and outlier columns listed; INT8 product on tensor cores
    more            the same, and with "dynamic" one launch before, in which columns are marked

Nothing has a shape that depends on data and nothing waits for the device: outlier columns are listed in a buffer as
long as the row, and the product loops over as many as the device counted. Codes and integer sums are those of the plain
meaning, bit for bit; what follows is float32 (outlier columns: 16-bit products, exact, with float32 sums) where the
plain meaning has float64. Bound on the difference, with u the spacing of the inputs' type and O the outlier columns:

    |error| <= u |y| + 2^-21 (s_t a_i / 127^2 |sum_j d_tj c_ij| + |b_i|) + 2^-18 sum_{j in O} |x_tj v_ij|

so a token's output may differ in its last bit with what it is batched with, "static" or not. Left to the plain meaning:
`compat`, granularity "tensor", float32 inputs, gradients, rows of more than 32768 columns.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from whit.formats.base import Packed
from whit.formats.outlier_int8 import OutlierInt8
from whit.kernels.int8_product import int32_product
from whit.kernels.launching import (
    Tile,
    choose_tile,
    interpreted,
    power_of_two,
    processors,
    starts_early,
    usable,
)
from whit.kernels.linear import Implementation, register_implementation

FEW = 32
"""Most tokens of which every program of the rounding launch looks at all."""

MOST_COLUMNS = 32768
ADDRESSED = 2**31
"""Numbers of a matrix that 32-bit offsets reach."""
TOKENS_PER_SHARE = 64
ITEMS = 16
"""Outlier columns that cost next to nothing; of more, each costs a little."""
WEIGHT_ROWS = 128
MOST_PARTS = 4
DIVIDED = 1024


def place_of(index: Tensor, columns: int) -> Tensor:
    """int16 (columns,): where a column stands in the list `index`, else -1; kept as long as the list lives."""
    capturing = index.is_cuda and torch.cuda.is_current_stream_capturing()
    found = _PLACES.get(index)  # type: ignore[no-untyped-call]
    if found is not None and found[0]() is index and found[1] == _version(index):
        kept: Tensor = found[2]
        return kept
    place = torch.full((columns,), -1, dtype=torch.int16, device=index.device)
    place[index.long()] = torch.arange(len(index), dtype=torch.int16, device=index.device)
    if not capturing:  # what a graph computes is there only when it is replayed
        _PLACES[index] = (weakref.ref(index), _version(index), place)
    return place


_PLACES = WeakTensorKeyDictionary()


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _nothing(x: Tensor) -> Tensor:
    """Stands in for a tensor that a kernel is not going to read."""
    return x


@torch.library.custom_op("whit::outlier_int8", mutates_args=())
def outlier_int8_product(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    index: Tensor | None,
    wide: Tensor | None,
    bias: Tensor | None,
    threshold: float,
    dynamic: bool,
) -> Tensor:
    """x (m, columns), contiguous, times an LLM.int8() weight: (m, rows). See the top of this file.

    Args:
        x: float16 or bfloat16.
        codes, absmax, index, wide: tensors of the format; `index` and `wide` are the stored outlier columns.
        bias: (rows,) of any float type.
        threshold: of outliers, if `dynamic`.
    """
    out = torch.empty(len(x), len(codes), dtype=x.dtype, device=x.device)
    if out.numel():
        tile = choose_tile("outlier-int8", len(x), codes.shape[0], codes.shape[1], x.device)
        if len(x) == 1 and codes.shape[1] % 4 == 0 and codes.data_ptr() % 4 == 0:
            _one_token(x, codes, absmax, index, wide, bias, threshold, dynamic, out, tile)
        else:
            _many_tokens(x, codes, absmax, index, wide, bias, threshold, dynamic, out, tile)
    return out


@outlier_int8_product.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    index: Tensor | None,
    wide: Tensor | None,
    bias: Tensor | None,
    threshold: float,
    dynamic: bool,
) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])


def _one_token(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    index: Tensor | None,
    wide: Tensor | None,
    bias: Tensor | None,
    threshold: float,
    dynamic: bool,
    out: Tensor,
    tile: Tile,
) -> None:
    from whit.kernels.triton.outlier_int8 import one_token

    rows, columns = codes.shape
    blocks, early = -(-rows // tile.n), starts_early(x.device)
    programs = min(blocks, tile.group * processors(x.device))
    one_token[(programs,)](
        x,
        codes.view(torch.int32),
        codes,
        absmax,
        _nothing(absmax) if index is None else place_of(index, columns),
        _nothing(absmax) if index is None else index,
        _nothing(absmax) if wide is None else wide,
        _nothing(absmax) if bias is None else bias,
        out,
        rows,
        columns // 4,
        columns,
        0 if index is None else len(index),
        0 if len(absmax) == 1 else 1,
        threshold,
        DYNAMIC=dynamic,
        WIDE=wide is not None,
        LISTED=index is not None,
        BIAS=bias is not None,
        WORDS=power_of_two(columns // 4),
        ROWS=tile.n,
        ITEMS=ITEMS if index is None else min(128, max(ITEMS, power_of_two(len(index)))),
        LOOP=programs < blocks,
        HARDWARE=not interpreted(),
        EARLY=early,
        num_warps=tile.warps,
        enable_fp_fusion=False,
        launch_pdl=early,
    )


def _many_tokens(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    index: Tensor | None,
    wide: Tensor | None,
    bias: Tensor | None,
    threshold: float,
    dynamic: bool,
    out: Tensor,
    tile: Tile,
) -> None:
    from whit.kernels.triton.outlier_int8 import ALL_TOKENS, FLAGS, NO_OUTLIERS, STORED, column_flags, split_tokens

    (tokens, columns), rows, device = x.shape, len(codes), x.device
    early = starts_early(device)
    split = _Split.empty(x, rows, dynamic, index, wide)
    place = _nothing(absmax) if index is None else place_of(index, columns)
    flags, shares = _nothing(codes), 1
    source = NO_OUTLIERS if index is None else STORED
    if dynamic:
        source = ALL_TOKENS if tokens <= FEW else FLAGS
    if dynamic and tokens > FEW:
        shares = min(16, power_of_two(-(-tokens // TOKENS_PER_SHARE)))
        flags = torch.empty(shares, -(-columns // 8), dtype=torch.uint8, device=device)
        column_flags[(-(-columns // 128), shares)](
            x,
            flags,
            tokens,
            columns,
            -(-tokens // shares),
            threshold,
            COLUMNS=128,
            TOKENS=64,
            EARLY=early,
            launch_pdl=early,
            num_warps=4,
        )
    loose, per_program = dynamic or (index is not None and wide is None), -(-tokens // (8 * processors(device)))
    gathering = -(-rows // WEIGHT_ROWS) if loose else 0
    scratch = torch.empty(gathering, ITEMS, dtype=torch.int32, device=device)
    size = power_of_two(max(columns, 8))
    split_tokens[(gathering + 1 + -(-tokens // per_program),)](
        x,
        split.rounded,
        split.largest,
        place,
        split.loose if index is None else index,
        flags,
        split.loose,
        split.placed,
        split.spots,
        split.counts,
        split.loose_inputs,
        split.placed_inputs,
        codes,
        split.loose_codes,
        scratch,
        split.arrived,
        tokens,
        rows,
        columns,
        0 if index is None else len(index),
        per_program,
        gathering,
        threshold,
        SHARES=shares,
        FROM=source.value,
        PLACES=wide is not None,
        LOOSE=loose,
        BYTES=size // 8,
        ITEMS=ITEMS,
        ROWS=WEIGHT_ROWS,
        EARLY=early,
        num_warps=min(16, max(1, size // 512)),
        maxnreg=80 if size <= 8192 else None,  # the many programs that round tokens need no more
        enable_fp_fusion=False,
        launch_pdl=early,
    )
    _product(x, split, codes, absmax, index, wide, bias, dynamic, out, tile)


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

    @classmethod
    def empty(cls, x: Tensor, rows: int, dynamic: bool, index: Tensor | None, wide: Tensor | None) -> _Split:
        """Room for it; a static list of outlier columns stands for what would be listed."""
        tokens, columns = x.shape
        rounded = torch.empty(tokens, columns, dtype=torch.int8, device=x.device)
        largest = torch.empty(tokens, dtype=torch.float32, device=x.device)
        inputs = torch.empty(2, tokens, ITEMS, dtype=x.dtype, device=x.device)
        codes = torch.empty(rows if dynamic or wide is None else 0, ITEMS, dtype=torch.int8, device=x.device)
        arrived = torch.empty(DIVIDED, dtype=torch.int32, device=x.device)
        if dynamic:
            loose, placed, spots = torch.empty(3, columns, dtype=torch.int32, device=x.device)
            counts = torch.empty(2, dtype=torch.int32, device=x.device)
        else:
            loose = placed = spots = counts = largest if index is None else index
        return cls(rounded, largest, loose, placed, spots, counts, inputs[0], inputs[1], codes, arrived)


def _divided(tiles: int, tile: Tile, columns: int, many: int) -> tuple[int, int, int]:
    """Tiles that one program takes each, those that are divided, and among how many programs.

    The last round of tiles, if it leaves at least half of the device idle, is divided along the columns.
    """
    slots = tile.tail * many
    if not slots or tiles % slots == 0:
        return tiles, 0, 1
    rest = tiles % slots
    parts = min(slots // rest, MOST_PARTS, -(-columns // tile.k))
    return (tiles - rest, rest, parts) if parts > 1 and rest <= DIVIDED else (tiles, 0, 1)


def _product(
    x: Tensor,
    split: _Split,
    codes: Tensor,
    absmax: Tensor,
    index: Tensor | None,
    wide: Tensor | None,
    bias: Tensor | None,
    dynamic: bool,
    out: Tensor,
    tile: Tile,
) -> None:
    """The last launch: integer product, outlier columns, scales and bias into `out`."""
    from whit.kernels.triton.outlier_int8 import described, split_product

    (tokens, columns), rows = x.shape, len(codes)
    left: Any = split.rounded
    right: Any = codes
    descriptor = tile.descriptor and columns % 16 == 0 and codes.data_ptr() % 16 == 0
    if descriptor:
        left, right = described(split.rounded, [tile.m, tile.k]), described(codes, [tile.n, tile.k])
    early = starts_early(x.device)
    whole, divided, parts = _divided(-(-tokens // tile.m) * -(-rows // tile.n), tile, columns, processors(x.device))
    sums = torch.empty(divided * parts if parts > 1 else 0, tile.m, tile.n, dtype=torch.int32, device=x.device)
    split_product[(whole + divided * parts,)](
        left,
        right,
        x,
        codes,
        split.largest,
        absmax,
        split.loose,
        split.placed,
        split.spots,
        split.counts,
        split.loose_inputs,
        split.placed_inputs,
        split.loose_codes,
        _nothing(absmax) if wide is None else wide,
        _nothing(absmax) if bias is None else bias,
        out,
        sums,
        split.arrived,
        tokens,
        rows,
        columns,
        0 if index is None else len(index),
        0 if len(absmax) == 1 else 1,
        whole,
        -(-columns // tile.k // parts) * tile.k,
        LOOSE=dynamic or (index is not None and wide is None),
        PLACED=wide is not None,
        COUNTED=dynamic,
        HALF=wide is not None and wide.dtype == x.dtype and not interpreted(),
        EXACT=not interpreted(),  # the interpreter has no products of bfloat16
        BIAS=bias is not None,
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


def _supports(x: Tensor, packed: Packed) -> bool:
    layout = packed.format
    assert isinstance(layout, OutlierInt8)
    if layout.compat or layout.granularity == "tensor" or packed.columns > MOST_COLUMNS:
        return False
    most = x.numel() // packed.columns * max(packed.rows, packed.columns)
    return most < ADDRESSED and usable(x, packed)


def _linear(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    layout, tensors = packed.format, packed.tensors
    assert isinstance(layout, OutlierInt8)
    if bias is not None and bias.requires_grad and torch.is_grad_enabled():  # the plain meaning has a derivative
        return layout.linear_with(int32_product, x, tensors, packed.rows, packed.columns, bias)
    flat = x.detach().reshape(-1, packed.columns).contiguous()
    out: Tensor = torch.ops.whit.outlier_int8(
        flat,
        tensors["codes"],
        tensors["absmax"],
        tensors.get("outlier_index"),
        tensors.get("outlier_weight"),
        None if bias is None else bias.detach().contiguous(),
        layout.threshold,
        layout.outliers == "dynamic",
    )
    return out.reshape(*x.shape[:-1], packed.rows)


register_implementation(OutlierInt8.name, Implementation("fused int8 (Triton)", _supports, _linear))
