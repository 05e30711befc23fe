import itertools
from math import comb, log2

import pytest
import torch
from torch import Tensor

from whit.formats.nm_index import decode_mask, encode_mask, index_bytes, kept_columns, kept_in_row


def random_mask(rows: int, columns: int, kept: int, group: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows + columns + kept)
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    for start in range(0, columns, group):
        part = torch.rand(rows, min(group, columns - start), generator=generator)
        count = -(-part.shape[1] * kept // group)
        mask[:, start : start + group].scatter_(1, part.argsort(1)[:, :count], True)
    return mask


@pytest.mark.parametrize(
    ("kept", "group"),
    [(1, 2), (1, 3), (2, 4), (1, 4), (3, 4), (1, 8), (2, 8), (4, 8), (5, 8), (8, 16), (3, 13), (2, 20), (0, 4), (4, 4)],
)
@pytest.mark.parametrize("columns", [1, 5, 8, 16, 75, 576])
def test_masks_come_back(kept: int, group: int, columns: int) -> None:
    mask = random_mask(3, columns, kept, group)
    packed = encode_mask(mask, kept, group)
    assert packed.dtype == torch.uint8
    assert packed.shape == (3, index_bytes(columns, kept, group))
    assert torch.equal(decode_mask(packed, columns, kept, group), mask)
    assert kept_columns(mask).shape == (3, kept_in_row(columns, kept, group))


def test_every_pattern_of_two_of_four_has_its_own_code_in_lexicographic_order() -> None:
    patterns = torch.zeros(6, 4, dtype=torch.bool)
    for number, places in enumerate(itertools.combinations(range(4), 2)):
        patterns[number, list(places)] = True
    assert encode_mask(patterns, 2, 4).flatten().tolist() == [0, 1, 2, 3, 4, 5]
    three = patterns[[5, 0, 2]].flatten()[None]
    assert encode_mask(three, 2, 4).tolist() == [[5 + 0 * 6 + 2 * 36]]


@pytest.mark.parametrize(
    ("kept", "group", "bits"), [(4, 8, 7 / 9), (2, 8, 0.625), (2, 4, 2 / 3), (1, 4, 0.5), (1, 2, 0.5)]
)
def test_the_index_is_near_its_information_and_below_a_bitmap(kept: int, group: int, bits: float) -> None:
    columns = 9 * 8 * 7 * 8
    stored = index_bytes(columns, kept, group) * 8 / columns
    assert stored == pytest.approx(bits)
    assert log2(comb(group, kept)) / group <= stored < 1.05 * log2(comb(group, kept)) / group + 1e-9


def test_a_mask_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="does not keep 2 of every 4"):
        encode_mask(torch.tensor([[True, True, True, False]]), 2, 4)
    with pytest.raises(ValueError, match="got 5:4"):
        index_bytes(8, 5, 4)
