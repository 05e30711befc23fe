import warnings

import pytest
import torch

from whit.formats.base import Packed
from whit.formats.binary_residual import BinaryResidual
from whit.formats.grouped_integer import GroupedInteger
from whit.formats.level_table import LevelTable
from whit.formats.vector_codebook import VectorCodebook
from whit.kernels import cpu_decode, explain, packed_linear
from whit.kernels.cpu_decode import MOST_VECTORS, NAME

pytest.importorskip("numba")

LAYOUTS = [
    *(GroupedInteger(bits, 32, symmetric) for bits in (1, 2, 3, 4, 8) for symmetric in (True, False)),
    *(GroupedInteger(bits, 0, False) for bits in (3, 8)),
    *(LevelTable(bits, size) for bits in (1, 2, 3, 4) for size in (48, 0)),
    *(BinaryResidual(size, means) for size in (64, 24, 0) for means in (True, False)),
    *(
        VectorCodebook(codes, width, ternary)
        for codes, width in ((256, 12), (64, 5), (4, 3))
        for ternary in (True, False)
    ),
]
RAGGED = [*(layout for layout in LAYOUTS if isinstance(layout, BinaryResidual | VectorCodebook))]
SHAPES = [(1, 16), (7, 80), (37, 208), (33, 160)]
# What the plain meaning loses when it rounds the weight to the dtype of the inputs.
WEIGHT_ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
OUTPUT_ROUNDING = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def random_packed(layout, rows, columns, seed=0):
    """Any bits are a valid weight, as long as the numbers among them are finite."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, spec in layout.specs(rows, columns).items():
        if spec.dtype in (torch.uint8, torch.int8):
            trits = name == "codebook" and spec.dtype == torch.uint8  # bytes above 3^5 are none
            drawn = torch.randint(0, 243 if trits else 256, spec.shape, dtype=torch.uint8, generator=generator)
            tensors[name] = drawn.view(spec.dtype)
        else:
            tensors[name] = torch.randn(spec.shape, generator=generator).to(spec.dtype)
    return Packed(layout, rows, columns, tensors)


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_agrees_with_the_plain_meaning_within_the_stated_bound(layout, dtype):
    for number, (rows, columns) in enumerate(SHAPES + ([(9, 77)] if layout in RAGGED else [])):
        packed = random_packed(layout, rows, columns, seed=number)
        weight = packed.unpack().double()
        x = normal(1 + number, columns).to(dtype)
        for bias in (None, normal(rows, seed=2)):
            assert explain(x, packed) == NAME
            out = packed_linear(x, packed, bias)
            assert out.dtype == dtype
            assert out.shape == (1 + number, rows)
            products = x.double().abs() @ weight.abs().T + (0 if bias is None else bias.double().abs())
            exact = x.double() @ weight.T + (0 if bias is None else bias.double())
            sums = products * (columns + 2) * 2.0**-24
            rounding = out.double().abs() * OUTPUT_ROUNDING[dtype] + 2.0**-24
            assert ((out.double() - exact).abs() <= sums + rounding).all()
            plain = packed.linear(x, bias).double()
            bound = 2 * (sums + rounding) + products * WEIGHT_ROUNDING[dtype]
            assert ((out.double() - plain).abs() <= bound).all()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_weight_is_decoded_exactly(layout):
    """A unit vector selects a column, whose products are exact: any wrong place or level shows."""
    packed = random_packed(layout, 19, 112)
    columns = [torch.eye(112)[first : first + MOST_VECTORS] for first in range(0, 112, MOST_VECTORS)]
    decoded = torch.cat([packed_linear(part, packed) for part in columns]).T
    torch.testing.assert_close(decoded, packed.unpack(), rtol=2.0**-23, atol=0)


def test_threads_share_rows_without_changing_a_bit(monkeypatch):
    packed = random_packed(LevelTable(2, 64), 1000, 128)
    x = normal(2, 128)
    alone = packed_linear(x, packed)
    monkeypatch.setattr(cpu_decode, "WEIGHTS_TO_SHARE", 1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        shared = [packed_linear(x, packed) for _ in range(50)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(out, alone) for out in shared)


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (64,), (1, 1, 64), (2, 3, 64)])
def test_any_leading_shape_and_no_vectors_at_all(shape):
    packed = random_packed(GroupedInteger(4, 32, False), 5, 64)
    x = normal(*shape)
    assert explain(x, packed) == NAME
    out = packed_linear(x, packed)
    assert out.shape == (*shape[:-1], 5)
    torch.testing.assert_close(out, packed.linear(x))


def test_inputs_and_tensors_need_not_be_contiguous():
    packed = random_packed(BinaryResidual(32, False), 6, 64)
    strided = {name: item.repeat_interleave(2, dim=-1)[..., ::2] for name, item in packed.tensors.items()}
    x = normal(64, 3).T
    assert not x.is_contiguous()
    out = packed_linear(x, Packed(packed.format, 6, 64, strided))
    torch.testing.assert_close(out, packed.linear(x))


def test_the_plain_meaning_stays_where_it_must():
    packed = random_packed(GroupedInteger(4, 32, False), 5, 64)
    x = normal(1, 64)
    assert explain(x, packed) == NAME
    assert explain(normal(MOST_VECTORS + 1, 64), packed) == "plain"
    assert explain(x.double(), packed) == "plain"
    assert explain(x.clone().requires_grad_(), packed) == "plain"
    assert explain(normal(1, 60), random_packed(GroupedInteger(4, 32, False), 5, 60)) == "plain"
    assert explain(normal(1, 64), random_packed(GroupedInteger(4, 20, False), 5, 64)) == "plain"
    assert explain(normal(1, 64), random_packed(LevelTable(5, 32), 5, 64)) == "plain"
    with torch.no_grad():
        assert explain(x.clone().requires_grad_(), packed) == NAME


def test_without_numba_one_warning_and_the_plain_meaning(monkeypatch):
    packed = random_packed(GroupedInteger(4, 32, False), 5, 64)
    cpu_decode._compiler_works.cache_clear()
    monkeypatch.setattr(cpu_decode, "numba_works", lambda: False)
    try:
        with pytest.warns(UserWarning, match=r"pip install 'whit\[cpu\]'"):
            assert explain(normal(1, 64), packed) == "plain"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(packed_linear(normal(1, 64), packed), packed.linear(normal(1, 64)))
    finally:
        cpu_decode._compiler_works.cache_clear()
