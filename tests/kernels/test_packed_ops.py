import pytest
import torch

from tests.kernels.test_cuda_kernels import needs_gpu, random_packed
from whit.formats import Packed
from whit.formats.binary_residual import BinaryResidual
from whit.formats.grouped_integer import GroupedInteger
from whit.formats.level_table import LevelTable
from whit.kernels import explain, packed_embedding, packed_linear, register_implementation
from whit.kernels import linear as linear_module
from whit.kernels.linear import PLAIN, Implementation, choose


def integer_weight(rows=6, columns=20, layout=None, seed=0):
    layout = layout or GroupedInteger(3, 8, False)
    generator = torch.Generator().manual_seed(seed)
    groups = layout.groups(columns)
    codes = torch.randint(0, 2**layout.bits, (rows, columns), generator=generator)
    scales = torch.rand(rows, groups, generator=generator)
    return layout.pack(codes, scales, torch.randint(0, 2**layout.bits, (rows, groups), generator=generator))


def table_weight(rows=6, columns=20):
    layout = LevelTable(2, 8)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 4, (rows, columns), generator=generator)
    return layout.pack(codes, torch.randn(rows, layout.blocks(columns), 4, generator=generator))


@pytest.fixture
def implementations(monkeypatch):
    """A registry of its own, so that a test's implementation does not outlive it."""
    monkeypatch.setattr(linear_module, "_IMPLEMENTATIONS", {})


@pytest.mark.parametrize("make", [integer_weight, table_weight])
@pytest.mark.parametrize("shape", [(20,), (3, 20), (2, 3, 20), (0, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_is_the_product_with_the_unpacked_weight(make, shape, dtype, with_bias):
    packed = make()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    bias = torch.randn(6, generator=torch.Generator().manual_seed(2)) if with_bias else None
    expected = torch.nn.functional.linear(x, packed.unpack().to(dtype), None if bias is None else bias.to(dtype))
    out = packed_linear(x, packed, bias)
    assert out.dtype == dtype
    assert torch.equal(out, expected)


@pytest.mark.parametrize("shape", [(2, 32), (128,), (4, 16), ()])
def test_inputs_of_another_width_are_refused_by_every_version(shape):
    packed = integer_weight(32, 64, GroupedInteger(8, 32, True))  # a layout that has a compiled version on a CPU
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    assert choose(x, packed) is PLAIN
    with pytest.raises(RuntimeError):
        packed_linear(x, packed)


def test_gradients_reach_the_bias_whatever_multiplies(implementations):
    packed, bias = integer_weight(), torch.nn.Parameter(torch.ones(6))

    def product(x, packed, bias):
        return packed.linear(x, None if bias is None else bias.detach())  # as kernels do

    register_implementation("grouped-integer", Implementation("no derivative", lambda x, packed: True, product))
    x = torch.randn(3, 20)
    out = packed_linear(x, packed, bias)
    torch.testing.assert_close(out, packed.linear(x, bias))
    out.sum().backward()
    assert torch.equal(bias.grad, torch.full((6,), 3.0))
    with torch.no_grad():
        assert not packed_linear(x, packed, bias).requires_grad


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 5, 70])
@pytest.mark.parametrize("layout", [BinaryResidual(128, False), GroupedInteger(4, 64, True)], ids=str)
def test_gradients_reach_the_bias_past_a_kernel(layout, tokens):
    packed, x = random_packed(layout, 48, 640, "cuda"), torch.ones(tokens, 640, device="cuda", dtype=torch.bfloat16)
    bias = torch.nn.Parameter(torch.ones(48, device="cuda"))
    assert explain(x, packed) != "plain"
    out = packed_linear(x, packed, bias)
    out.float().sum().backward()
    assert torch.equal(bias.grad, torch.full((48,), float(tokens), device="cuda"))
    with torch.no_grad():
        fused = packed_linear(x, packed, bias)
    assert not fused.requires_grad
    torch.testing.assert_close(out, fused, rtol=2e-2, atol=2e-2)


def test_gradients_reach_the_inputs():
    packed = integer_weight()
    x = torch.randn(4, 20, generator=torch.Generator().manual_seed(1), requires_grad=True)
    packed_linear(x, packed).sum().backward()
    torch.testing.assert_close(x.grad, packed.unpack().sum(0).expand(4, -1))


@pytest.mark.parametrize("make", [integer_weight, table_weight])
@pytest.mark.parametrize(
    "ids", [torch.tensor(4), torch.tensor([5, 5, 0]), torch.tensor([[1, 2], [2, 1]]), torch.zeros(0, dtype=torch.long)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedding_is_a_lookup_for_ids_of_any_shape(make, ids, dtype):
    packed = make()
    out = packed_embedding(ids, packed, dtype)
    assert out.shape == (*ids.shape, 20)
    assert torch.equal(out, packed.unpack().to(dtype)[ids])


def test_embedding_decodes_each_row_once():
    asked = []

    class Spy(GroupedInteger):
        def unpack_rows(self, tensors, rows, columns, index):
            asked.append(index.tolist())
            return super().unpack_rows(tensors, rows, columns, index)

    source = integer_weight()
    packed = Packed(Spy(3, 8, False), 6, 20, source.tensors)
    assert torch.equal(
        packed_embedding(torch.tensor([[3, 1, 3], [1, 1, 3]]), packed, torch.float32)[0, 2], packed.unpack()[3]
    )
    assert asked == [[1, 3]]


def test_without_others_the_plain_meaning_is_used(implementations):
    packed = integer_weight()
    x = torch.ones(1, 20)
    assert choose(x, packed) is PLAIN
    assert explain(x, packed) == "plain"


def test_later_registrations_are_asked_first_and_predicates_decide(implementations):
    packed = integer_weight()

    def constant(value):
        return lambda x, packed, bias: torch.full((*x.shape[:-1], packed.rows), value)

    register_implementation("grouped-integer", Implementation("any", lambda x, packed: True, constant(1.0)))
    register_implementation("grouped-integer", Implementation("one row", lambda x, packed: len(x) == 1, constant(2.0)))
    one, two = torch.ones(1, 20), torch.ones(2, 20)
    assert (explain(one, packed), explain(two, packed)) == ("one row", "any")
    assert packed_linear(one, packed).tolist() == [[2.0] * 6]
    assert packed_linear(two, packed).tolist() == [[1.0] * 6] * 2
    assert explain(one, table_weight()) == "plain", "other formats are not affected"


def test_a_format_may_transform_the_inputs():
    class Reversed(GroupedInteger):
        def transform(self, inputs, tensors):
            return inputs.flip(-1)

    source = integer_weight()
    packed = Packed(Reversed(3, 8, False), 6, 20, source.tensors)
    x = torch.randn(2, 20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(packed_linear(x, packed), torch.nn.functional.linear(x.flip(-1), source.unpack()))
