"""How the kernels of `decode_ops` are launched: shapes, number of programs and when the next kernel may start."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

from whit.kernels.cuda_attend import attended, attends
from whit.kernels.decode_state import Chosen, KeyValues, Place
from whit.kernels.launching import power_of_two, processors, runs_triton, starts_early
from whit.kernels.repeated import Repeated

KEYS_AT_ONCE, MOST_AT_ONCE = 64, 128
"""Keys that one program of the attention kernel takes in a step: if there are many programs, and if there are few."""
KEYS_PER_WARP = 16
MANY_ROWS = 64
"""Rows from which a thread of the gate takes sixteen bytes (H200, 11008 columns: 2048 rows in 33 µs instead of 55, but
16 in 1.16 instead of 1.11)."""
PROGRAMS_PER_PROCESSOR = 4
"""How many programs the attention kernel is divided into, at most, for each multiprocessor."""


def has_kernels(device: torch.device) -> bool:
    """Whether the ops run as Triton kernels there (on a CPU they do not, interpreted or not)."""
    return device.type == "cuda" and runs_triton(device)


def splits_for(device: torch.device, sequences: int, heads: int, length: int) -> int:
    """Into how many parts the keys of a head are divided so that the device has enough to do.

    As few as possible if every program has a multiprocessor for itself: adding parts takes as long as attending.
    """
    if not has_kernels(device):
        return 1
    large = -(-length // MOST_AT_ONCE)
    if sequences * heads * large <= processors(device):
        return max(1, large)
    wanted = -(-PROGRAMS_PER_PROCESSOR * processors(device) // (sequences * heads))
    return max(1, min(wanted, -(-length // KEYS_AT_ONCE)))


def keys_at_once(programs: int, keys: int, many: int) -> int:
    """Keys that a program of `programs` takes in a step, each having `keys`, on a device of `many` multiprocessors."""
    return KEYS_AT_ONCE if programs > many else min(MOST_AT_ONCE, max(KEYS_AT_ONCE, power_of_two(keys)))


Types: TypeAlias = tuple[torch.dtype, ...]
Numbers: TypeAlias = tuple[int, ...]


def _start(device: torch.device, at_once: bool = False) -> tuple[int, dict[str, bool]]:
    """How a kernel starts and lets the next one start: when what it waits for is there, or at once.

    A kernel that lets the next one start at once may have that read, before it waits, what the kernel before both of
    them still writes. Between products that is nothing; the place of a token, which attention reads, is written by
    `choose`, and the embedding behind it waits first.

    Returns:
        EARLY of the kernels, and Triton's options.
    """
    return (2 if at_once else 1, {"launch_pdl": True}) if starts_early(device) else (0, {})


@lru_cache(maxsize=256)
def _norm(rows: int, columns: int, epsilon: float, add: bool, types: Types, device: torch.device) -> Repeated:
    from whit.kernels.triton import decode_ops as kernels

    early, start = _start(device, at_once=True)
    block = power_of_two(columns)
    constants = {"ADD": add, "EARLY": early, "BLOCK": block}
    options = {"num_warps": min(16, max(1, block // 256)), **start}
    return Repeated(kernels.add_rms_norm, (rows,), (columns, epsilon), constants, options)


def launch_add_rms_norm(states: Tensor, update: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` by its kernel."""
    (rows, columns), add = states.shape, update is not None
    total = torch.empty_like(states) if add else states
    normal = torch.empty_like(states)
    added = states if update is None else update
    launch = _norm(rows, columns, epsilon, add, (states.dtype, added.dtype, weight.dtype), states.device)
    launch.launch(states, added, weight, total, normal)
    return total, normal


@lru_cache(maxsize=256)
def _gate(rows: int, columns: int, strides: tuple[int, int], types: Types, device: torch.device) -> Repeated:
    from whit.kernels.triton import decode_ops as kernels

    early, start = _start(device, at_once=True)
    block, warps = (512, 4) if rows < MANY_ROWS else (2048, 8)
    grid, options = (rows, -(-columns // block)), {"num_warps": warps, **start}
    return Repeated(kernels.gated, grid, (columns, *strides), {"EARLY": early, "BLOCK": block}, options)


def launch_gated(gate: Tensor, up: Tensor) -> Tensor:
    """`gated` by its kernel."""
    rows, columns = gate.shape
    out = torch.empty(rows, columns, dtype=gate.dtype, device=gate.device)
    strides = gate.stride(0), up.stride(0)
    _gate(rows, columns, strides, (gate.dtype, up.dtype), gate.device).launch(gate, up, out)
    return out


def launch_rotate_and_attend(
    query: Tensor, key: Tensor, value: Tensor, cache: KeyValues, place: Place, scaling: float
) -> Tensor:
    """`rotate_and_attend` by its kernel."""
    if attends(query, key, value, cache.keys):
        tensors = (query, key, value, place.cosine, place.sine, cache.keys, cache.values, place.position, place.start)
        found = attended(tensors, scaling)
        if found is not None:
            return found
    from whit.kernels.triton import decode_ops as kernels

    sequences, key_heads, length, size = cache.keys.shape
    heads = query.shape[1] // size
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    splits = place.partial.shape[1]
    keys = keys_at_once(sequences * heads * splits, -(-length // splits), processors(query.device))
    early, start = _start(query.device)
    run: Any = kernels.rotate_and_attend[(sequences * heads, splits)]
    run(
        query,
        key,
        value,
        place.cosine,
        place.sine,
        cache.keys,
        cache.values,
        place.position,
        place.start,
        out,
        place.partial,
        place.arrived,
        query.stride(0),
        key.stride(0),
        value.stride(0),
        length,
        scaling,
        HEADS=heads,
        GROUP=heads // key_heads,
        SIZE=size,
        WIDE=power_of_two(size),
        KEYS=keys,
        SPLITS=splits,
        PARTS=power_of_two(splits),
        LOOP=-(-length // splits) > keys,
        EARLY=early,
        num_warps=keys // KEYS_PER_WARP,
        **start,
    )
    return out


@lru_cache(maxsize=256)
def _rotation(
    sequences: int, tokens: int, heads: int, cache: torch.Size, strides: Numbers, types: Types, device: torch.device
) -> Repeated:
    from whit.kernels.triton import decode_ops as kernels

    _, key_heads, length, size = cache
    constants = {
        "HEADS": heads,
        "GROUP": heads // key_heads,
        "SIZE": size,
        "WIDE": power_of_two(size),
        "QUERIES": power_of_two(heads),
        "SHARED": power_of_two(key_heads),
    }
    options = {"num_warps": max(1, min(8, power_of_two(key_heads) * power_of_two(size) // 32))}
    numbers = (tokens, *strides, length)
    return Repeated(kernels.rotate_and_store, (sequences * tokens,), numbers, constants, options)


def launch_rotate_and_store(query: Tensor, key: Tensor, value: Tensor, cache: KeyValues, place: Place) -> Tensor:
    """`rotate_and_store` by its kernel."""
    sequences, _, _, size = shape = cache.keys.shape
    tokens, heads = query.shape[0] // sequences, query.shape[1] // size
    out = torch.empty(sequences, tokens, heads, size, dtype=query.dtype, device=query.device)
    strides = query.stride(0), key.stride(0), value.stride(0)
    types = query.dtype, key.dtype, value.dtype, place.cosine.dtype, cache.keys.dtype
    _rotation(sequences, tokens, heads, shape, strides, types, query.device).launch(
        query, key, value, place.cosine, place.sine, cache.keys, cache.values, place.start, out
    )
    return out


def launch_choose(logits: Tensor, chosen: Chosen, place: Tensor | None = None) -> None:
    """`choose` by its kernel."""
    from whit.kernels.triton import decode_ops as kernels

    sequences, vocabulary = logits.shape
    block = min(power_of_two(vocabulary), 32768)
    early, start = _start(logits.device)
    kernels.choose[(sequences,)](
        logits,
        chosen.ids,
        chosen.tokens,
        chosen.count,
        chosen.ended,
        chosen.stops,
        chosen.count if place is None else place,
        logits.stride(0),
        vocabulary,
        chosen.tokens.shape[1],
        chosen.pad,
        STOPS=len(chosen.stops),
        MOVE=place is not None,
        BLOCK=block,
        EARLY=early,
        num_warps=min(32, max(1, block // 512)),
        **start,
    )
