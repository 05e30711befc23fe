"""Attention of one new token per sequence on Hopper, a head's keys shared by a cluster's blocks (`cuda/attend.cu`).

Bound of the sums: as `whit.kernels.decode_ops.rotate_and_attend` in float32, whose roundings to 16 bits it makes.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from whit.kernels.cuda_ops import device_limits, starts_early
from whit.kernels.cuda_sources import source_of
from whit.kernels.nvrtc import Argument, CompilationError, Kernel, failed, give_up, kernel

SIZES = (64, 128, 256)
"""Sizes of heads: rows that 8, 16 or 32 threads hold."""
LARGEST_CLUSTER = 8


@dataclass(frozen=True)
class AttendLaunch:
    """Blocks of a cluster, threads of a block, rows of the cache that each team of threads asks for at once."""

    splits: int
    threads: int = 256
    rows: int = 4
    eager: bool = True

    def shared(self, size: int) -> int:
        """Bytes of shared memory of a block."""
        warps = self.threads // 32
        return 4 * (warps * (size + 2) + size + 2 * self.splits)


def attend_launch(heads: int, length: int, size: int, processors: int) -> AttendLaunch:
    """The launch for so many heads of all sequences, if keys suffice.

    Up to two blocks for each multiprocessor in pairs, or one in larger clusters, which do not reach all of them.
    """
    at_once = 256 // (size // 8) * 4
    splits = 1
    while splits < LARGEST_CLUSTER and splits * at_once < length:
        if 2 * splits * heads > processors * (2 if splits == 1 else 1):
            break
        splits *= 2
    return AttendLaunch(splits)


def attend_options(launch: AttendLaunch, size: int, bfloat: bool, early: bool) -> tuple[str, ...]:
    """Preprocessor options."""
    values = {
        "BF16": bfloat,
        "EARLY": early,
        "SIZE": size,
        "SPLITS": launch.splits,
        "THREADS": launch.threads,
        "ROWS": launch.rows,
        "EAGER": launch.eager,
    }
    return tuple(f"-D{key}={int(value)}" for key, value in values.items())


def attend_source() -> str:
    """The CUDA C++ of `attend`."""
    return source_of("common.cuh", "clusters.cuh", "attend.cu")


@lru_cache(maxsize=64)
def _compiled(launch: AttendLaunch, size: int, bfloat: bool, index: int) -> Kernel:
    return kernel(attend_source(), "attend", attend_options(launch, size, bfloat, starts_early(index)), index)


def attends(query: Tensor, key: Tensor, value: Tensor, keys: Tensor) -> bool:
    """Whether the kernel takes these: on Hopper, 16 bits, rows that start at multiples of 16 bytes."""
    if query.dtype not in (torch.float16, torch.bfloat16) or keys.shape[3] not in SIZES:
        return False
    if failed(_KIND) or query.device.type != "cuda" or not starts_early(query.device.index):
        return False
    return all(item.data_ptr() % 16 == 0 and item.stride(0) % 8 == 0 for item in (query, key, value))


_KIND = "attention of a decoding step"


def attended(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], scaling: float
) -> Tensor | None:
    """`launch_attend`; None, with one warning, where it cannot be compiled or launched: nothing has run then."""
    try:
        return launch_attend(tensors, scaling)
    except CompilationError as error:
        give_up(_KIND, _KIND, error)
    return None


def launch_attend(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    scaling: float,
    launch: AttendLaunch | None = None,
) -> Tensor:
    """Query, key, value, cosine, sine, keys, values, position and start as in `rotate_and_attend`; its result."""
    query, key, value, _, _, keys, _, _, _ = tensors
    sequences, key_heads, length, size = keys.shape
    heads, index = query.shape[1] // size, query.device.index
    if launch is None:
        launch = attend_launch(sequences * heads, length, size, device_limits(index)[1])
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    arguments: list[Argument] = [ctypes.c_void_p(item.data_ptr()) for item in (*tensors, out)]
    numbers = (query.stride(0), key.stride(0), value.stride(0), length, heads, heads // key_heads)
    arguments += [*(ctypes.c_int(number) for number in numbers), ctypes.c_float(scaling)]
    with torch.cuda.device(query.device):
        run = _compiled(launch, size, query.dtype == torch.bfloat16, index)
        grid, shared = sequences * heads * launch.splits, launch.shared(size)
        run.launch(grid, launch.threads, shared, arguments, early=True, cluster=launch.splits)
    return out
