"""What the CUDA kernels of packed products are compiled from: source files, one after the other, and options."""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files

from whit.kernels.cuda_layout import Layout
from whit.kernels.cuda_plan import Launch
from whit.kernels.cuda_shapes import Shape
from whit.kernels.cuda_wide import warpgroup_product


def options_of(layout: Layout, launch: Launch, tokens: int, bfloat: bool, early: bool) -> tuple[str, ...]:
    """Preprocessor options of a kernel; `early` asks for programmatic dependent launch."""
    shape, (turns, loads) = launch.shape, launch.turns()
    values = {
        "BF16": bfloat,
        "EARLY": early,
        "BITWISE": shape.bitwise,
        "TILES": tokens // 8,
        "PIECE": layout.piece(shape.item),
        "THREADS": shape.threads,
        "ITEM": shape.item,
        "DEPTH": launch.depth,
        "UNROLL": shape.unroll,
        "RESIDENT": shape.resident,
        "STAGING_BLOCKS": shape.share,
        "EAGER": 2 if shape.late else shape.eager,
        "PATIENT": shape.patient,
        "BULK": shape.bulk,
        "AHEAD": shape.ahead,
        "X_WHOLE": launch.whole,
        "TURNS": turns,
        "LOADS": loads,
    }
    return (*layout.defines(), *(f"-D{key}={int(value)}" for key, value in values.items()))


def parts_of(name: str, shape: Shape) -> tuple[str, ...]:
    """The source files of a kernel, in order."""
    if name == "gemv":
        return (
            "common.cuh",
            "clusters.cuh",
            "items.cuh",
            "inputs.cuh",
            "group.cuh",
            *(("barriers.cuh", "bulk.cuh") if shape.bulk else ()),
            *(("planes.cuh", "stage_planes.cuh", "bits.cuh") if shape.bitwise else ("limbs.cuh",)),
            "gemv.cu",
        )
    return ("common.cuh", "items.cuh", "small.cuh", "small.cu")


@lru_cache(maxsize=64)
def source_of(*names: str) -> str:
    """The CUDA C++ of a kernel: its parts, one after the other."""
    folder = files("whit.kernels") / "cuda"
    return "".join((folder / name).read_text(encoding="utf-8") for name in names)


EXPANSION = ("codewords.cuh", "codes.cuh", "scalars.cuh", "levels.cuh", "expand.cuh")
"""Of `wide.cu`: from codes to operands."""


@lru_cache(maxsize=16)
def wide_source(tokens: int) -> str:
    """The CUDA C++ of `wide` for tiles of `tokens` vectors."""
    parts = source_of("pairs.cuh", "barriers.cuh", "warpgroup.cuh", *EXPANSION, "wide.cu")
    return source_of("common.cuh", "clusters.cuh") + warpgroup_product(tokens) + parts
