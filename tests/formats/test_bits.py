import pytest
import torch

from whit.formats.bits import pack_codes, packed_width, unpack_codes

WIDTHS = (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 63, 64, 130)


def slow_pack(row: list[int], bits: int) -> list[int]:
    """One long little-endian bit string per row, cut into bytes after padding to eight codes."""
    number = sum(code << (bits * place) for place, code in enumerate(row))
    return list(number.to_bytes(-(-len(row) // 8) * bits, "little"))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("width", WIDTHS)
def test_packing_is_one_little_endian_bit_string_and_comes_back(bits, width):
    codes = torch.randint(0, 2**bits, (3, width), generator=torch.Generator().manual_seed(bits * 1000 + width))
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [slow_pack(row, bits) for row in codes.tolist()]
    assert packed.shape[1] == packed_width(width, bits)
    assert torch.equal(unpack_codes(packed, bits, width), codes.to(torch.uint8))


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_pair_of_neighbouring_codes_survives(bits):
    values = torch.arange(2**bits)
    pairs = torch.cartesian_prod(values, values)
    for lead in range(8):
        codes = torch.nn.functional.pad(pairs, (lead, 0))
        assert torch.equal(unpack_codes(pack_codes(codes, bits), bits, lead + 2).long(), codes)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", [torch.float32, torch.int16, torch.bool])
def test_codes_come_in_the_dtype_asked_for(bits, dtype):
    codes = torch.randint(0, 2**bits, (2, 3, 21), generator=torch.Generator().manual_seed(bits))
    out = unpack_codes(pack_codes(codes, bits), bits, 21, dtype)
    assert out.dtype == dtype
    assert torch.equal(out, codes.to(dtype))


def test_a_view_that_is_not_contiguous_packs_like_its_copy():
    codes = torch.randint(0, 8, (20, 6), generator=torch.Generator().manual_seed(0)).T
    assert torch.equal(pack_codes(codes, 3), pack_codes(codes.contiguous(), 3))
    packed = pack_codes(codes, 4)
    assert torch.equal(unpack_codes(packed.T.contiguous().T, 4, 20), unpack_codes(packed, 4, 20))


def test_no_rows_and_no_columns_are_fine():
    assert unpack_codes(pack_codes(torch.zeros(0, 9, dtype=torch.uint8), 3), 3, 9).shape == (0, 9)
    assert unpack_codes(pack_codes(torch.zeros(0, 9, dtype=torch.uint8), 4), 4, 9).shape == (0, 9)
    assert packed_width(0, 5) == 0
