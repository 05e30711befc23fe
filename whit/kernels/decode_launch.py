"""How the kernels of `decode_ops` are launched: shapes, number of programs and when the next kernel may start."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from whit.kernels.cuda_attend import attended, attends
from whit.kernels.decode_state import Chosen, KeyValues, Place
from whit.kernels.launching import power_of_two, processors, runs_triton, starts_early

KEYS_AT_ONCE, MOST_AT_ONCE = 64, 128
"""Keys that one program of the attention kernel takes in a step: if there are many programs, and if there are few."""
KEYS_PER_WARP = 16
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


def _start(device: torch.device, at_once: bool = False) -> dict[str, int]:
    """How a kernel starts and lets the next one start: when what it waits for is there, or at once.

    A kernel that lets the next one start at once may have that read, before it waits, what the kernel before both of
    them still writes. Between products that is nothing; the place of a token, which attention reads, is written by
    `choose`, and the embedding behind it waits first.
    """
    return {"EARLY": 2 if at_once else 1, "launch_pdl": True} if starts_early(device) else {"EARLY": 0}


def launch_add_rms_norm(states: Tensor, update: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` by its kernel."""
    from whit.kernels.triton import decode_ops as kernels

    rows, columns = states.shape
    total = torch.empty_like(states) if update is not None else states
    normal = torch.empty_like(states)
    block = power_of_two(columns)
    kernels.add_rms_norm[(rows,)](
        states,
        states if update is None else update,
        weight,
        total,
        normal,
        columns,
        epsilon,
        ADD=update is not None,
        BLOCK=block,
        num_warps=min(16, max(1, block // 256)),
        **_start(states.device, at_once=True),
    )
    return total, normal


def launch_gated(gate: Tensor, up: Tensor) -> Tensor:
    """`gated` by its kernel."""
    from whit.kernels.triton import decode_ops as kernels

    rows, columns = gate.shape
    out = torch.empty(rows, columns, dtype=gate.dtype, device=gate.device)
    kernels.gated[(rows, -(-columns // 512))](
        gate,
        up,
        out,
        columns,
        gate.stride(0),
        up.stride(0),
        BLOCK=512,
        num_warps=4,
        **_start(gate.device, at_once=True),
    )
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
        num_warps=keys // KEYS_PER_WARP,
        **_start(query.device),
    )
    return out


def launch_rotate_and_store(query: Tensor, key: Tensor, value: Tensor, cache: KeyValues, place: Place) -> Tensor:
    """`rotate_and_store` by its kernel."""
    from whit.kernels.triton import decode_ops as kernels

    sequences, key_heads, length, size = cache.keys.shape
    tokens, heads = query.shape[0] // sequences, query.shape[1] // size
    out = torch.empty(sequences, tokens, heads, size, dtype=query.dtype, device=query.device)
    run: Any = kernels.rotate_and_store[(sequences * tokens,)]
    run(
        query,
        key,
        value,
        place.cosine,
        place.sine,
        cache.keys,
        cache.values,
        place.start,
        out,
        tokens,
        query.stride(0),
        key.stride(0),
        value.stride(0),
        length,
        HEADS=heads,
        GROUP=heads // key_heads,
        SIZE=size,
        WIDE=power_of_two(size),
        QUERIES=power_of_two(heads),
        SHARED=power_of_two(key_heads),
        num_warps=max(1, min(8, power_of_two(key_heads) * power_of_two(size) // 32)),
    )
    return out


def launch_choose(logits: Tensor, chosen: Chosen, place: Tensor | None = None) -> None:
    """`choose` by its kernel."""
    from whit.kernels.triton import decode_ops as kernels

    sequences, vocabulary = logits.shape
    block = min(power_of_two(vocabulary), 32768)
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
        num_warps=min(32, max(1, block // 512)),
        **_start(logits.device),
    )
