"""How `cuda/wide.cu` is launched: products of packed weights on the warpgroup tensor cores (compute capability 9.0)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from whit.kernels.cuda_layout import (
    BINARY_RESIDUAL,
    GROUPED_INTEGER,
    SIGNED_LEVELS,
    VECTOR_CODEBOOK,
    WHOLE_ROW,
    WIDEST_CODEBOOK,
    Layout,
)

BOX = 64
"""Columns that one copy of x brings; a stage has one or two of them, a split whole stages."""
WIDEST_TILE = 256
EXPANSION = 85
"""Cycles in which a warpgroup expands the codes of a product of 64 x 16, measured on an H200 for two-bit levels."""
DEARER = {(BINARY_RESIDUAL, 1): 1.2, (GROUPED_INTEGER, 3): 1.2, (GROUPED_INTEGER, 4): 1.2, (SIGNED_LEVELS, 1): 1.4}
"""How many times as long it takes for other codes, by kind and bits."""
WAVE = 6000
"""Cycles that a thread block spends before its first product and after its last."""
MANY = 1024
"""Vectors from which bytes are decoded first."""


@dataclass(frozen=True)
class WideShape:
    """What may be chosen freely.

    Vectors of a tile, warpgroups of a thread block (64 rows each), thread blocks of a cluster that share the columns of
    a tile, stages of x, how many thread blocks a multiprocessor must have room for, the columns of a stage, how many
    products are in flight while the operand of the next is made (1 or 3), by how many blocks the columns of those tiles
    are shared that would not fill the device (0: as the others), whether blocks of a cluster send their sums to the
    one that adds them instead of fetching them, and whether codes come to shared memory well before their turn instead
    of to registers just before it.
    """

    tokens: int
    row_groups: int
    splits: int
    depth: int
    resident: int
    block: int = 64
    ahead: int = 1
    rest: int = 0
    sends: bool = False
    staged: bool = False

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 128 * self.row_groups

    @property
    def inbox_bytes(self) -> int:
        """Bytes in which the blocks of a cluster find the sums sent to them."""
        if not self.sends or self.splits == 1 or self.tokens % self.splits:
            return 0
        return self.tokens * (64 * self.row_groups + 4) * 4

    def tiles(self, rows: int, tokens: int) -> int:
        """Tiles of a product."""
        return -(-rows // (64 * self.row_groups)) * -(-tokens // self.tokens)

    def grid(self, rows: int, tokens: int) -> int:
        """Thread blocks of a product in one launch."""
        return self.tiles(rows, tokens) * self.splits

    def parts(self, rows: int, tokens: int, processors: int) -> list[tuple[WideShape, int, int]]:
        """Launches of a product: the shape, its first tile and its tiles.

        With `rest`, tiles that fill the device as often as they can, then those left over, cut finer.
        """
        whole, tiles = replace(self, rest=0), self.tiles(rows, tokens)
        filling = tiles - tiles % max(1, processors * self.resident // self.splits)
        if self.rest in (0, self.splits) or filling in (0, tiles):
            return [(whole, 0, tiles)]
        return [(whole, 0, filling), (replace(whole, splits=self.rest), filling, tiles - filling)]


@dataclass(frozen=True)
class Decode:
    """No kernel multiplies: the weight is decoded to 16 bits and a library multiplies."""

    decode: bool = True


def wide_supports(layout: Layout, columns: int) -> bool:
    """Whether `wide.cu` multiplies a weight of this layout: it takes whole boxes, and codewords by pairs."""
    if layout.kind == VECTOR_CODEBOOK:
        return columns % BOX == 0 and layout.numbers[1] % 2 == 0 and codebook_bytes(layout) <= WIDEST_CODEBOOK
    return layout.multiplies and columns % BOX == 0


def codebook_bytes(layout: Layout) -> int:
    """Bytes of the 16-bit codewords in shared memory, in whole KiB; 0 for other formats."""
    if layout.kind != VECTOR_CODEBOOK:
        return 0
    return -(-2 * layout.numbers[0] * layout.numbers[1] // 1024) * 1024


def stages_codes(layout: Layout, shape: WideShape) -> bool:
    """Whether codes come to shared memory with x: bytes, of which a lane needs pairs here and there."""
    return layout.kind == GROUPED_INTEGER and layout.bits == 8 and shape.block == 2 * BOX


def stages_words(layout: Layout, shape: WideShape) -> bool:
    """Whether codes may come to shared memory ahead: words of a row of whole stages of 128 columns."""
    return layout.kind != VECTOR_CODEBOOK and layout.bits < 8 and shape.block == 2 * BOX


def tile_bytes(layout: Layout, shape: WideShape) -> int:
    """Bytes of the ring, in which later the sums of the tile may lie; whole swizzled rows of 1024 bytes."""
    rows = 64 * shape.row_groups
    ring = shape.depth * (shape.tokens * 2 * shape.block + (128 * rows if stages_codes(layout, shape) else 0))
    sums = shape.tokens * (rows + 4) * 4 if shape.splits > 1 else max(shape.tokens, 16) * (rows + 8) * 2
    return -(-max(ring, 0 if shape.inbox_bytes else sums) // 1024) * 1024


def shared_bytes(layout: Layout, shape: WideShape) -> int:
    """Bytes of shared memory of a thread block."""
    levels = 0
    if layout.kind in (BINARY_RESIDUAL, SIGNED_LEVELS):
        staged = 0 if layout.group == WHOLE_ROW else shape.threads * (68 if layout.scalars == 7 else 40)
        levels = 16 * shape.threads + staged + marks_bytes(layout, shape)
    words = words_bytes(layout, shape) if shape.staged else 0
    return (
        tile_bytes(layout, shape) + codebook_bytes(layout) + 16 * shape.depth + 16 + levels + words + shape.inbox_bytes
    )


def words_bytes(layout: Layout, shape: WideShape) -> int:
    """Bytes of staged words of codes: two runs of blocks for each row and plane, RUN_PITCH apart."""
    run = (4 if layout.bits == 1 else 2) * shape.block * layout.bits // 8
    return 2 * layout.planes * 64 * shape.row_groups * (run + 16)


def marks_bytes(layout: Layout, shape: WideShape) -> int:
    """Bytes of the marks of the columns of a thread block: a word for 32 columns and lane of four."""
    blocks = 8 * layout.width // shape.block
    return -(-blocks // shape.splits) * (shape.block // 2)


def bucket(tokens: int) -> int:
    """Number of vectors that a launch is chosen for: the next power of two, 8 to 2048."""
    return next((size for size in (8, 16, 32, 64, 128, 256, 512, 1024) if tokens <= size), 2048)


def wide_shapes(layout: Layout, tokens: int, columns: int, memory: int) -> list[WideShape]:
    """Shapes worth trying for `tokens` vectors, in no order."""
    tile = min(bucket(tokens), WIDEST_TILE)
    splits = [s for s in (1, 2, 4, 8) if s <= columns // BOX]
    if tile <= 32:
        shapes = [WideShape(tile, 1, s, 4, 4, 128, ahead) for s in splits for ahead in (1, 3)]
        shapes += [WideShape(tile, 2, s, 4, 2, 128, ahead) for s in splits for ahead in (1, 3)]
        shapes += [WideShape(tile, 1, splits[-1] // 4 or 1, 4, 5, 128)]
        sending = ((2, 4, 2, 1), (1, 4, 4, 3), (2, 3, 3, 1), (1, 4, 6, 1))
        shapes += [WideShape(tile, g, s, d, r, 128, a, sends=True) for g, d, r, a in sending for s in splits[1:]]
        staging = ((1, 3, 4), (2, 3, 2))
        shapes += [WideShape(tile, g, s, d, r, 128, 3, 0, True, True) for g, d, r in staging for s in splits[1:]]
    elif tile == 64:
        shapes = [WideShape(tile, 2, s, 4, 2, 128, ahead) for s in splits[:3] for ahead in (1, 3)]
        shapes += [WideShape(tile, 3, s, 4, 1, 128, 3) for s in splits[:3]]
        shapes += [WideShape(tile, 3, s, 4, 1, 128, 3, sends=True) for s in splits[1:3]]
        shapes += [WideShape(tile, 3, s, 4, 1, 128, 3, staged=True) for s in splits[:3]]
    else:
        shapes = [WideShape(128, groups, s, 4, 1, 128, 3) for groups in (2, 3, 4) for s in splits[:2]]
        shapes += [WideShape(128, 2, s, 4, 2, 64, 3) for s in splits[:2]]
        shapes += [WideShape(128, 3, s, 4, 1, 128, 3, staged=True) for s in splits[:2]]
        if tile > 128:
            shapes += [WideShape(256, 2, s, 3, 1, 128, ahead) for s in splits[:2] for ahead in (1, 3)]
            finer = ((2, 1), (4, 1), (8, 1), (4, 3))
            shapes += [WideShape(256, 2, 1, 3, 1, 128, ahead, rest) for rest, ahead in finer if rest in splits]
    shapes += [WideShape(tile, 2, s, 4, 1, 64) for s in splits[:2]]  # for any columns and groups
    fits = [shape for shape in shapes if shape.resident * (shared_bytes(layout, shape) + 1024) <= memory + 1024]
    return [
        shape
        for shape in fits
        if columns % shape.block == 0
        and columns // shape.block >= shape.splits
        and layout.group % shape.block == 0
        and (not shape.staged or stages_words(layout, shape))
    ]


def wide_plan(layout: Layout, rows: int, columns: int, tokens: int, processors: int, memory: int) -> WideShape:
    """The shape of the least estimated time; tuning replaces the estimate.

    A product of 64 rows, 16 columns and n vectors takes the tensor cores n / 2 cycles, and expanding its codes about
    `EXPANSION`; the work of a multiprocessor is the larger, times its products, plus what every wave of blocks costs.

    Raises:
        ValueError: nothing fits.
    """
    shapes = wide_shapes(layout, tokens, columns, memory)
    if not shapes:
        raise ValueError(f"no launch of {rows} x {columns} fits {memory} bytes of shared memory")

    def cycles(shape: WideShape) -> float:
        parts = shape.parts(rows, tokens, processors)
        return sum(part_cycles(part, tiles * part.splits) for part, _, tiles in parts)

    def part_cycles(shape: WideShape, blocks: int) -> float:
        waves = -(-blocks // (processors * shape.resident))
        stage = 1.3 if shape.block == BOX else 1.0  # what a stage costs is shared by fewer products
        expansion = EXPANSION * DEARER.get((layout.kind, layout.bits), 1.0) * stage
        step = shape.resident * shape.row_groups * max(shape.tokens / 2, expansion)
        ends = WAVE if shape.splits == 1 else WAVE * (1.5 if shape.sends else 2)
        return waves * (columns / 16 / shape.splits * step + ends)

    return min(shapes, key=cycles)


def decodes_first(layout: Layout, tokens: int) -> bool:
    """Whether, where nothing was tuned, a library over the decoded weight is the faster way.

    With many vectors every tile expands the weight anew, which hides behind the products but for wider integers where
    groups leave room for stages of 64 columns only, and for bytes, whose stages leave no room for tiles of 256 vectors.
    """
    fine = layout.bits > 2 and layout.group % (2 * BOX) != 0
    return tokens >= MANY and layout.kind == GROUPED_INTEGER and (layout.bits == 8 or fine)


def wide_options(layout: Layout, shape: WideShape, bfloat: bool, early: bool) -> tuple[str, ...]:
    """Preprocessor options of `wide.cu`; `early` asks for programmatic dependent launch."""
    values = {
        "BF16": bfloat,
        "EARLY": early,
        "PIECE": layout.piece(128),
        "ITEM": 128,
        "THREADS": shape.threads,
        "TOKENS": shape.tokens,
        "ROW_GROUPS": shape.row_groups,
        "SPLITS": shape.splits,
        "DEPTH": shape.depth,
        "RESIDENT": shape.resident,
        "BLOCK": shape.block,
        "AHEAD": shape.ahead,
        "TILE_BYTES": tile_bytes(layout, shape),
        "CODEBOOK_BYTES": codebook_bytes(layout),
        "INBOX_BYTES": shape.inbox_bytes,
        "STAGED_WORDS": shape.staged,
    }
    return (*layout.defines(), *(f"-D{key}={int(value)}" for key, value in values.items()))


def warpgroup_product(tokens: int) -> str:
    """The function that multiplies the registers of a warpgroup, 64 x 16, by `tokens` vectors in shared memory.

    The instruction names every accumulator, so its text depends on the number of vectors. The descriptor of x: address
    over 16, 1024 bytes between groups of eight vectors, swizzled by 128 bytes; a product of 16 columns is 32 bytes on.
    (In two halves of 32 bits it would be moved before every product.)
    """
    count = tokens // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    codes = ", ".join(f"%{count + i}" for i in range(4))
    outputs = ", ".join(f'"+f"(c[{i}])' for i in range(count))
    return f"""
__device__ __forceinline__ u64 descriptor_of(const u8* tile)
{{
    return shared_address(tile) >> 4 | 1u << 16 | 0x4000004000000000ull;
}}
__device__ __forceinline__ void warpgroup_product(float (&c)[TOKENS / 2], const u32 (&a)[4], u64 descriptor)
{{
#if BF16
#define OPERANDS "bf16.bf16"
#else
#define OPERANDS "f16.f16"
#endif
    asm volatile("{{.reg .pred p; setp.eq.u32 p, 0, 0; "
        "wgmma.mma_async.sync.aligned.m64n{tokens}k16.f32." OPERANDS " {{{sums}}}, {{{codes}}}, "
        "%{count + 4}, p, 1, 1, 0;}}"
        : {outputs}
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor) : "memory");
}}
"""
