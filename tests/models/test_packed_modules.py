import copy

import pytest
import torch
from torch import nn

from whit.formats.grouped_integer import GroupedInteger
from whit.formats.signed_levels import signed_levels
from whit.formats.structured_binary import StructuredBinary
from whit.methods import LayerStatistics, make_method
from whit.models.packed import PackedEmbedding, PackedLinear, TiedPackedLinear, packed_modules, replace_module


def packed_weight(rows=8, columns=20, bits=4):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    return make_method("rtn", {"bits": bits, "group_size": 8}).compress(weight, LayerStatistics(columns)).packed


def linear(bias_dtype=torch.float32):
    packed = packed_weight()
    module = PackedLinear(packed.format, 8, 20, bias_dtype)
    module.set_packed(packed)
    if module.bias is not None:
        nn.init.normal_(module.bias, generator=torch.Generator().manual_seed(1))
    return module


def embedding(dtype=torch.float32):
    packed = packed_weight()
    module = PackedEmbedding(packed.format, 8, 20, dtype)
    module.set_packed(packed)
    return module


@pytest.mark.parametrize("bias_dtype", [None, torch.float32])
def test_linear_multiplies_with_what_is_stored(bias_dtype):
    module = linear(bias_dtype)
    x = torch.randn(2, 5, 20, generator=torch.Generator().manual_seed(2))
    assert torch.equal(module(x), nn.functional.linear(x, packed_weight().unpack(), module.bias))
    assert (module.in_features, module.out_features) == (20, 8)


@pytest.mark.parametrize("ids", [torch.tensor(7), torch.tensor([[1, 1], [0, 6]]), torch.zeros(2, 0, dtype=torch.long)])
def test_embedding_looks_up(ids):
    assert torch.equal(embedding()(ids), nn.functional.embedding(ids, packed_weight().unpack()))


@pytest.mark.parametrize(
    "cast",
    [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double(), lambda m: m.to("cpu", torch.half)],
)
@pytest.mark.parametrize("make", [linear, embedding])
def test_casting_keeps_what_is_stored(make, cast):
    module = make()
    before = {name: tensor.clone() for name, tensor in module.packed.tensors.items()}
    assert cast(module) is module
    for name, tensor in module.packed.tensors.items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])


def test_casting_moves_the_bias_and_the_compute_dtype():
    assert linear().to(torch.bfloat16).bias.dtype == torch.bfloat16
    assert embedding().to(torch.bfloat16)(torch.tensor([1])).dtype == torch.bfloat16
    model = nn.Sequential(embedding(), linear()).half()
    assert model(torch.tensor([3])).dtype == torch.float16


def test_moving_to_another_device_moves_everything():
    module = linear().to("meta")
    assert {tensor.device.type for tensor in module.state_dict().values()} == {"meta"}


def test_no_float_copy_of_the_weight_is_held():
    module = linear()
    module(torch.ones(1, 20))
    held = sum(tensor.nbytes for tensor in (*module.buffers(), *module.parameters()))
    assert held == module.packed.stored_bytes() + module.bias.nbytes
    assert not [value for value in vars(module).values() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("make", [linear, embedding])
def test_state_dict_round_trip(make):
    module = make()
    fresh = type(module)(module.format, 8, 20, torch.float32)
    fresh.load_state_dict(module.state_dict())
    argument = torch.ones(1, 20) if make is linear else torch.tensor([0, 7])
    assert torch.equal(fresh(argument), module(argument))
    assert set(module.packed.tensors) <= set(module.state_dict())


def test_a_copy_is_independent():
    module = linear()
    other = copy.deepcopy(module)
    other.packed.tensors["scales"].zero_()
    assert module.packed.tensors["scales"].abs().sum() > 0
    assert torch.equal(other(torch.ones(1, 20)), other.bias.unsqueeze(0))


def test_taking_over_shares_tensors():
    packed = packed_weight()
    module = PackedLinear(packed.format, 8, 20, None)
    module.set_packed(packed)
    assert module.packed.tensors["codes"] is packed.tensors["codes"]


@pytest.mark.parametrize("other", [packed_weight(8, 21), packed_weight(7, 20), packed_weight(8, 20, bits=3)])
def test_a_weight_of_another_shape_or_layout_is_refused(other):
    with pytest.raises(ValueError, match=r"layer is 20 -> 8.*weight is GroupedInteger"):
        linear().set_packed(other)


def test_built_on_the_meta_device_it_takes_no_memory():
    with torch.device("meta"):
        module = PackedLinear(GroupedInteger(2, 64, False), 4096, 4096, torch.float16)
    assert all(tensor.is_meta for tensor in module.state_dict().values())


def test_the_printed_module_tells_honest_bits():
    with torch.device("meta"):
        text = repr(PackedLinear(GroupedInteger(2, 64, False), 4096, 4096, None))
    assert "2.281 stored bits" in text and "4096 -> 4096" in text


def test_replacing_and_listing_by_dotted_name():
    root = nn.Sequential(nn.Sequential(nn.Linear(20, 8), nn.ReLU()), nn.Linear(8, 20))
    replacement = linear()
    replace_module(root, "0.0", replacement)
    assert packed_modules(root) == {"0.0": replacement}
    replace_module(root, "1", nn.Identity())
    assert isinstance(root[1], nn.Identity)


def test_an_embedding_may_scale_its_rows_in_the_compute_dtype():
    packed = packed_weight()
    module = PackedEmbedding(packed.format, 8, 20, torch.bfloat16, scale=3.3)
    module.set_packed(packed)
    expected = packed.unpack().to(torch.bfloat16)[[2, 5]] * torch.tensor(3.3, dtype=torch.bfloat16)
    assert torch.equal(module(torch.tensor([2, 5])), expected)


def test_a_tied_head_multiplies_with_the_embedding_and_stores_nothing():
    source = embedding()
    head = TiedPackedLinear(source, None)
    x = torch.randn(3, 20, generator=torch.Generator().manual_seed(3))
    assert torch.equal(head(x), nn.functional.linear(x, source.packed.unpack()))
    assert (head.in_features, head.out_features) == (20, 8)
    assert not head.state_dict()
    assert packed_modules(nn.ModuleList([source, head])) == {"0": source}


def test_a_tied_head_stays_tied_in_a_copy_of_the_model():
    source = embedding()
    model = copy.deepcopy(nn.ModuleList([source, TiedPackedLinear(source, torch.float32)]))
    assert model[1].source is model[0]
    assert set(model[1].state_dict()) == {"bias"}


def structured(form=None):
    form = form or StructuredBinary(4, 8, 0)
    generator = torch.Generator().manual_seed(0)
    kept = torch.zeros(24, 12, 8, dtype=torch.bool)
    kept.scatter_(2, torch.rand(24, 12, 8, generator=generator).topk(form.n, 2).indices, True)
    marks = torch.rand(96, generator=generator) < 0.2
    signs, low, high = (torch.rand(24, 96, generator=generator) < 0.5 for _ in range(3))
    regions = torch.where(marks, low, low.int() + high) if form.regions == 3 else low
    scalars = 0.1 * torch.rand(24, 1, form.scalars, generator=generator)
    packed = form.pack(kept.flatten(1), signs, regions, marks, scalars)
    module = PackedLinear(form, 24, 96, None)
    module.set_packed(packed)
    return module


def prepared(module):
    module.run_as(signed_levels(module.packed))
    return module


def test_another_form_computes_the_same_and_is_not_saved():
    module, other = structured(), prepared(structured())
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(2))
    assert torch.equal(module(x), other(x)) and torch.equal(module.weight, other.weight)
    assert other.running.format.name == "signed-levels" and other.packed.format == module.format
    assert torch.equal(TiedPackedLinear(other, None)(x), module(x))
    saved = other.state_dict()
    assert saved.keys() == module.state_dict().keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in module.state_dict().items())
    assert set(dict(other.named_buffers())) == {*saved, *(f"prepared_{name}" for name in other.running.tensors)}


@pytest.mark.parametrize(
    "change", [lambda m: m.half(), lambda m: m.to("cpu"), copy.deepcopy], ids=["cast", "move", "copy"]
)
def test_another_form_is_copied_and_given_up_where_tensors_move(change):
    other = prepared(structured())
    stored = {name: tensor.clone() for name, tensor in other.packed.tensors.items()}
    changed = change(other)
    assert (changed.running.format == changed.format) is (changed is other)
    assert all(torch.equal(changed.packed.tensors[name], tensor) for name, tensor in stored.items())
    assert torch.equal(changed.weight, structured().weight)


def test_another_form_is_given_up_for_another_weight():
    other, third = prepared(structured()), structured(StructuredBinary(4, 8, 0))
    third.scalars.mul_(2)
    other.load_state_dict(third.state_dict())
    assert other.running.format == other.format and torch.equal(other.weight, third.weight)
    prepared(other).set_packed(structured().packed)
    assert other.running.format == other.format and torch.equal(other.weight, structured().weight)
    with pytest.raises(ValueError, match="weight is 8 x 20"):
        other.run_as(packed_weight())


def test_another_form_gives_way_to_a_stored_tensor_that_takes_another_s_place():
    module, other, third = structured(), prepared(structured()), structured()
    third.scalars.mul_(2)
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(2))
    state = {name: tensor.clone() for name, tensor in third.state_dict().items()}
    assert torch.equal(torch.func.functional_call(other, state, (x,)), third(x))
    assert other.running.format != other.format and torch.equal(other(x), module(x))
    other.scalars = third.scalars
    assert other.running.format == other.format and torch.equal(other(x), third(x))
    assert torch.equal(prepared(other)(x), third(x)) and other.running.format != other.format
