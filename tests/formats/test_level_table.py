import pytest
import torch

from whit.formats import format_from_json
from whit.formats.level_table import LevelTable


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize(("columns", "block"), [(128, 0), (200, 64), (37, 128), (256, 128)])
def test_each_weight_is_the_level_its_code_names(bits: int, columns: int, block: int) -> None:
    generator = torch.Generator().manual_seed(bits + columns)
    layout = LevelTable(bits, block)
    rows, blocks = 5, layout.blocks(columns)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator)
    levels = torch.randn(rows, blocks, 2**bits, generator=generator).half()
    packed = layout.pack(codes, levels)
    weight = packed.unpack()
    step = block or columns
    for row in range(rows):
        for column in range(columns):
            assert weight[row, column] == levels[row, column // step, codes[row, column]].float()
    assert packed.stored_bytes() == layout.bytes(rows, columns)
    assert packed.stored_bytes() == rows * (-(-columns // 8) * bits + blocks * 2**bits * 2)
    index = torch.tensor([3, 0, 3])
    assert torch.equal(layout.unpack_rows(packed.tensors, rows, columns, index), weight[index])


def test_four_levels_per_128_columns_cost_two_and_a_half_bits() -> None:
    layout = LevelTable(2, 128)
    assert layout.bytes(576, 1536) * 8 / (576 * 1536) == 2.5


def test_it_comes_back_from_json_and_refuses_nonsense() -> None:
    layout = LevelTable(2, 128)
    assert format_from_json(layout.to_json()) == layout
    with pytest.raises(ValueError, match="bits must be 1 to 8"):
        LevelTable(9, 128)
    with pytest.raises(ValueError, match="block_size"):
        LevelTable(2, -1)
