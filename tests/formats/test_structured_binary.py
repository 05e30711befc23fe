from math import comb, log2

import pytest
import torch
from torch import Tensor

from tests.formats.test_nm_index import random_mask
from whit.formats import Packed, format_from_json
from whit.formats.structured_binary import StructuredBinary


def random_packed(rows: int, columns: int, layout: StructuredBinary) -> tuple[Packed, list[Tensor]]:
    generator = torch.Generator().manual_seed(rows + columns)
    kept = random_mask(rows, columns, layout.n, layout.m)
    signs = torch.rand(rows, columns, generator=generator) < 0.5
    salient = torch.rand(columns, generator=generator) < (0.2 if layout.regions > 1 else 0)
    regions = torch.randint(0, layout.regions, (rows, columns), generator=generator)
    regions = torch.where(salient, regions.clamp(max=1), regions)
    scalars = torch.randn(rows, layout.blocks(columns), layout.scalars, generator=generator).half()
    return layout.pack(kept, signs, regions, salient, scalars), [kept, signs, regions, salient, scalars]


@pytest.mark.parametrize(("regions", "means"), [(1, False), (2, False), (3, False), (3, True)])
@pytest.mark.parametrize(("n", "m"), [(4, 8), (2, 8), (1, 1), (8, 8), (2, 4)])
@pytest.mark.parametrize(("columns", "block"), [(64, 24), (40, 0)])
def test_unpacking_is_the_written_equation_bit_for_bit(
    regions: int, means: bool, n: int, m: int, columns: int, block: int
) -> None:
    layout = StructuredBinary(n, m, block, regions, means)
    packed, (kept, signs, chosen, salient, scalars) = random_packed(4, columns, layout)
    weight = packed.unpack()
    assert packed.stored_bytes() == layout.bytes(4, columns)
    for row in range(4):
        for column in range(columns):
            values = scalars[row, column // (block or columns)].float()
            first, region = 2.0 * signs[row, column] - 1, int(chosen[row, column])
            if not kept[row, column]:
                expected = torch.zeros(())
            elif salient[column]:
                mean = values[-3] if means else torch.zeros(())
                expected = mean + first * values[-2] + (2.0 * region - 1) * values[-1]
            elif means:
                expected = values[2 * region] + first * values[2 * region + 1]
            else:
                expected = first * values[region]
            assert weight[row, column] == expected
    index = torch.tensor([3, 0, 0])
    assert torch.equal(layout.unpack_rows(packed.tensors, 4, columns, index), weight[index])


def test_stored_bits_are_the_formula_of_the_page() -> None:
    size = 40320  # divisible by all units: no padding anywhere

    def bits(*fields: int, means: bool = False) -> float:
        return StructuredBinary(*fields, means=means).bytes(size, size) * 8 / size**2

    three = 2.6 + 80 / size + 1 / size
    assert bits(1, 1, 0, 3) == pytest.approx(three)
    assert bits(1, 1, 128, 3, means=True) == pytest.approx(2.6 + 16 * 9 / 128 + 1 / size)
    assert bits(4, 8, 0, 3) == pytest.approx(7 / 9 + 1.3 + 81 / size)
    assert bits(2, 8, 0, 2) == pytest.approx(0.625 + 0.5 + 65 / size)
    assert bits(2, 8, 0, 1) == pytest.approx(0.625 + 0.25 + 16 / size)
    assert bits(1, 4, 0, 1) == pytest.approx(0.75 + 16 / size)


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (3, 8), (4, 8), (5, 8), (6, 8), (2, 8), (1, 4), (8, 16)])
@pytest.mark.parametrize("regions", [1, 2, 3])
def test_no_pattern_is_stored_below_its_information(n: int, m: int, regions: int) -> None:
    bound = log2(comb(m, n)) / m + n / m
    assert StructuredBinary(n, m, 0, regions).bytes(4096, 4096) * 8 / 4096**2 > bound
    if n / m >= 3 / 8:
        assert bound >= 1


def test_it_comes_back_from_json_and_refuses_nonsense() -> None:
    layout = StructuredBinary(4, 8, 128, means=True)
    assert format_from_json(layout.to_json()) == layout
    for fields in ((5, 4, 0, 3), (0, 4, 0, 3), (2, 4, -1, 3), (2, 4, 0, 4), (2, 4, 0, 2, True)):
        with pytest.raises(ValueError, match="got"):
            StructuredBinary(*fields)
