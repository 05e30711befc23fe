import gc
import weakref

import pytest
import torch

from whit.formats import Packed
from whit.formats.dense import Dense
from whit.formats.sparse_nm import SparseNM
from whit.kernels import explain, packed_linear
from whit.kernels.semi_structured import SemiStructured, fits, library
from whit.methods import LayerStatistics, make_method
from whit.models.packed import PackedLinear

needs_kernels = pytest.mark.skipif(
    not torch.cuda.is_available() or library(torch.device("cuda")) is None,
    reason="needs a CUDA device with 2:4 sparse tensor cores",
)


def pruned(pattern="2:4", rows=64, columns=128, dtype="float16", device="cpu", seed=0):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    method = make_method("magnitude", {"pattern": pattern, "value_dtype": dtype})
    return method.compress(weight, LayerStatistics(columns)).packed.to(device)


class Conversions:
    """Stands for the conversion on a machine without the kernels: counts, and leaves the weight dense."""

    def __init__(self):
        self.count = 0

    def __call__(self, weight):
        self.count += 1
        return weight.clone()


def test_a_cpu_uses_the_plain_meaning():
    assert library(torch.device("cpu")) is None
    assert explain(torch.ones(1, 128, dtype=torch.float16), pruned()) == "plain"


@pytest.mark.parametrize(
    ("packed", "dtype", "expected"),
    [
        (pruned(), torch.float16, True),
        (pruned(dtype="bfloat16"), torch.bfloat16, True),
        (pruned("1:4"), torch.float16, True),
        (pruned("3:4"), torch.float16, False),
        (pruned("4:8"), torch.float16, False),
        (pruned(), torch.float32, False),
        (pruned(rows=48), torch.float16, False),
        (pruned(columns=96), torch.float16, False),
    ],
)
def test_the_kernels_take_two_of_four_in_half_precision_and_their_shapes(packed, dtype, expected):
    assert fits(torch.ones(3, packed.columns, dtype=dtype), packed) is expected
    assert not fits(torch.ones(0, packed.columns, dtype=dtype), packed)


def test_inputs_that_need_a_gradient_take_the_plain_way():
    x = torch.ones(3, 128, dtype=torch.float16, requires_grad=True)
    assert not fits(x, pruned())
    with torch.no_grad():
        assert fits(x, pruned())


def test_quantised_values_take_the_plain_way():
    values = make_method("rtn", {"bits": 4}).compress(torch.randn(64, 64), LayerStatistics(64)).packed
    kept = pruned().unpack() != 0
    packed = SparseNM(2, 4, values.format).pack(kept, values)
    assert not fits(torch.ones(3, 128, dtype=torch.float16), packed)


@pytest.mark.parametrize("shape", [(128,), (3, 128), (2, 5, 128)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_product_is_that_of_the_plain_meaning(shape, with_bias):
    packed = pruned()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    bias = torch.randn(64, generator=torch.Generator().manual_seed(2)) if with_bias else None
    out = SemiStructured(Conversions()).linear(x, packed, bias)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, packed.linear(x, bias))


def test_a_weight_is_converted_once_and_again_when_it_changed():
    conversions = Conversions()
    ops = SemiStructured(conversions)
    module = PackedLinear(SparseNM(2, 4, Dense("float16")), 64, 128, None)
    module.set_packed(pruned())
    x = torch.ones(1, 128, dtype=torch.float16)
    first = ops.linear(x, module.packed, None)
    assert torch.equal(ops.linear(x, module.packed, None), first)
    assert conversions.count == 1
    ops.linear(x.bfloat16(), module.packed, None)
    ops.linear(x.bfloat16(), module.packed, None)
    assert conversions.count == 2, "another dtype"
    other = pruned(seed=1)
    module.load_state_dict(other.tensors)  # written in place
    torch.testing.assert_close(ops.linear(x, module.packed, None), other.linear(x))
    assert conversions.count == 3
    module.set_packed(pruned(seed=2))
    torch.testing.assert_close(ops.linear(x, module.packed, None), pruned(seed=2).linear(x))
    assert conversions.count == 4
    assert set(module.state_dict()) == {"index", "values_data"}, "what is saved does not change"


def test_tensors_made_for_inference_are_converted_once():
    conversions = Conversions()
    ops = SemiStructured(conversions)
    with torch.inference_mode():
        source = pruned()
        packed = Packed(source.format, 64, 128, {name: tensor.clone() for name, tensor in source.tensors.items()})
        x = torch.ones(1, 128, dtype=torch.float16)
        for _ in range(2):
            ops.linear(x, packed, None)
    assert conversions.count == 1


def test_the_converted_weight_goes_with_the_stored_one():
    ops = SemiStructured(Conversions())
    packed = pruned()
    converted = weakref.ref(ops.converted(packed, torch.float16))
    assert converted() is not None
    del packed
    gc.collect()
    assert converted() is None


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(128,), (1, 128), (3, 128), (2, 40, 128)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_kernels_agree_with_the_plain_meaning(dtype, shape, with_bias):
    packed = pruned(dtype=dtype, device="cuda")
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to("cuda", getattr(torch, dtype))
    bias = torch.randn(64, generator=torch.Generator().manual_seed(2)).cuda() if with_bias else None
    assert explain(x, packed) == "semi-structured 2:4"
    out = packed_linear(x, packed, bias)
    assert out.shape == (*shape[:-1], 64)
    torch.testing.assert_close(out, packed.linear(x, bias), rtol=2e-2, atol=5e-2)
