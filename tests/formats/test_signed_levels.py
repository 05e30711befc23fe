"""The form in which N:M sparse binary weights are multiplied means, value for value, what is stored."""

import pytest
import torch

from tests.kernels.test_cuda_kernels import random_packed
from whit.formats.binary_residual import BinaryResidual
from whit.formats.signed_levels import convertible, magnitudes, marked_columns, signed_levels
from whit.formats.structured_binary import StructuredBinary

FORMS = [
    StructuredBinary(4, 8, 0),
    StructuredBinary(5, 8, 0),
    StructuredBinary(6, 8, 0, regions=2),
    StructuredBinary(2, 8, 0, regions=1),
    StructuredBinary(1, 4, 0),
    StructuredBinary(4, 4, 0),
    StructuredBinary(7, 20, 0),
]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(33, 1000), (1030, 96), (5, 515)])
def test_the_weight_is_the_same(form, rows, columns):
    packed = random_packed(form, rows, columns)
    other = signed_levels(packed)
    assert torch.equal(other.unpack(), packed.unpack())
    assert other.stored_bytes() == other.format.bytes(rows, columns)


def test_marked_columns_stand_behind_all_others_once_more():
    packed = random_packed(StructuredBinary(4, 8, 0), 16, 1000)
    count = marked_columns(packed)
    assert 128 < count < 250
    assert [signed_levels(packed, most).format.panel for most in (None, count, 256, 257)] == [256, 256, 256, 384]
    other = signed_levels(packed, 300)
    index = other.tensors["salient"][1024 // 8 :].view(torch.int16).int()
    assert index[:count].tolist() == sorted(index[:count].tolist()) and (index[count:] == 1000).all()
    signs, low, high = (_bits(other.tensors[name]) for name in ("signs", "low", "high"))
    number = (signs ^ low) + 2 * (signs ^ high)
    values = magnitudes(other.tensors["scalars"])[:, 4:].gather(1, number[:, 1024 : 1024 + count])
    values = torch.where(signs[:, 1024 : 1024 + count].bool(), -values, values)
    assert torch.equal(values, packed.unpack()[:, index[:count].long()])
    assert not number[:, 1024 + count :].any() and not number[:, 1000:1024].any()


def _bits(plane):
    return (plane[..., None] >> torch.arange(8) & 1).flatten(1).long()


def test_what_has_no_such_form():
    for form in (StructuredBinary(4, 8, 128), StructuredBinary(3, 8, 0, means=True), BinaryResidual(0, False)):
        assert not convertible(random_packed(form, 8, 256))
    assert convertible(random_packed(StructuredBinary(4, 8, 256), 8, 256))
