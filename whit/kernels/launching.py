"""What every Triton kernel of packed layers needs: whether Triton works here, and launch shapes found fastest.

Found shapes are kept in one JSON file per kind of device: those shipped with the package (`whit/kernels/tuned`), and
over them those that `whit tune` (or a benchmark with `--tune`) has written to the cache folder of this machine. Shapes
change speed alone.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whit.formats.base import Packed
from whit.formats.memory import Memory
from whit.kernels.found import keep_shapes, read_shapes, shape_from
from whit.kernels.nvrtc import cache_folder

HALVES = (torch.float16, torch.bfloat16)
SMALLEST_SIDE, LARGEST_SIDE = 16, 512
"""Of a tile that tensor cores multiply."""


@dataclass(frozen=True)
class Tile:
    """Launch shape: outputs `m` x `n` of a program, `k` columns at a time in `stages` buffers, `warps` of 32 threads,
    `group` tiles of m that are taken before the next n, and whether tiles are fetched by the copy engine. If `tail` is
    not 0, so many programs fit into a multiprocessor, and the last tiles may be divided among more programs."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    group: int = 8
    descriptor: bool = False
    tail: int = 0


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python on a CPU (TRITON_INTERPRET=1), which tests do."""
    return os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None


@lru_cache(maxsize=16)
def _works(index: int) -> bool:
    """Whether a kernel can be compiled for a CUDA device and started; says once why not."""
    try:
        from whit.kernels.triton.probe import one

        one[(1,)](torch.empty(1, dtype=torch.int32, device=f"cuda:{index}"))
    except torch.OutOfMemoryError:  # says nothing of Triton
        raise
    except Exception as error:  # whatever a missing compiler, driver or library leads to
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        warnings.warn(
            f"Triton is missing or unusable, so 8-bit layers run without their fused kernels on CUDA device {index}: "
            f"{reason[0]} (remedy: pip install triton, and a C compiler)",
            stacklevel=2,
        )
        return False
    return True


@lru_cache(maxsize=16)
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)


def runs_triton(device: torch.device) -> bool:
    """Whether the kernels can run on a device: CUDA of compute capability 8.0 with Triton, or interpreted."""
    if device.type != "cuda":
        return device.type == "cpu" and interpreted()
    if torch.version.cuda is None or capability(device) < (8, 0):
        return False
    return torch.compiler.is_compiling() or _works(device.index)  # tracing cannot look for libraries


def usable(x: Tensor, packed: Packed) -> bool:
    """16-bit inputs without gradient, on a device that runs the kernels, all stored tensors there and contiguous."""
    if x.dtype not in HALVES or x.shape[-1:] != (packed.columns,) or min(packed.rows, packed.columns) == 0:
        return False
    if x.numel() == 0 or (x.requires_grad and torch.is_grad_enabled()) or not runs_triton(x.device):
        return False
    return all(tensor.device == x.device and tensor.is_contiguous() for tensor in packed.tensors.values())


@lru_cache(maxsize=16)
def processors(device: torch.device) -> int:
    """Multiprocessors of a device; few where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def starts_early(device: torch.device) -> bool:
    """Whether a kernel may be set up while the one before it in the stream ends (programmatic dependent launch)."""
    return device.type == "cuda" and capability(device) >= (9, 0)


def tuning_file(device: str) -> Path:
    """Where launch shapes of Triton kernels that were found on this machine are kept."""
    return cache_folder() / _own_file(device)


def _own_file(device: str) -> str:
    return f"tiles-{device.replace(' ', '-')}.json"


def _tile_from(values: dict[str, Any]) -> Tile:
    tile = shape_from(Tile, values)
    sides = (tile.m, tile.n, tile.k or 1, tile.warps)
    if any(size < 1 or size & (size - 1) for size in sides) or max(sides[:3]) > LARGEST_SIDE:
        raise ValueError("sides of a tile, and warps, are powers of two")
    if tile.warps > 32 or not (1 <= tile.stages <= 8 and 1 <= tile.group <= 64 and 0 <= tile.tail <= 8):
        raise ValueError("more than a multiprocessor has")
    return tile


@lru_cache(maxsize=8)
def tuned_tiles(device: str) -> dict[str, Tile]:
    """Launch shapes found for a kind of device: the shipped ones, and over them those of this machine."""
    return read_shapes(_own_file(device), _own_file(device), _tile_from)


def keep_tuned(device: str, tiles: dict[str, Tile]) -> None:
    """Add found shapes to this machine's file.

    Raises:
        OutputError: it cannot be written.
    """
    keep_shapes(_own_file(device), tiles, _tile_from)
    tuned_tiles.cache_clear()


def use_tile(device: str, key: str, tile: Tile | None) -> None:
    """Take a shape (or with None no longer any) for what `key` names, in this process alone."""
    if tile is None:
        tuned_tiles(device).pop(key, None)
    else:
        tuned_tiles(device)[key] = tile
    Memory.forget_all()


@lru_cache(maxsize=16)
def device_name(device: torch.device) -> str:
    """Name under which shapes are filed."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


def power_of_two(size: int) -> int:
    """The least power of two that is no smaller."""
    return 1 << max(0, size - 1).bit_length()


def default_tile(tokens: int, rows: int, columns: int, descriptor: bool, many: int) -> Tile:
    """A launch shape that is good on average for 8-bit operands, for a device with `many` multiprocessors.

    For one token, `group` programs to a multiprocessor, `n` rows at a time; `columns` counts bytes of codes then.
    """
    if tokens == 1:
        words = power_of_two(-(-columns // 4))
        warps = min(32, max(1, words // 256))
        return Tile(1, min(8, max(2, 16384 // words)), words, warps, 1, 2 if warps <= 8 else 1)
    if tokens <= 64:
        m = max(16, power_of_two(tokens))
        return Tile(m, 32 if rows <= 32 * 4 * many else 64, 256 if m <= 16 else 128, 4, 4, 4)
    if tokens <= 1024:
        return Tile(64, 128, 128, 4, 4, 8, descriptor)
    return Tile(128, 128, 128, 4, 3, 8, descriptor)


def registers(tile: Tile) -> int | None:
    """Registers of a thread with which `group` programs fit into a multiprocessor; None: no need to limit them."""
    most = 65536 // (32 * tile.warps * tile.group)
    return most if 64 <= most < 256 else None


def tile_key(kind: str, tokens: int, rows: int, columns: int) -> str:
    """What a found launch shape is filed under."""
    return f"{kind}/{rows}x{columns}/{power_of_two(tokens)}"


def copies_boxes(columns: int, device: torch.device) -> bool:
    """Whether a kernel can fetch tiles with the copy engine: from Hopper on, of rows of a multiple of 16 bytes."""
    return columns % 16 == 0 and device.type == "cuda" and capability(device) >= (9, 0)


def choose_tile(kind: str, tokens: int, rows: int, columns: int, device: torch.device) -> Tile:
    """The launch shape to use: one found fastest, otherwise the default."""
    descriptor = copies_boxes(columns, device)
    found = tuned_tiles(device_name(device)).get(tile_key(kind, tokens, rows, columns))
    if found is not None and (descriptor or not found.descriptor):
        if tokens == 1:
            return found
        if min(found.m, found.n, found.k) >= SMALLEST_SIDE:
            return fitted(found, 1, shared_memory(device))
    tile = default_tile(tokens, rows, columns, descriptor, processors(device))
    if interpreted():
        return Tile(min(tile.m, 32), min(tile.n, 32), tile.k if tokens == 1 else 64, 4, 1, 2, tail=4)
    return tile if tokens == 1 else fitted(tile, 1, shared_memory(device))


def fitted(tile: Tile, input_bytes: int, room: int) -> Tile:
    """The tile with as many of its stages, and then of its columns, as fit into `room` bytes of shared memory.

    Args:
        tile: with 8-bit weights.
        input_bytes: of one input.
        room: what a program may have; 64 bytes for each row and column of the tile are left for outliers.
    """
    stages, k = tile.stages, tile.k
    room -= 64 * (tile.m + tile.n) + 1024
    while stages * k * (input_bytes * tile.m + tile.n) > room and (stages > 2 or k > 32):
        stages, k = (stages - 1, k) if stages > 2 else (stages, k // 2)
    return replace(tile, stages=stages, k=k)


@lru_cache(maxsize=16)
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have; plenty where kernels are interpreted."""
    if device.type != "cuda":
        return 1 << 20
    room: int = torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]
    return room
