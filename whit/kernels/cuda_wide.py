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
"""Columns that one copy of x brings; a stage has one, two or four of them."""
WIDEST_TILE = 256


@dataclass(frozen=True)
class WideShape:
    """What may be chosen freely.

    Vectors of a tile, warpgroups of a thread block (64 rows each), thread blocks of a cluster that share the
    columns of a tile, stages of x, how many thread blocks a multiprocessor must have room for, the columns of a
    stage, how many products are in flight while the operand of the next is made (1, 3 or 7), by how many blocks the
    columns of those tiles are shared that would not fill the device (0: as the others), whether blocks of a cluster
    send their sums to the one that adds them instead of fetching them, whether codes come to shared memory well
    before their turn instead of to registers just before it, and in how many copies the words of a codebook lie in
    shared memory, each in banks of its own (0: one, packed).
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
    copies: int = 0

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 128 * self.row_groups

    @property
    def held(self) -> int:
        """Columns whose codes a thread holds at a time; a part of the columns has whole such blocks."""
        return min(self.block, 2 * BOX)

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


def codebook_bytes(layout: Layout, copies: int = 0) -> int:
    """Bytes of the 16-bit codewords in shared memory, in whole KiB; 0 for other formats.

    Args:
        layout: of the weight.
        copies: as in `WideShape`: each has 16 bytes for 8 columns of a codeword.
    """
    if layout.kind != VECTOR_CODEBOOK:
        return 0
    codes, width = layout.numbers[:2]
    return -(-(16 * copies * -(-width // 8) if copies else 2 * width) * codes // 1024) * 1024


def spreads_codebook(layout: Layout) -> bool:
    """Whether the words of a codebook may lie in several copies."""
    return layout.kind == VECTOR_CODEBOOK and layout.bits == 8 and layout.numbers[1] in (8, 12)


def stages_codes(layout: Layout, shape: WideShape) -> bool:
    """Whether codes come to shared memory with x, 128 bytes of a row a stage.

    Bytes, of which a lane needs pairs here and there, and if asked for integers of three and four bits.
    """
    if layout.kind != GROUPED_INTEGER:
        return False
    return shape.block == (2 * BOX if layout.bits == 8 else 4 * BOX if layout.bits in (3, 4) and shape.staged else 0)


def stages_words(layout: Layout, shape: WideShape) -> bool:
    """Whether codes may come to shared memory ahead: words of a row of whole stages of 128 columns."""
    return layout.kind != VECTOR_CODEBOOK and layout.bits < 8 and shape.held == 2 * BOX


def holds_groups(layout: Layout, shape: WideShape) -> bool:
    """Whether a block has part of a group, or two; eight levels are made for one group at a time."""
    eight = layout.kind in (BINARY_RESIDUAL, SIGNED_LEVELS)
    return layout.group % shape.held == 0 or (not eight and shape.held == 2 * layout.group)


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
    words = words_bytes(layout, shape) if shape.staged and not stages_codes(layout, shape) else 0
    return (
        tile_bytes(layout, shape)
        + codebook_bytes(layout, shape.copies)
        + 16 * shape.depth
        + 16
        + levels
        + words
        + shape.inbox_bytes
    )


def words_bytes(layout: Layout, shape: WideShape) -> int:
    """Bytes of staged words of codes: two runs of blocks for each row and plane, RUN_PITCH apart."""
    run = (4 if layout.bits == 1 else 2) * shape.held * layout.bits // 8
    return 2 * layout.planes * 64 * shape.row_groups * (run + 16)


def marks_bytes(layout: Layout, shape: WideShape) -> int:
    """Bytes of the marks of the columns of a thread block: a word for 32 columns and lane of four."""
    blocks = 8 * layout.width // shape.held
    return -(-blocks // shape.splits) * (shape.held // 2)


def bucket(tokens: int) -> int:
    """Number of vectors that a launch is chosen for: the next power of two, 8 to 2048."""
    return next((size for size in (8, 16, 32, 64, 128, 256, 512, 1024) if tokens <= size), 2048)


def wide_options(layout: Layout, shape: WideShape, bfloat: bool, early: bool) -> tuple[str, ...]:
    """Preprocessor options of `wide.cu`; `early` asks for programmatic dependent launch."""
    values = {
        "BF16": bfloat,
        "EARLY": early,
        "THREADS": shape.threads,
        "TOKENS": shape.tokens,
        "ROW_GROUPS": shape.row_groups,
        "SPLITS": shape.splits,
        "DEPTH": shape.depth,
        "RESIDENT": shape.resident,
        "BLOCK": shape.held,
        "STAGE_BLOCKS": shape.block // shape.held,
        "AHEAD": shape.ahead,
        "TILE_BYTES": tile_bytes(layout, shape),
        "CODEBOOK_BYTES": codebook_bytes(layout, shape.copies),
        "COPIES": shape.copies,
        "INBOX_BYTES": shape.inbox_bytes,
        "STAGED_WORDS": shape.staged and not stages_codes(layout, shape),
        "STAGED_CODES": stages_codes(layout, shape),
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
