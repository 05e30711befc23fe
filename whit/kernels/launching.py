"""What every Triton kernel of packed layers needs: whether Triton works here, and launch shapes found fastest.

Found shapes are kept in one JSON file per kind of device: those shipped with the package (`whit/kernels/tuned`), and
over them those that a benchmark run with `--tune` has written to the cache folder of this machine. Shapes change speed
alone.
"""

from __future__ import annotations

import importlib.util
import json
import os
import warnings
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from whit.formats.base import Packed
from whit.kernels.nvrtc import cache_folder

HALVES = (torch.float16, torch.bfloat16)


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


@lru_cache(maxsize=1)
def interpreted() -> bool:
    """Whether Triton runs its kernels in Python on a CPU (TRITON_INTERPRET=1), which tests do."""
    return os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None


@lru_cache(maxsize=1)
def _triton_found() -> bool:
    if importlib.util.find_spec("triton") is not None:
        return True
    warnings.warn(
        "Triton is missing, so 8-bit layers run without their fused kernels on this GPU (remedy: pip install triton)",
        stacklevel=2,
    )
    return False


@lru_cache(maxsize=16)
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)


def runs_triton(device: torch.device, least: tuple[int, int] = (8, 0)) -> bool:
    """Whether the kernels can run on a device: CUDA of that compute capability with Triton, or interpreted."""
    if device.type == "cuda" and torch.version.cuda is not None:
        return capability(device) >= least and _triton_found()
    return device.type == "cpu" and interpreted()


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
    return cache_folder() / f"tiles-{device.replace(' ', '-')}.json"


@lru_cache(maxsize=8)
def tuned_tiles(device: str) -> dict[str, Tile]:
    """Launch shapes found for a kind of device: the shipped ones, and over them those of this machine."""
    shipped = files("whit.kernels") / "tuned" / tuning_file(device).name
    found: dict[str, Tile] = {}
    for source in (shipped, tuning_file(device)):
        try:
            found |= {key: Tile(**fields) for key, fields in json.loads(source.read_text(encoding="utf-8")).items()}
        except (OSError, ValueError, TypeError, AttributeError):
            continue  # absent or of another version: shapes only change speed
    return found


def keep_tuned(device: str, tiles: dict[str, Tile]) -> None:
    """Add found shapes to this machine's file."""
    path = tuning_file(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    merged = {key: asdict(tile) for key, tile in sorted((tuned_tiles(device) | tiles).items())}
    path.write_text(json.dumps(merged, indent=0) + "\n", encoding="utf-8")
    tuned_tiles.cache_clear()


def use_tile(device: str, key: str, tile: Tile | None) -> None:
    """Take a shape (or with None no longer any) for what `key` names, in this process alone."""
    if tile is None:
        tuned_tiles(device).pop(key, None)
    else:
        tuned_tiles(device)[key] = tile


@lru_cache(maxsize=16)
def device_name(device: torch.device) -> str:
    """Name under which shapes are filed."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


def power_of_two(size: int) -> int:
    """The least power of two that is no smaller."""
    return 1 << max(0, size - 1).bit_length()


def default_tile(tokens: int, rows: int, columns: int, descriptor: bool, many: int) -> Tile:
    """A launch shape that is good on average for 8-bit operands, for a device with `many` multiprocessors."""
    if tokens == 1:
        words = power_of_two(-(-columns // 4))
        return Tile(1, 8, words, min(32, max(1, words // 256)), 1, 2)
    if tokens <= 64:
        m = max(16, power_of_two(tokens))
        return Tile(m, 32 if rows <= 32 * 4 * many else 64, 256 if m <= 16 else 128, 4, 4, 4)
    if tokens <= 256 or -(-tokens // 128) * -(-rows // 256) < 2 * many:
        return Tile(128, 128, 128, 8, 4, 8, descriptor)
    return Tile(128, 256, 128, 8, 4, 16, descriptor)


def tile_key(kind: str, tokens: int, rows: int, columns: int) -> str:
    """What a found launch shape is filed under."""
    return f"{kind}/{rows}x{columns}/{power_of_two(tokens)}"


def choose_tile(kind: str, tokens: int, rows: int, columns: int, device: torch.device) -> Tile:
    """The launch shape to use: one found fastest, otherwise the default."""
    descriptor = columns % 16 == 0 and device.type == "cuda" and capability(device) >= (9, 0)
    found = tuned_tiles(device_name(device)).get(tile_key(kind, tokens, rows, columns))
    if found is not None and (descriptor or not found.descriptor):
        return found
    tile = default_tile(tokens, rows, columns, descriptor, processors(device))
    if interpreted():
        return Tile(min(tile.m, 32), min(tile.n, 32), tile.k if tokens == 1 else 64, 4, 1, 2, tail=4)
    return tile
