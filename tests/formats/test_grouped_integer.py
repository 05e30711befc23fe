import pytest
import torch

from whit.errors import ModelError
from whit.formats import Packed, TensorSpec, format_from_json
from whit.formats.grouped_integer import GroupedInteger


def random_packed(layout, rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    groups = layout.groups(columns)
    codes = torch.randint(0, 2**layout.bits, (rows, columns), generator=generator)
    scales = torch.rand(rows, groups, generator=generator).half()
    zeros = torch.randint(0, 2**layout.bits, (rows, groups), generator=generator)
    return layout.pack(codes, scales, zeros), codes, scales, zeros


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("columns", "group"), [(64, 16), (50, 16), (7, 3), (5, 0), (1, 1), (33, 32)])
def test_unpack_is_the_equation_of_the_format(bits, symmetric, columns, group):
    layout = GroupedInteger(bits, group, symmetric)
    packed, codes, scales, zeros = random_packed(layout, 5, columns)
    expected = torch.empty(5, columns, dtype=torch.float64)
    for row in range(5):
        for column in range(columns):
            place = column // (group or columns)
            scale, code = float(scales[row, place]), int(codes[row, column])
            if not symmetric:
                expected[row, column] = scale * (code - int(zeros[row, place]))
            elif bits == 1:
                expected[row, column] = scale * (2 * code - 1)
            else:
                expected[row, column] = scale * (code - 2 ** (bits - 1))
    weight = packed.unpack()
    assert weight.dtype == torch.float32
    assert torch.equal(weight.double(), expected)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [1, 3, 4])
def test_some_rows_equal_the_rows_of_the_whole(bits, symmetric):
    packed, *_ = random_packed(GroupedInteger(bits, 8, symmetric), 9, 21)
    index = torch.tensor([8, 0, 3, 3])
    rows = packed.format.unpack_rows(packed.tensors, 9, 21, index)
    assert torch.equal(rows, packed.unpack()[index])
    assert packed.format.unpack_rows(packed.tensors, 9, 21, index[:0]).shape == (0, 21)


@pytest.mark.parametrize(
    ("layout", "rows", "columns", "stored_bytes"),
    [
        (GroupedInteger(2, 64, False), 4096, 4096, 4096 * (1024 + 64 * 2) + 4096 * 64 * 2 // 8),
        (GroupedInteger(4, 128, True), 10, 256, 10 * (128 + 2 * 2)),
        (GroupedInteger(3, 0, False), 2, 9, 2 * (6 + 2) + 3),  # nine codes are padded to sixteen, two zeros to eight
        (GroupedInteger(1, 16, True), 3, 40, 3 * (5 + 3 * 2)),
    ],
)
def test_stored_bytes_are_the_sum_of_what_is_stored(layout, rows, columns, stored_bytes):
    assert layout.bytes(rows, columns) == stored_bytes
    packed, *_ = random_packed(layout, rows, columns)
    assert packed.stored_bytes() == stored_bytes
    assert packed.stored_bits() == stored_bytes * 8 / (rows * columns)


def test_two_bits_in_groups_of_64_are_2_28125_stored_bits():
    assert GroupedInteger(2, 64, False).bytes(4096, 4096) * 8 / 4096**2 == 2.28125


@pytest.mark.parametrize("layout", [GroupedInteger(2, 64, False), GroupedInteger(8, 0, True)])
def test_json_round_trip(layout):
    fields = layout.to_json()
    assert fields["format"] == "grouped-integer"
    assert format_from_json(fields) == layout


def test_an_unknown_format_is_an_error_that_suggests_the_nearest():
    with pytest.raises(ModelError, match=r"'grouped-integr'.*did you mean 'grouped-integer'.*pip install -U whit"):
        format_from_json({"format": "grouped-integr", "bits": 2})


@pytest.mark.parametrize(
    "fields",
    [
        {"bits": 9, "group_size": 0, "symmetric": True},
        {"bits": 2, "group_size": -1, "symmetric": True},
        {"bits": 2, "symmetric": True},
        {"bits": 2, "group_size": 0, "symmetric": True, "colour": "red"},
    ],
)
def test_fields_that_do_not_fit_are_an_error(fields):
    with pytest.raises(ModelError, match="'grouped-integer' cannot be read"):
        format_from_json({"format": "grouped-integer", **fields})


def test_packed_checks_names_shapes_and_dtypes():
    packed, *_ = random_packed(GroupedInteger(2, 8, False), 4, 16)
    tensors = packed.tensors
    with pytest.raises(ModelError, match=r"stores \['codes', 'scales', 'zeros'\], got \['codes', 'scales'\]"):
        Packed(packed.format, 4, 16, {"codes": tensors["codes"], "scales": tensors["scales"]})
    with pytest.raises(ModelError, match=r"'scales'.*float16.*float32"):
        Packed(packed.format, 4, 16, {**tensors, "scales": tensors["scales"].float()})
    with pytest.raises(ModelError, match=r"'codes'.*\(4, 6\).*\(4, 4\)"):
        Packed(packed.format, 4, 24, {**tensors, "scales": torch.zeros(4, 3, dtype=torch.float16)})


def test_an_asymmetric_pack_needs_zero_points():
    with pytest.raises(ValueError, match="zero points"):
        GroupedInteger(2, 0, False).pack(torch.zeros(1, 4), torch.ones(1, 1))


def test_moving_keeps_every_byte():
    packed, *_ = random_packed(GroupedInteger(5, 8, False), 4, 16)
    moved = packed.to("cpu")
    assert all(torch.equal(moved.tensors[name], tensor) for name, tensor in packed.tensors.items())
    assert packed.to("meta").tensors["codes"].device.type == "meta"


def test_spec_counts_bytes_of_its_dtype():
    assert TensorSpec((3, 5), torch.float16).bytes == 30
    assert TensorSpec((), torch.int64).bytes == 8
