"""The column loop of sequential rounding as one kernel per block of columns instead of many small operations.

Rounding with error feedback, and coordinate descent, take the columns of a block in turn, but rows never meet: each
program keeps a few rows of the block at hand (in registers on a GPU, in the cache on a CPU) and walks along its
columns. With the errors e of the columns before,

    feedback:  t_j = w_j - sum_{i<j} e_i U_ij,              q_j nearest to t_j,  e_j = (t_j - q_j) / U_jj
    descent:   t_j = v_j + (g_j - sum_{i<j} e_i H_ij) / H_jj,  q_j nearest to t_j,  e_j = q_j - v_j

Where a mask of kept weights is given, q_j is zero wherever the weight is not kept, and its code means nothing.

Everything is held transposed, (columns, rows), as in `whit.methods.feedback` and `whit.methods.billm_refined`, whose
loops are the plain meaning of these kernels. On a GPU they are CUDA C++ compiled at first use, or Triton where NVRTC is
missing or cannot compile them; on a CPU numba compiles them. Callers ask `available` first, and launch a block by
`attempted`: the one block whose kernel does not compile takes the plain loop.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache
from importlib.resources import files
from typing import Any

import numpy
import torch
from torch import Tensor

from whit.kernels import nvrtc
from whit.kernels.cpu.compiling import numba_works, shared_out
from whit.kernels.nvrtc import Kernel

ROWS_PER_PROGRAM = 32
MOST_COLUMNS = 128
# Up to so many rows so many threads share a row and make a CUDA block: few rows occupy the device only so.
CUDA_SHAPES = ((8448, 4, 128), (16896, 2, 64))
CUDA_WIDE_SHAPE = (1, 64)
_KIND = "column loops"


@lru_cache(maxsize=1)
def _triton_found() -> bool:
    return importlib.util.find_spec("triton") is not None


def available(device: torch.device, *, masked: bool = False) -> bool:
    """Whether the kernels can run there: a CUDA device with NVRTC or Triton, or a CPU and numba.

    The Triton version is not used with a mask of kept weights.
    """
    if device.type == "cpu":
        return numba_works()
    return writes_halves(device) or (device.type == "cuda" and not masked and _triton_found())


def writes_halves(device: torch.device) -> bool:
    """Whether the kernels there also write errors as bfloat16 numbers: those in CUDA C++ do."""
    return device.type == "cuda" and nvrtc_found() and not nvrtc.failed(_KIND)


def attempted(launch: Callable[..., object], *arguments: object) -> bool:
    """Call what launches a kernel of this module for a block; False, and nothing changed, if it cannot be compiled."""
    return nvrtc.attempted(_KIND, launch, *arguments)


def feedback_levels(
    values: Tensor,
    inner: Tensor,
    table: Tensor,
    book: Tensor,
    codes: Tensor,
    errors: Tensor,
    kept: Tensor | None = None,
    halves: Tensor | None = None,
) -> None:
    """Round a block of columns to levels, with feedback, in place of `codes` and `errors`.

    Args:
        values: current values, float32 (columns, rows), with the feedback of earlier blocks.
        inner: block of U, float32 (columns, columns), may be part of a larger matrix; only the upper triangle is read.
        table: ascending levels, float32 (books, levels, rows).
        book: int32 (columns,), which levels a column uses.
        codes: uint8 (columns, rows), gets the index of the level.
        errors: float32 (columns, rows), gets e.
        kept: bool (columns, rows), or None for all.
        halves: bfloat16 (3, columns, rows), rows contiguous, gets e as [high, low, high], as
            `whit.kernels.split_product.Panel` multiplies it, or None; only where `writes_halves` says so.
    """
    _launch((values, values, inner, table, book, codes, errors), kept, halves)


def feedback_grid(
    values: Tensor,
    inner: Tensor,
    table: Tensor,
    book: Tensor,
    bits: int,
    codes: Tensor,
    errors: Tensor,
    halves: Tensor | None = None,
) -> None:
    """As `feedback_levels`, on integer grids: table[:, 0] holds scales, table[:, 1] zero points, (books, 2, rows)."""
    _launch((values, values, inner, table, book, codes, errors), None, halves, grid=True, top=2**bits - 1)


def descend_levels(
    values: Tensor,
    gradient: Tensor,
    inner: Tensor,
    table: Tensor,
    book: Tensor,
    codes: Tensor,
    change: Tensor,
    kept: Tensor | None = None,
    halves: Tensor | None = None,
) -> None:
    """One pass of coordinate descent over a block of columns: `codes` and `change` (q - v) are written.

    Args:
        values: float32 (columns, rows), what the codes stand for before; becomes what they stand for afterwards.
        gradient: H (w - q), same shape.
        inner: block of H, float32 (columns, columns). Others as in `feedback_levels`.
    """
    _launch((values, gradient, inner, table, book, codes, change), kept, halves, descend=True)
    if not writes_halves(values.device):
        values += change


def _launch(
    tensors: tuple[Tensor, ...],
    kept: Tensor | None,
    halves: Tensor | None,
    *,
    descend: bool = False,
    grid: bool = False,
    top: int = 0,
) -> None:
    """Run a block; `tensors` in the order of the kernels' arguments."""
    columns, rows = tensors[0].shape
    table = tensors[3]
    if columns == 0 or rows == 0:
        return
    if columns > MOST_COLUMNS:
        raise ValueError(f"a block has at most {MOST_COLUMNS} columns, got {columns}")
    mask = tensors[5] if kept is None else kept.view(torch.uint8)  # codes: there must be something
    whole = halves is None or halves.stride()[1:] == (rows, 1)
    if not (whole and all(tensor.is_contiguous() for tensor in (*tensors[:2], *tensors[3:], mask))):
        raise ValueError("the column kernels need contiguous tensors")
    on_cuda = writes_halves(table.device)
    if not on_cuda or tensors[2].stride(1) != 1:  # only the CUDA kernel takes a part of a larger matrix
        tensors = (*tensors[:2], tensors[2].contiguous(), *tensors[3:])
    if table.device.type == "cpu":
        _on_cpu((*tensors, mask), kept is not None, descend, grid, top)
        return
    if on_cuda:
        _on_cuda((*tensors, mask), halves, kept is not None, descend, grid, top)
        return
    programs = (-(-rows // ROWS_PER_PROGRAM),)
    _triton_kernel()[programs](
        *tensors,
        mask,
        rows,
        columns,
        top,
        LEVELS=table.shape[1],
        MASKED=kept is not None,
        GRID=grid,
        DESCEND=descend,
        C=max(16, 1 << (columns - 1).bit_length()),
        R=ROWS_PER_PROGRAM,
        num_warps=4,
    )


@lru_cache(maxsize=1)
def _triton_kernel() -> Any:
    from whit.kernels.triton.columns import round_block

    return round_block


@lru_cache(maxsize=1)
def nvrtc_found() -> bool:
    """Whether the CUDA C++ kernel can be compiled here."""
    try:
        nvrtc.compiler_library()
    except nvrtc.CompilationError:
        return False
    return True


@lru_cache(maxsize=1)
def cuda_source() -> str:
    """CUDA C++ of the kernel; what `cuda_options` defines it needs."""
    return (files("whit.kernels") / "cuda" / "columns.cu").read_text(encoding="utf-8")


def cuda_options(
    levels: int, lanes: int, threads: int, masked: bool, halves: bool, descend: bool, grid: bool
) -> tuple[str, ...]:
    """Definitions that choose one of the loops; `levels` are entries of a table, `lanes` threads that share a row."""
    chosen = {"LEVELS": levels, "MASKED": masked, "HALVES": halves, "DESCEND": descend, "GRID": grid}
    chosen |= {"LANES": lanes, "THREADS": threads, "SUB": 8 if levels <= 4 else 4}
    return tuple(f"-D{name}={int(value)}" for name, value in chosen.items())


@lru_cache(maxsize=64)
def _cuda_kernel(
    levels: int, rows: int, masked: bool, halves: bool, descend: bool, grid: bool, device: int
) -> tuple[Kernel, int, int]:
    """The kernel for one kind of loop, its blocks and threads; the device must be the current one."""
    lanes, threads = next((shape for most, *shape in CUDA_SHAPES if rows <= most), CUDA_WIDE_SHAPE)
    options = cuda_options(levels, lanes, threads, masked, halves, descend, grid)
    return nvrtc.kernel(cuda_source(), "round_columns", options, device), -(-rows * lanes // threads), threads


def _on_cuda(
    tensors: tuple[Tensor, ...], halves: Tensor | None, masked: bool, descend: bool, grid: bool, top: int
) -> None:
    # Thousands of these are launched: a processor takes longer to prepare one than the device to run it.
    columns, rows = tensors[0].shape
    device, current = tensors[0].device.index, torch.cuda.current_device()
    plane = 0 if halves is None else halves.stride(0)
    arguments: list[nvrtc.Argument] = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    arguments.append(ctypes.c_void_p(0 if halves is None else halves.data_ptr()))
    arguments += [ctypes.c_int(value) for value in (rows, columns, tensors[2].stride(0), plane)]
    arguments.append(ctypes.c_float(top))
    with nullcontext() if device in (None, current) else torch.cuda.device(device):
        number = current if device is None else device
        kernel, blocks, threads = _cuda_kernel(
            tensors[3].shape[1], rows, masked, halves is not None, descend, grid, number
        )
        kernel.launch(blocks, threads, 0, arguments)


def _on_cpu(tensors: tuple[Tensor, ...], masked: bool, descend: bool, grid: bool, top: int) -> None:
    from whit.kernels.cpu.columns import ROWS_PER_TILE, round_rows

    arrays = [item.detach().numpy() for item in tensors]
    limit = numpy.float32(top)

    def part(first: int, last: int) -> None:
        round_rows(*arrays, limit, masked, grid, descend, first, last)

    shared_out(part, tensors[0].shape[1], ROWS_PER_TILE)
