import pytest
import torch

from whit.errors import ModelError
from whit.formats import format_from_json
from whit.formats.scaled_codes import ScaledCodes, join_groups, split_groups

SYSTEMS = ("int8", "e4m3fn", "e3m4", "e2m3", "int6", "int4", "e2m1fn")


def packed_weight(layout, rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scales = torch.rand(layout.scale_shape(rows, columns), generator=generator) + 0.1
    return layout.pack(torch.randn(rows, columns, generator=generator), scales)


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize(("rows", "columns", "group"), [(5, 50, 16), (3, 7, 0), (4, 9, -1), (1, 1, 0), (2, 24, 8)])
def test_unpack_is_number_times_scale(system, rows, columns, group):
    layout = ScaledCodes(system, group)
    packed = packed_weight(layout, rows, columns)
    weight, codes = packed.unpack(), layout.codes(packed.tensors, columns)
    values = layout.numbers.code_values()
    scales = packed.tensors["scales"].float()
    for row in range(rows):
        for column in range(columns):
            scale = scales[0, 0] if group == -1 else scales[row, column // (group or columns)]
            assert weight[row, column] == torch.tensor(values[codes[row, column]]) * scale
    assert weight.is_contiguous()
    index = torch.tensor([rows - 1, 0, 0])
    assert torch.equal(layout.unpack_rows(packed.tensors, rows, columns, index), weight[index])


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("group", [-1, 0, 16])
def test_packing_what_was_unpacked_changes_nothing(system, group):
    layout = ScaledCodes(system, group)
    packed = packed_weight(layout, 6, 40)
    again = layout.pack(packed.unpack(), packed.tensors["scales"].float())
    assert torch.equal(again.unpack(), packed.unpack())
    assert torch.equal(again.tensors["scales"], packed.tensors["scales"])


@pytest.mark.parametrize(
    ("layout", "stored"),
    [
        (ScaledCodes("e4m3fn", -1), 64 * 100 + 4),
        (ScaledCodes("int8", 0), 64 * (100 + 2)),
        (ScaledCodes("int4", 32), 64 * (13 * 4 + 4 * 2)),  # 100 codes are padded to 104
        (ScaledCodes("e3m2", 50), 64 * (13 * 6 + 2 * 2)),
    ],
)
def test_stored_bytes(layout, stored):
    assert layout.bytes(64, 100) == stored
    assert packed_weight(layout, 64, 100).stored_bytes() == stored


def test_systems_of_a_width_take_the_same_bytes():
    for names in (("int8", "e3m4", "e4m3fn", "e5m2"), ("int4", "e2m1fn", "e3m0"), ("int6", "e2m3", "e3m2fn")):
        specs = [ScaledCodes(name, 16).specs(8, 48) for name in names]
        assert all(spec == specs[0] for spec in specs)


def test_bytes_can_be_viewed_as_the_types_of_torch():
    for name, dtype in (("e4m3fn", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2), ("int8", torch.int8)):
        packed = packed_weight(ScaledCodes(name, 0), 6, 20)
        native = packed.tensors["codes"].view(dtype).float() * packed.tensors["scales"].float()
        assert torch.equal(native, packed.unpack())


def test_json_round_trip_and_bad_fields():
    layout = ScaledCodes("e4m3fn", 64)
    assert format_from_json(layout.to_json()) == layout
    with pytest.raises(ModelError, match=r"cannot be read.*unknown number system 'e4m33'"):
        format_from_json({"format": "scaled-codes", "system": "e4m33", "group_size": 0})
    with pytest.raises(ModelError, match="group_size must be -1"):
        format_from_json({"format": "scaled-codes", "system": "int8", "group_size": -2})


@pytest.mark.parametrize("shape", [(3, 10), (2, 3, 10), (0, 10), (10,)])
@pytest.mark.parametrize("size", [0, 3, 10, 20])
def test_groups_come_apart_and_together(shape, size):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    grouped = split_groups(values, size)
    assert grouped.shape == (*shape[:-1], -(-10 // (size or 10)), size or 10)
    assert torch.equal(join_groups(grouped, 10), values)
