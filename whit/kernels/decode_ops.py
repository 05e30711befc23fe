"""What a decoder does between its products, in few launches.

At a few microseconds per product, the small operations of a decoder block (some forty launches as written) take longer
than the products. Five ops cover them; each has a plain meaning in torch and, on a GPU with Triton, one kernel that
rounds where the plain meaning rounds. None of them synchronises with the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from whit.kernels.cuda_attend import attended, attends
from whit.kernels.launching import power_of_two, processors, runs_triton, starts_early

KEYS_AT_ONCE, MOST_AT_ONCE = 64, 128
"""Keys that one program of the attention kernel takes in a step: if there are many programs, and if there are few."""
KEYS_PER_WARP = 16
PROGRAMS_PER_PROCESSOR = 4
"""How many programs the attention kernel is divided into, at most, for each multiprocessor."""


@dataclass(frozen=True)
class KeyValues:
    """Keys and values of one block for every sequence and position.

    Attributes:
        keys, values: (sequences, key heads, length, head size), written in place.
    """

    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class Place:
    """Where in its sequence the new token stands, shared by all blocks.

    Attributes:
        position: int64 (), index in the cache that the token gets.
        start: int64 (sequences,), index of the first token that is no padding.
        cosine, sine: (length, head size), of the rotation for a token that many places after the first.
        partial: float32 (sequences * heads, splits, head size + 2), room for partial sums of attention.
        arrived: int32 (sequences * heads,), zero between calls.
    """

    position: Tensor
    start: Tensor
    cosine: Tensor
    sine: Tensor
    partial: Tensor
    arrived: Tensor


def has_kernels(device: torch.device) -> bool:
    """Whether the ops run as Triton kernels there (on a CPU they do not, interpreted or not)."""
    return device.type == "cuda" and runs_triton(device)


def add_rms_norm(states: Tensor, update: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """h = states + update, and weight * h / sqrt(mean(h^2) + epsilon): root mean square normalisation.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv 1910.07467.

    Args:
        states: (n, columns). update: the same shape, or None for zero. weight: (columns,).

    Returns:
        h and its normalised form, (n, columns) in the dtype of `states`.
    """
    if has_kernels(states.device):
        return launch_add_rms_norm(states, update, weight, epsilon)
    total = states if update is None else states + update
    wide = total.float()
    normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return total, weight * normal.to(total.dtype)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, for rows (n, columns) of the same shape; rows may lie apart."""
    if has_kernels(gate.device):
        return launch_gated(gate, up)
    return torch.nn.functional.silu(gate) * up


def rotate_and_attend(
    query: Tensor, key: Tensor, value: Tensor, cache: KeyValues, place: Place, scaling: float
) -> Tensor:
    """Attention of one new token per sequence to itself and to those before it, with rotary positions.

    The new key (rotated) and value are written into the cache at `place.position`. Source of the rotation: Su et al.,
    "RoFormer", arXiv 2104.09864, in the form that turns the two halves of a head against each other.

    Args:
        query: (sequences, heads * head size). key, value: (sequences, key heads * head size). Rows may lie apart.
        scaling: factor of the products of queries and keys.

    Returns:
        (sequences, heads * head size).
    """
    if has_kernels(query.device):
        return launch_rotate_and_attend(query, key, value, cache, place, scaling)
    sequences, heads, length, size = cache.keys.shape
    turn = place.position - place.start
    cosine, sine = (table[turn].view(sequences, 1, 1, size) for table in (place.cosine, place.sine))
    at = place.position.view(1)
    cache.keys.index_copy_(2, at, rotate(key.reshape(sequences, heads, 1, size), cosine, sine))
    cache.values.index_copy_(2, at, value.reshape(sequences, heads, 1, size))
    index = torch.arange(length, device=query.device)
    seen = (index <= place.position) & (index >= place.start[:, None])
    out = torch.nn.functional.scaled_dot_product_attention(
        rotate(query.reshape(sequences, -1, 1, size), cosine, sine),
        cache.keys,
        cache.values,
        attn_mask=seen[:, None, None],
        scale=scaling,
        enable_gqa=True,
    )
    return out.reshape(sequences, -1)


def rotate_and_store(query: Tensor, key: Tensor, value: Tensor, cache: KeyValues, place: Place) -> Tensor:
    """The same for the first tokens of every sequence, without the attention: rotated queries.

    Keys (rotated) and values are written into the cache from its beginning. Padding counts as the first place.

    Args:
        query: (sequences * tokens, heads * head size), a sequence's tokens one after the other; key, value alike.

    Returns:
        (sequences, tokens, heads, head size).
    """
    if has_kernels(query.device):
        return launch_rotate_and_store(query, key, value, cache, place)
    sequences, heads, _, size = cache.keys.shape
    tokens = query.shape[0] // sequences
    turn = (torch.arange(tokens, device=query.device) - place.start[:, None]).clamp(min=0)
    cosine, sine = (table[turn].unsqueeze(2) for table in (place.cosine, place.sine))
    shape = (sequences, tokens, heads, size)
    cache.keys[:, :, :tokens] = rotate(key.reshape(shape), cosine, sine).transpose(1, 2)
    cache.values[:, :, :tokens] = value.reshape(shape).transpose(1, 2)
    return rotate(query.reshape(sequences, tokens, -1, size), cosine, sine)


@dataclass(frozen=True)
class Chosen:
    """What has been chosen so far, written in place.

    Attributes:
        ids: int64 (sequences, 1), the token chosen last.
        tokens: int64 (sequences, room), all of them.
        count: int64 (sequences,), how many. ended: int32 (sequences,), 1 after a token that ends a sequence.
        stops: int64 (k,), tokens that do. pad: what follows.
    """

    ids: Tensor
    tokens: Tensor
    count: Tensor
    ended: Tensor
    stops: Tensor
    pad: int


def choose(logits: Tensor, chosen: Chosen, place: Tensor | None = None) -> None:
    """Take the most probable token of (sequences, vocabulary) for each sequence; the first if there are several.

    Args:
        place: int64 (), moved on by one.
    """
    if has_kernels(logits.device):
        launch_choose(logits, chosen, place)
        return
    if place is not None:
        place.add_(1)
    best = torch.where(chosen.ended != 0, chosen.pad, logits.argmax(-1))[:, None]
    chosen.ended.copy_((chosen.ended != 0) | (best == chosen.stops).any(-1))
    chosen.tokens.scatter_(1, chosen.count[:, None], best)
    chosen.ids.copy_(best)
    chosen.count.add_(1)


def rotate(vectors: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """x cos + (-second half, first half of x) sin, over the last dimension."""
    first, second = vectors.chunk(2, -1)
    return vectors * cosine + torch.cat((-second, first), -1) * sine


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
