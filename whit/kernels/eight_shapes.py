"""Launch shapes of `cuda/eight.cu`: what may be chosen, what is likely to be fast, and what was found fastest."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from whit.kernels.found import keep_shapes, read_shapes, shape_from

AS_THEY_ARE, TO_INT8, TO_E4M3 = range(3)
"""What inputs are rounded to."""
NO_OUTLIERS, FOUND, LISTED = range(3)
"""Where outlier columns are known from."""
FEW_ROWS = 8192
"""Rows up to which items of twice the columns leave no warp without one."""
LONG_COLUMNS = 8192
"""Columns from which the inputs of four blocks leave no room for rings."""
WIDE_ROWS = 16384
"""Rows from which sums take less room where fewer blocks share the columns."""


@dataclass(frozen=True)
class FewShape:
    """Launch shape.

    Blocks of a cluster that share the columns, columns of an item, most items of a warp's ring, threads of a block,
    blocks for which a multiprocessor has room, blocks that it is given (with more room than blocks the next kernel's is
    there when one ends), whether all items of a ring but the first are asked for after the inputs, and whether the next
    kernel may start at once.
    """

    splits: int = 2
    item: int = 256
    depth: int = 4
    threads: int = 256
    resident: int = 1
    blocks: int = 1
    patient: bool = False
    eager: bool = True


SMALLEST = FewShape(8, 128)
"""The shape whose blocks need least shared memory."""


@dataclass(frozen=True)
class FewKind:
    """What a kernel is compiled for.

    `codes` 0 INT8, 1 E4M3, 2 E5M2; `llm`: steps and sums as LLM.int8() has them; `placed` outlier columns whose weights
    are stored in 16 bit.
    """

    codes: int
    bfloat: bool
    rounded: int = AS_THEY_ARE
    outliers: int = NO_OUTLIERS
    llm: bool = False
    scales_bfloat: bool = False
    placed: int = 0

    @property
    def loose(self) -> bool:
        """Whether there may be outlier columns whose weights are codes."""
        return self.outliers == FOUND or (self.outliers == LISTED and not self.placed)


def vectors_class(vectors: int) -> int:
    """The number of vectors that a launch is chosen for."""
    return 1 if vectors == 1 else -(-vectors // 8) * 8


def few_shapes(vectors: int) -> list[FewShape]:
    """Shapes among which tuning chooses: splits, item, depth, threads, room, blocks."""
    if vectors == 1:
        shapes = [(1, 256, 3, 512, 1, 1), (1, 256, 6, 256, 1, 1), (1, 512, 4, 256, 1, 1), (2, 256, 6, 256, 1, 1)]
        shapes += [(1, 256, 4, 256, 2, 1), (1, 256, 2, 512, 2, 1), (2, 256, 4, 256, 2, 1), (1, 256, 4, 256, 2, 2)]
        shapes += [(2, 128, 6, 256, 1, 1), (1, 128, 6, 256, 1, 1)]
        found = [FewShape(*numbers) for numbers in shapes]
        return found + [replace(shape, patient=True) for shape in found if shape.blocks == 1 and shape.depth > 2]
    shapes = [(splits, 128, 4, 512, 1, 1) for splits in (2, 4, 8)]
    shapes += [(4, 256, 2, 512, 1, 1), (8, 256, 2, 512, 1, 1), (4, 512, 4, 256, 1, 1), (4, 256, 6, 256, 1, 1)]
    shapes += [(2, 128, 6, 256, 1, 1), (4, 128, 6, 256, 1, 1), (8, 128, 6, 256, 1, 1)]
    found = [FewShape(*numbers) for numbers in shapes]
    found += [replace(shape, patient=True) for shape in found]
    return [*found, SMALLEST, replace(SMALLEST, splits=4), replace(SMALLEST, splits=2), replace(SMALLEST, splits=1)]


def likeliest(kind: FewKind, vectors: int, rows: int, columns: int) -> list[FewShape]:
    """The shapes in the order in which one would try them, for want of a measurement."""
    shapes = few_shapes(vectors)
    if vectors == 1 or not kind.rounded:
        return shapes
    first = FewShape(4, 256, 2, 512, patient=True) if rows <= FEW_ROWS else FewShape(4, 128, 4, 512, patient=True)
    if rows > WIDE_ROWS:
        first = FewShape(2, 128, 4, 512, patient=True)
    elif columns > LONG_COLUMNS:
        first = FewShape(8, 128, 4, 512, patient=True)
    others = (FewShape(splits, 128, 4, 512, patient=True) for splits in (4, 8))
    return [first, *others, *shapes]


@lru_cache(maxsize=8)
def found_shapes(device: str) -> dict[str, FewShape]:
    """Launch shapes found for a kind of device: the shipped ones, and over them those of this machine."""
    return read_shapes(_own_file(device), _own_file(device), lambda values: shape_from(FewShape, values))


def _own_file(device: str) -> str:
    return f"few-{device.replace(' ', '-')}.json"


def found_key(kind: FewKind, vectors: int, rows: int, columns: int) -> str:
    """What a found shape is filed under."""
    placed = "-placed" if kind.placed else ""
    return f"{kind.codes}-{kind.rounded}-{kind.outliers}{placed}/{rows}x{columns}/{vectors_class(vectors)}"


def keep_found(device: str, shapes: dict[str, FewShape]) -> None:
    """Add found shapes to this machine's file.

    Raises:
        OutputError: it cannot be written.
    """
    keep_shapes(_own_file(device), shapes, lambda values: shape_from(FewShape, values))
