import pytest
import torch
from torch import Tensor

from whit.formats import format_from_json
from whit.formats.base import Packed
from whit.formats.binary_residual import BinaryResidual


def random_packed(rows: int, columns: int, block: int, means: bool) -> tuple[Packed, list[Tensor]]:
    generator = torch.Generator().manual_seed(rows + columns)
    layout = BinaryResidual(block, means)
    signs, second = (torch.rand(rows, columns, generator=generator) < 0.5 for _ in range(2))
    salient = torch.rand(columns, generator=generator) < 0.2
    scalars = torch.randn(rows, layout.blocks(columns), 7 if means else 4, generator=generator).half()
    return layout.pack(signs, second, salient, scalars), [signs, second, salient, scalars]


@pytest.mark.parametrize("means", [True, False])
@pytest.mark.parametrize(("columns", "block"), [(256, 128), (200, 128), (37, 0), (300, 512)])
def test_unpacking_is_the_written_equation_bit_for_bit(means: bool, columns: int, block: int) -> None:
    rows = 6
    packed, (signs, second, salient, scalars) = random_packed(rows, columns, block, means)
    weight = packed.unpack()
    for row in range(rows):
        for column in range(columns):
            values = scalars[row, column // (block or columns)].float()
            if means:
                mean_c, scale_c, mean_s, scale_s, mean, scale_1, scale_2 = values
            else:
                scale_c, scale_s, scale_1, scale_2 = values
                mean_c = mean_s = mean = torch.zeros(())
            first = 2.0 * signs[row, column] - 1
            if salient[column]:
                expected = mean + first * scale_1 + (2.0 * second[row, column] - 1) * scale_2
            elif second[row, column]:
                expected = mean_s + first * scale_s
            else:
                expected = mean_c + first * scale_c
            assert weight[row, column] == expected
    index = torch.tensor([4, 1, 1])
    assert torch.equal(packed.format.unpack_rows(packed.tensors, rows, columns, index), weight[index])


def test_stored_bits_are_the_formula_of_the_card() -> None:
    rows, columns = 512, 1024
    for means, scalars in ((True, 7), (False, 4)):
        packed, _ = random_packed(rows, columns, 128, means)
        assert packed.stored_bits() == 2 + 16 * scalars / 128 + 1 / rows
        assert packed.stored_bytes() == packed.format.bytes(rows, columns)
    row_wide, _ = random_packed(rows, columns, 0, False)
    assert row_wide.stored_bits() == 2 + 64 / columns + 1 / rows


def test_it_comes_back_from_json_and_refuses_nonsense() -> None:
    layout = BinaryResidual(128, means=True)
    assert format_from_json(layout.to_json()) == layout
    with pytest.raises(ValueError, match="block_size"):
        BinaryResidual(-1, means=True)
