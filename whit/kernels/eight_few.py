"""Up to 32 vectors times 8-bit weights on Hopper: the launch of `cuda/eight.cu`, in which inputs are rounded too.

A cluster of blocks shares the columns, and each warp has its own ring of items that the tensor copy engine fills.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from whit.kernels.codebook_plan import clusters_at_once
from whit.kernels.cuda_sources import source_of
from whit.kernels.eight_shapes import LISTED, SMALLEST, TO_INT8, FewKind, FewShape, vectors_class
from whit.kernels.nvrtc import Argument, Kernel, TensorMap, kernel, tensor_map

MOST_VECTORS = 32
BOX_COLUMNS, BOX_ROWS = 128, 16
LEAST_DEPTH = 2
MOST_HELD = 16384
"""Registers of a multiprocessor's threads in which they keep inputs at most."""
HOPPER = 232448
"""Bytes of shared memory that a block may have there."""


@dataclass(frozen=True)
class FewLaunch:
    """`clusters` of `shape.splits` blocks; each has `span` columns and `shared` bytes of shared memory."""

    shape: FewShape
    clusters: int
    span: int
    shared: int


class Work(ctypes.Structure):
    """`Work` of the kernel."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("scales", "input_scale", "index", "cached", "bias", "out")),
        *((name, ctypes.c_int) for name in ("vectors", "rows", "columns", "scale_step", "stored", "span")),
        *((name, ctypes.c_float) for name in ("threshold", "maximum")),
    )


def span_of(columns: int, item: int, splits: int) -> int | None:
    """Columns of a block of a cluster, whole items; None where a block would have none."""
    span = -(-columns // (item * splits)) * item
    return span if span * (splits - 1) < columns else None


def fixed_bytes(kind: FewKind, vectors: int, span: int, splits: int, tiles: int, warps: int, made: bool) -> int:
    """Shared memory of a block beside its rings: inputs, numbers of rows, sums."""
    inputs = -(-2 * span * splits // 128) * 128 if made else vectors * (2 * span + 16)
    if kind.rounded == TO_INT8:
        inputs += vectors * (span + 64)
    if kind.outliers:
        inputs += span // (4 if kind.placed else 8)
    most = vectors_class(vectors)
    sums = (tiles + warps) * most * 64
    if splits > 1:
        sums += -(-tiles * most * 4 // (32 * splits)) * splits * 512
    if kind.placed:
        inputs += vectors * (32 * -(-kind.placed // 16) + 16) + 128
        sums += -(-tiles // splits) * vectors * 64
    return tiles * 128 + 272 + 128 * splits + inputs + sums + 1024


def held_strips(kind: FewKind, launch: FewLaunch, vectors: int) -> int:
    """Times 64 columns of all vectors that a warp keeps in registers while it rounds them; 0: in shared memory."""
    strips = -(-launch.span // (2 * launch.shape.threads))
    registers = strips * 8 * (1 if vectors <= 8 else 2 if vectors <= 16 else 4)
    if vectors == 1 or not kind.rounded or kind.outliers == LISTED or kind.placed:
        return 0
    return strips if registers * launch.shape.threads * launch.shape.resident <= MOST_HELD else 0


def fits_few(kind: FewKind, vectors: int, columns: int) -> bool:
    """Whether `SMALLEST`, or the same with fewer blocks in a cluster, can be launched on Hopper for any rows."""
    for splits in (8, 4, 2):
        span = span_of(columns, SMALLEST.item, splits)
        if span is not None:
            warps = SMALLEST.threads // 32
            fixed = fixed_bytes(kind, vectors, span, splits, 1, warps, False)
            return fixed + LEAST_DEPTH * warps * (BOX_ROWS * SMALLEST.item + 8) <= HOPPER
    return True


def place_few(
    kind: FewKind,
    vectors: int,
    rows: int,
    columns: int,
    processors: int,
    memory: int,
    shape: FewShape,
    made: bool = False,
) -> FewLaunch | None:
    """The launch of a shape; None if it does not fit.

    Args:
        kind: what is multiplied.
        vectors: at most `MOST_VECTORS`.
        rows: outputs.
        columns: inputs, a multiple of 16.
        processors: multiprocessors of the device.
        memory: bytes of shared memory that a block may have.
        shape: to place; `depth` is the most that is taken.
        made: the kernel makes its input itself, whole in every block.
    """
    span = span_of(columns, shape.item, shape.splits)
    at_once = clusters_at_once(processors, True)[shape.splits] * shape.blocks
    if span is None or at_once == 0:
        return None
    tiles, warps = -(-rows // BOX_ROWS), shape.threads // 32
    item = warps * (BOX_ROWS * shape.item + 8)
    for rounds in range(1, -(-tiles // at_once) + 1):
        clusters = min(tiles, rounds * at_once)
        fixed = fixed_bytes(kind, vectors, span, shape.splits, -(-tiles // clusters), warps, made)
        depth = min(shape.depth, ((memory + 1024) // shape.resident - 1024 - fixed) // item)
        if depth >= LEAST_DEPTH:
            return FewLaunch(replace(shape, depth=depth), clusters, span, fixed + depth * item)
    return None


def few_options(kind: FewKind, launch: FewLaunch, vectors: int, *, early: bool = True) -> tuple[str, ...]:
    """Preprocessor options."""
    shape, tiles = launch.shape, -(-vectors // 8)
    values = {
        "BF16": kind.bfloat,
        "EARLY": early,
        "EAGER": shape.eager,
        "PATIENT": shape.patient,
        "HELD": held_strips(kind, launch, vectors),
        "MOST": vectors_class(vectors),
        "THREADS": shape.threads,
        "RESIDENT": shape.resident,
        "ITEM": shape.item,
        "DEPTH": shape.depth,
        "TILES": tiles if tiles < 3 else 4,
        "SPLITS": shape.splits,
        "CODES": kind.codes,
        "ROUNDED": kind.rounded,
        "OUTLIERS": kind.outliers,
        "PLACED": kind.placed > 0,
        "LLM": kind.llm,
        "SCALES_BF16": kind.scales_bfloat,
    }
    return tuple(f"-D{key}={int(value)}" for key, value in values.items())


@lru_cache(maxsize=1)
def few_source() -> str:
    """The CUDA C++ of the kernel."""
    parts = (f"eight{part}.cuh" for part in ("", "_block", "_inputs", "_held", "_products", "_sums"))
    return source_of("words.cuh", "barriers.cuh", "clusters.cuh", "inputs.cuh", *parts, "eight.cu")


@lru_cache(maxsize=256)
def few_kernel(kind: FewKind, launch: FewLaunch, vectors: int, extra: tuple[str, ...], index: int) -> Kernel:
    """Compiled for a device."""
    return kernel(few_source(), "eight", (*few_options(kind, launch, vectors), *extra), index)


def codes_map(codes: Tensor) -> TensorMap:
    """A weight (rows, columns) of bytes to be copied in boxes of 16 rows x 128 columns."""
    return tensor_map(codes.data_ptr(), len(codes), codes.shape[1] // 2, BOX_ROWS, BOX_COLUMNS // 2)


def launch_few(
    kind: FewKind,
    launch: FewLaunch,
    given: Argument,
    codes: Tensor,
    scales: Tensor,
    out: Tensor,
    *,
    input_scale: Tensor | None = None,
    index: Tensor | None = None,
    cached: Tensor | None = None,
    bias: Tensor | None = None,
    threshold: float = 0.0,
    maximum: float = 1.0,
    extra: Sequence[str] = (),
    early: bool = True,
    least: int = 0,
) -> None:
    """Product into `out` (vectors, rows).

    Args:
        kind: what is multiplied.
        launch: for these sizes.
        given: address of the inputs, or what they are made of.
        codes: (rows, columns) of bytes.
        scales: of rows, or one.
        out: result.
        input_scale: of all inputs, if stored.
        index: listed outlier columns.
        cached: their weights (rows, listed), of the type of `out`.
        bias: of the type of `out`, or float32.
        threshold: of outliers.
        maximum: of the numbers of the inputs.
        extra: preprocessor options.
        early: no kernel that may still run writes the weight.
        least: bytes of shared memory of a block at least.
    """
    vectors, rows = out.shape
    pointers = (scales, input_scale, index, cached, bias, out)
    work = Work(
        *(None if tensor is None else tensor.data_ptr() for tensor in pointers),
        vectors, rows, codes.shape[1], int(scales.shape[0] > 1), 0 if index is None else len(index), launch.span,
        threshold, maximum,
    )  # fmt: skip
    shape = launch.shape
    if bias is not None and bias.dtype == torch.float32:
        extra = (*extra, "-DBIAS_FLOAT=1")
    run = few_kernel(kind, launch, vectors_class(vectors), tuple(extra), out.device.index)
    arguments: list[Argument] = [given, codes_map(codes), work]
    shared = max(launch.shared, least)
    run.launch(launch.clusters * shape.splits, shape.threads, shared, arguments, early=early, cluster=shape.splits)
