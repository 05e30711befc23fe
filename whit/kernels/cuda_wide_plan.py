"""Which shapes of `cuda/wide.cu` are tried for a product, and which is taken without a measurement."""

from __future__ import annotations

from dataclasses import dataclass, replace

from whit.kernels.cuda_layout import (
    BINARY_RESIDUAL,
    GROUPED_INTEGER,
    SIGNED_LEVELS,
    VECTOR_CODEBOOK,
    WHOLE_ROW,
    Layout,
)
from whit.kernels.cuda_wide import (
    BOX,
    WIDEST_TILE,
    WideShape,
    bucket,
    holds_groups,
    shared_bytes,
    spreads_codebook,
    stages_words,
)

MANY = 1024
"""Vectors from which bytes are decoded first."""


@dataclass(frozen=True)
class Cost:
    """Cycles of a thread block: `ends` before its first product and after its last, `each` for every block that shares
    the columns of its tile; and for a product of 64 x 16, `latency` at least, or `issue` for every warpgroup of the
    multiprocessor. The last wave of blocks costs `last` of a full one, beside what its own blocks cost."""

    ends: float
    each: float
    latency: float
    issue: float
    last: float


FEW_COST = Cost(5800, 80, 480, 61, 0.26)
MANY_COST = Cost(2700, 1350, 0, 39, 0.36)
"""For tiles of up to 32 vectors and of more, fitted to launches of eight formats and six shapes on an H200."""


def _splits(columns: int) -> list[int]:
    return [s for s in (1, 2, 4, 8) if s <= columns // BOX]


def _fitting(shapes: list[WideShape], layout: Layout, columns: int, memory: int) -> list[WideShape]:
    return [
        shape
        for shape in dict.fromkeys(shapes)
        if columns % shape.held == 0
        and columns // shape.held >= shape.splits
        and holds_groups(layout, shape)
        and (shape.ahead < 7 or shape.held == 2 * BOX)
        and (shape.copies == 0 or (spreads_codebook(layout) and shape.held == 2 * BOX))
        and (not shape.staged or stages_words(layout, shape))
        and (shape.block == shape.held or layout.kind != GROUPED_INTEGER or layout.bits < 8)
        and shape.resident * (shared_bytes(layout, shape) + 1024) <= memory + 1024
    ]


def likely_shapes(layout: Layout, tokens: int, columns: int) -> list[WideShape]:
    """Shapes of which one has nearly always been the fastest or close to it, the likelier first."""
    tile, splits = min(bucket(tokens), WIDEST_TILE), _splits(columns)
    spread, bytewise = spreads_codebook(layout), layout.kind == GROUPED_INTEGER and layout.bits == 8
    by_row = layout.kind == BINARY_RESIDUAL and layout.group == WHOLE_ROW
    signed = layout.kind == SIGNED_LEVELS  # three planes: words of a block at a time are enough registers
    if tile <= 32:
        several = splits[1:] or splits
        if spread:
            return [WideShape(tile, g, s, 3, r, 256, 3, 0, True, copies=8) for g, r in ((2, 2), (4, 1)) for s in splits]
        if bytewise:
            return [WideShape(tile, 2, s, 3, 3, 128, 1, 0, True) for s in several]
        if signed:
            return [WideShape(tile, 1, s, 4, 4, 128, 3, 0, True) for s in several]
        if layout.kind == VECTOR_CODEBOOK:
            return [WideShape(tile, 2, s, 4, 2, 128, 3) for s in several]
        block = 256 if (layout.group % 128 == 0 and layout.kind != BINARY_RESIDUAL) or by_row else 128
        shapes = [WideShape(tile, 1, s, 3, 4, block, 3, 0, True, not by_row) for s in several]
        return shapes + [WideShape(tile, 2, s, 3, 2, 256, 3, 0, True, not by_row) for s in several]
    plain = signed or by_row or layout.kind == VECTOR_CODEBOOK
    ways = {"copies": 8} if spread else {} if plain else {"staged": True}
    block, depth = (128, 4) if signed else (256, 3 if tile == 64 else 2)
    wider_codes = layout.kind == GROUPED_INTEGER and layout.bits > 2 and layout.group % (2 * BOX) == 0
    ahead = 7 if wider_codes and tile > 64 else 3
    if bytewise:
        tall = [(2, 2)] if tile > 64 else []
        return [WideShape(min(tile, 128), g, s, 4, 1, 128, ahead) for g, s in [(3, s) for s in splits[:3]] + tall]
    if tile == 64:
        shapes = [replace(WideShape(tile, 3, s, depth, 1, block, 3), **ways) for s in splits[:3]]
        return shapes + ([] if layout.kind == GROUPED_INTEGER else [WideShape(tile, 2, 1, 4, 2, 128, 3)])
    shapes = [replace(WideShape(128, g, s, depth, 1, block, ahead), **ways) for g in (3, 2) for s in splits[:2]]
    if tile > 128:
        shapes += [WideShape(256, 2, 1, 3, 1, 128, 3, rest) for rest in (0, 4) if rest in (0, *splits)]
    return shapes


def wide_shapes(layout: Layout, tokens: int, columns: int, memory: int) -> list[WideShape]:
    """Shapes worth trying for `tokens` vectors, the likelier first."""
    tile, splits, spread = min(bucket(tokens), WIDEST_TILE), _splits(columns), spreads_codebook(layout)
    shapes = likely_shapes(layout, tokens, columns)
    if tile <= 32:
        shapes += [WideShape(tile, 1, s, 4, 4, 128, ahead) for s in splits for ahead in (1, 3)]
        shapes += [WideShape(tile, 2, s, 4, 2, 128, ahead) for s in splits for ahead in (1, 3)]
        sending = [(2, 4, 2, 128, 1), (1, 4, 4, 128, 3), (2, 3, 3, 128, 1), (1, 4, 6, 128, 1)]
        sending += [(1, 3, 4, 256, 3), (2, 3, 2, 256, 3), (2, 3, 3, 128, 3)]
        shapes += [WideShape(tile, g, s, d, r, b, a, sends=True) for g, d, r, b, a in sending for s in splits[1:]]
        staging = ((1, 3, 4, 128), (2, 3, 2, 128), (1, 3, 4, 256), (2, 3, 2, 256))
        shapes += [WideShape(tile, g, s, d, r, b, 3, 0, True, True) for g, d, r, b in staging for s in splits[1:]]
        spreading = ((1, 3, 8), (1, 4, 4))
        shapes += [WideShape(tile, g, s, 3, r, 256, 3, 0, True, copies=c) for g, r, c in spreading for s in splits]
    elif tile == 64:
        shapes += [WideShape(tile, 2, s, 4, 2, 128, ahead) for s in splits[:3] for ahead in (1, 3)]
        for depth, block in ((4, 128), (3, 256)):
            three = [WideShape(tile, 3, s, depth, 1, block, 3) for s in splits[:3]]
            shapes += three + [replace(shape, sends=True) for shape in three[1:]]
            shapes += [replace(shape, staged=True) for shape in three]
    else:
        for depth, block in ((4, 128), (2, 256)):
            wider = [WideShape(128, groups, s, depth, 1, block, 3) for groups in (2, 3) for s in splits[:2]]
            wider += [replace(shape, staged=True) for shape in wider]
            fuller = [shape for shape in wider if shape.row_groups + shape.splits == 4]
            fuller += [replace(shape, copies=8) for shape in fuller if spread and not shape.staged]
            shapes += wider + [replace(shape, ahead=ahead) for shape in fuller for ahead in (1, 7)]
        if tile > 128:
            shapes += [WideShape(256, 2, s, 3, 1, 128, ahead) for s in splits[:2] for ahead in (1, 3)]
            finer = ((2, 1), (4, 1), (8, 1))
            shapes += [WideShape(256, 2, 1, 3, 1, 128, ahead, rest) for rest, ahead in finer if rest in splits]
    shapes += [WideShape(tile, 2, s, 4, 1, 64) for s in splits[:2]]  # for any columns and groups
    return _fitting(shapes, layout, columns, memory)


def wide_plan(layout: Layout, rows: int, columns: int, tokens: int, processors: int, memory: int) -> WideShape:
    """The likely shape of the least estimated time (of all, if none of those fits); tuning replaces the estimate.

    A product of 64 rows, 16 columns and n vectors takes the tensor cores n / 2 cycles, or the warps longer: `Cost`.

    Raises:
        ValueError: nothing fits.
    """
    shapes = _fitting(likely_shapes(layout, tokens, columns), layout, columns, memory)
    shapes = shapes or wide_shapes(layout, tokens, columns, memory)
    if not shapes:
        raise ValueError(f"no launch of {rows} x {columns} fits {memory} bytes of shared memory")

    def cycles(shape: WideShape) -> float:
        parts = shape.parts(rows, tokens, processors)
        return sum(part_cycles(part, tiles * part.splits) for part, _, tiles in parts)

    def part_cycles(shape: WideShape, blocks: int) -> float:
        cost = FEW_COST if shape.tokens <= 32 else MANY_COST
        places = processors * shape.resident
        waves = cost.last * -(-blocks // places) + (1 - cost.last) * max(1.0, blocks / places)
        step = max(cost.latency, shape.resident * shape.row_groups * max(cost.issue, shape.tokens / 2))
        return waves * (columns / 16 / shape.splits * step + cost.ends + cost.each * shape.splits)

    return min(shapes, key=cycles)


def decodes_first(layout: Layout, tokens: int) -> bool:
    """Whether, where nothing was tuned, a library over the decoded weight is the faster way.

    With many vectors every tile expands the weight anew, which hides behind the products but for bytes, whose stages
    leave no room for tiles of 256 vectors, and for wider integers in groups of 64: alone their product is a little
    faster than decoding and a library, in a whole prompt of a 7B slower (55 ms instead of 49).
    """
    fine = layout.bits > 2 and layout.group % (2 * BOX) != 0
    return tokens >= MANY and layout.kind == GROUPED_INTEGER and (layout.bits == 8 or fine)
