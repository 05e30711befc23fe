import itertools

import pytest
import torch

from whit.formats.trits import pack_trits, trit_bytes, unpack_trits


def test_five_trits_are_one_byte_lowest_first() -> None:
    every = torch.tensor(list(itertools.product(range(3), repeat=5)))
    packed = pack_trits(every)
    assert packed.flatten().tolist() == [sum(int(t) * 3**k for k, t in enumerate(row)) for row in every]
    assert torch.equal(unpack_trits(packed, 5), every)


@pytest.mark.parametrize("columns", [0, 1, 4, 5, 6, 33])
def test_ragged_rows_come_back(columns: int) -> None:
    trits = torch.randint(0, 3, (2, 3, columns), generator=torch.Generator().manual_seed(columns))
    packed = pack_trits(trits)
    assert packed.shape == (2, 3, trit_bytes(columns))
    assert torch.equal(unpack_trits(packed, columns), trits)
