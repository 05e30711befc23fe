"""What a decoder does between its products, in few launches.

At a few microseconds per product, the small operations of a decoder block (some forty launches as written) take longer
than the products. Five ops cover them; each has a plain meaning in torch, given here, and, on a GPU with Triton, one
kernel that rounds where the plain meaning rounds (`decode_launch`). None of them synchronises with the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from whit.kernels.decode_launch import (
    has_kernels,
    launch_add_rms_norm,
    launch_choose,
    launch_gated,
    launch_rotate_and_attend,
    launch_rotate_and_store,
)
from whit.kernels.decode_state import Chosen, KeyValues, Place


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
