"""What a decoder keeps from one token to the next: keys and values, the place in the sequence, what was chosen."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


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
