"""Which N of every M consecutive columns are kept, as few whole bytes per row as an exact, quickly decoded code needs.

Each aligned group of M columns keeps N, so it is one of C(M, N) patterns, numbered in lexicographic order of the kept
positions (for 2:4: 1100 is 0, 1010 is 1, ..., 0011 is 5). The numbers of k consecutive groups form one integer of base
C(M, N), first group lowest, stored in b bytes, lowest first; k and b <= 7 are what makes the row shortest. For example

    4:8   9 groups in 7 bytes   0.778 bits per column   (log2 C(8, 4) / 8 = 0.766, a bitmap takes 1)
    2:8   8 groups in 5 bytes   0.625                   (0.601)
    2:4   3 groups in 1 byte    0.667                   (0.646)
    1:4   4 groups in 1 byte    0.5                     (0.5)

Groups wider than 16 columns keep a plain bitmap. A last group of r < M columns keeps ceil(r N / M) of them; it is
coded as if the columns beyond the row followed, the first of them kept.
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from math import comb

import torch
from torch import Tensor

from whit.formats.bits import pack_codes, packed_width, unpack_codes

WIDEST_RANKED = 16
WORD_BYTES = 7


def kept_in_group(width: int, kept: int, group: int) -> int:
    """Kept columns among `width` <= M columns: N in a whole group, ceil(width N / M) in a last, narrower one."""
    return -(-width * kept // group)


def kept_in_row(columns: int, kept: int, group: int) -> int:
    """Kept columns of a row of `columns` at `kept` out of every `group`."""
    whole, rest = divmod(columns, group)
    return whole * kept + kept_in_group(rest, kept, group)


def index_bytes(columns: int, kept: int, group: int) -> int:
    """Bytes per row of the coded index; 0 where nothing or everything is kept.

    Raises:
        ValueError: not 0 <= kept <= group, or group < 1.
    """
    _check(kept, group)
    if kept in (0, group):
        return 0
    if group > WIDEST_RANKED:
        return packed_width(columns, 1)
    ranks, width = word_of_groups(columns, kept, group)
    return -(-_groups(columns, group) // ranks) * width


def encode_mask(mask: Tensor, kept: int, group: int) -> Tensor:
    """Code a mask.

    Args:
        mask: bool (..., columns), True where kept, `kept` of every `group` columns (see the top of this file).
        kept: N.
        group: M.

    Returns:
        uint8 (..., index_bytes(columns, kept, group)).

    Raises:
        ValueError: a group keeps another number of columns.
    """
    shape, columns = mask.shape[:-1], mask.shape[-1]
    groups, rest = _groups(columns, group), columns % group
    width = index_bytes(columns, kept, group)
    padded = torch.nn.functional.pad(mask, (0, groups * group - columns))
    if rest:
        padded[..., columns : columns + kept - kept_in_group(rest, kept, group)] = True
    grouped = padded.reshape(*shape, groups, group)
    if not bool((grouped.sum(-1) == kept).all()):
        raise ValueError(f"the mask does not keep {kept} of every {group} columns")
    if width == 0:
        return torch.zeros(*shape, 0, dtype=torch.uint8, device=mask.device)
    if group > WIDEST_RANKED:
        return pack_codes(mask, 1)
    powers = 2 ** torch.arange(group, device=mask.device)
    ranks = _rank_of_bits(kept, group, mask.device)[(grouped * powers).sum(-1)]
    per_word, word_bytes = word_of_groups(columns, kept, group)
    words = -(-groups // per_word)
    ranks = torch.nn.functional.pad(ranks, (0, words * per_word - groups)).reshape(*shape, words, per_word)
    values = (ranks * comb(group, kept) ** torch.arange(per_word, device=mask.device)).sum(-1, keepdim=True)
    stored = (values >> (8 * torch.arange(word_bytes, device=mask.device))) & 0xFF
    return stored.to(torch.uint8).reshape(*shape, width)


def decode_mask(packed: Tensor, columns: int, kept: int, group: int) -> Tensor:
    """Inverse of `encode_mask`: uint8 (..., index_bytes) -> bool (..., columns)."""
    shape = packed.shape[:-1]
    _check(kept, group)
    if kept in (0, group):
        return torch.full((*shape, columns), kept == group, dtype=torch.bool, device=packed.device)
    if group > WIDEST_RANKED:
        return unpack_codes(packed, 1, columns).bool()
    per_word, word_bytes = word_of_groups(columns, kept, group)
    stored = packed.reshape(*shape, -1, word_bytes).long()
    values = (stored << (8 * torch.arange(word_bytes, device=packed.device))).sum(-1, keepdim=True)
    patterns = comb(group, kept)
    ranks = values // patterns ** torch.arange(per_word, device=packed.device) % patterns
    ranks = ranks.flatten(-2)[..., : _groups(columns, group)]
    return _pattern_of_rank(kept, group, packed.device)[ranks].flatten(-2)[..., :columns]


def kept_columns(mask: Tensor) -> Tensor:
    """Places of the kept columns, ascending: bool (rows, columns) with equal counts k per row -> int64 (rows, k)."""
    return torch.nonzero(mask)[:, 1].reshape(mask.shape[0], -1)


def _check(kept: int, group: int) -> None:
    if group < 1 or not 0 <= kept <= group:
        raise ValueError(f"N:M needs 0 <= N <= M and M >= 1, got {kept}:{group}")


def _groups(columns: int, group: int) -> int:
    return -(-columns // group)


@lru_cache(maxsize=256)
def word_of_groups(columns: int, kept: int, group: int) -> tuple[int, int]:
    """(groups per word, bytes per word) that give the shortest row; the narrower word on ties.

    For 0 < kept < group <= 16: the index of wider groups is a bitmap.
    """
    best = (0, 0, 0)
    for width in range(1, WORD_BYTES + 1):
        ranks = 0
        while comb(group, kept) ** (ranks + 1) <= 256**width:
            ranks += 1
        if ranks == 0:
            continue
        total = -(-_groups(columns, group) // ranks) * width
        if best[2] == 0 or total < best[0]:
            best = (total, ranks, width)
    return best[1], best[2]


@lru_cache(maxsize=32)
def _pattern_of_rank(kept: int, group: int, device: torch.device) -> Tensor:
    """bool (C(M, N), M): the kept columns of every pattern number."""
    places = torch.tensor(list(itertools.combinations(range(group), kept)))
    return torch.zeros(len(places), group, dtype=torch.bool).scatter_(1, places, True).to(device)


@lru_cache(maxsize=32)
def _rank_of_bits(kept: int, group: int, device: torch.device) -> Tensor:
    """int64 (2**M,): the number of the pattern whose kept columns are the bits set, column 0 lowest."""
    patterns = _pattern_of_rank(kept, group, torch.device("cpu"))
    bits = (patterns * 2 ** torch.arange(group)).sum(1)
    return torch.zeros(2**group, dtype=torch.int64).scatter_(0, bits, torch.arange(len(bits))).to(device)
