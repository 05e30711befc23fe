"""Joining layers that share their input changes no weight, and is refused where it would."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence

import pytest
import torch
from torch import nn

from whit.formats.base import Format, Packed
from whit.formats.binary_residual import BinaryResidual
from whit.formats.grouped_integer import GroupedInteger
from whit.formats.level_table import LevelTable
from whit.formats.outlier_int8 import OutlierInt8
from whit.formats.scaled_codes import ScaledCodes
from whit.formats.signed_levels import convertible, signed_levels
from whit.formats.structured_binary import StructuredBinary
from whit.formats.vector_codebook import VectorCodebook
from whit.generation import products as products_module
from whit.generation.products import Products, join_rows
from whit.kernels import linear
from whit.kernels.cuda_inputs import Normed
from whit.kernels.decode_ops import add_rms_norm
from whit.kernels.linear import Preparation
from whit.models.packed import PackedLinear

COLUMNS = 40


def packed(layout: Format, rows: int, seed: int) -> Packed:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, spec in layout.specs(rows, COLUMNS).items():
        if spec.dtype.is_floating_point:
            tensors[name] = torch.rand(spec.shape, generator=generator).to(spec.dtype)
        else:
            tensors[name] = torch.randint(0, 100, spec.shape, generator=generator, dtype=spec.dtype)
    return Packed(layout, rows, COLUMNS, tensors)


JOINABLE = (
    LevelTable(bits=2, block_size=16),
    GroupedInteger(bits=3, group_size=8, symmetric=True),
    GroupedInteger(bits=4, group_size=5, symmetric=False),
    ScaledCodes(system="e4m3fn", group_size=0),
    OutlierInt8(threshold=6.0, outliers="dynamic"),
)


@pytest.mark.parametrize("layout", JOINABLE, ids=str)
def test_joined_rows_are_the_rows(layout: Format) -> None:
    parts = [packed(layout, rows, rows) for rows in (24, 8, 17)]
    joined = join_rows(parts)
    assert joined is not None
    assert torch.equal(joined.unpack(), torch.cat([part.unpack() for part in parts]))


def test_what_is_shared_by_rows_must_be_the_same() -> None:
    for layout in (BinaryResidual(block_size=0, means=False), VectorCodebook(codes=16, width=4, ternary=False)):
        first, second = packed(layout, 8, 1), packed(layout, 16, 2)
        assert join_rows([first, second]) is None
        shared = {"salient", "codebook"} & set(first.tensors)
        assert len(shared) == 1
        for name in shared:
            second.tensors[name] = first.tensors[name].clone()
        joined = join_rows([first, second])
        assert joined is not None
        assert torch.equal(joined.unpack(), torch.cat([first.unpack(), second.unpack()]))


def test_scale_of_the_whole_tensor_is_shared() -> None:
    layout = ScaledCodes(system="int8", group_size=-1)
    assert join_rows([packed(layout, 8, 1), packed(layout, 8, 2)]) is None


def test_codes_that_end_within_a_byte_are_not_joined() -> None:
    """Zero points are packed eight at a time across rows: seven rows of one group leave a byte half used."""
    layout = GroupedInteger(bits=4, group_size=0, symmetric=False)
    assert join_rows([packed(layout, 7, 1), packed(layout, 9, 2)]) is None
    assert join_rows([packed(layout, 8, 1), packed(layout, 9, 2)]) is not None


def test_other_layouts_and_shapes_are_not_joined() -> None:
    table = LevelTable(bits=2, block_size=16)
    assert join_rows([packed(table, 8, 1), packed(LevelTable(bits=3, block_size=16), 8, 2)]) is None
    narrow = Packed(table, 8, 16, _narrow(table))
    assert join_rows([packed(table, 8, 1), narrow]) is None


def _narrow(layout: Format) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in layout.specs(8, 16).items()}


def modules(bias: bool) -> list[PackedLinear]:
    out = []
    for rows in (16, 8):
        module = PackedLinear(LevelTable(bits=2, block_size=0), rows, COLUMNS, torch.float32 if bias else None)
        module.set_packed(packed(LevelTable(bits=2, block_size=0), rows, rows))
        if module.bias is not None:
            nn.init.normal_(module.bias)
        out.append(module)
    return out


@pytest.mark.parametrize("bias", [False, True])
def test_modules_keep_their_weights_and_nothing_is_stored_twice(bias: bool) -> None:
    layers = modules(bias)
    old = [weakref.ref(layer.codes) for layer in layers]
    before = [layer.weight for layer in layers]
    x = torch.randn(3, COLUMNS)
    wanted = [layer(x) for layer in layers]
    with torch.inference_mode():
        products = Products(layers)
        found = products(x)
    assert products.explain(x) == "joined"
    for layer, weight, mine, theirs in zip(layers, before, found, wanted, strict=True):
        assert torch.equal(layer.weight, weight)
        torch.testing.assert_close(mine, theirs)
        assert not layer.codes.is_inference()
    stores = {layer.codes.untyped_storage().data_ptr() for layer in layers}
    assert len(stores) == 1
    gc.collect()
    assert [item() for item in old] == [None, None]


def test_dense_layers_are_joined_and_can_still_be_trained() -> None:
    layers = [nn.Linear(COLUMNS, rows) for rows in (16, 8)]
    x = torch.randn(3, COLUMNS)
    wanted = [layer(x) for layer in layers]
    with torch.inference_mode():
        found = Products(layers)(x)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)
    layers[1](x).sum().backward()
    assert layers[1].weight.grad is not None


def test_what_cannot_be_joined_is_multiplied_in_turn() -> None:
    layers = [nn.Linear(COLUMNS, 8), nn.Linear(COLUMNS, 8, bias=False)]
    x = torch.randn(3, COLUMNS)
    products = Products(layers, branches=False)
    assert products.explain(x) == "in turn"
    for mine, layer in zip(products(x), layers, strict=True):
        assert torch.equal(mine, layer(x))


@pytest.mark.parametrize("dense", [False, True])
def test_layers_that_someone_watches_are_called(dense: bool) -> None:
    layers: list[nn.Module] = [nn.Linear(COLUMNS, rows) for rows in (16, 8)] if dense else list(modules(False))
    assert Products(layers).explain(torch.randn(3, COLUMNS)) == "joined"
    seen = []
    layers[0].register_forward_pre_hook(lambda *given: seen.append(1))
    Products(layers)(torch.randn(3, COLUMNS))
    assert seen == [1]


def test_joining_again_copies_nothing() -> None:
    layers = [PackedLinear(LevelTable(bits=2, block_size=16), rows, COLUMNS, None) for rows in (24, 8)]
    for layer in layers:
        layer.set_packed(packed(layer.format, layer.rows, layer.rows))
    wanted = [layer.weight for layer in layers]
    first, again = (Products(layers).joined for _ in range(2))
    assert first is not None and again is not None
    assert {name: item.data_ptr() for name, item in first.tensors.items()} == {
        name: item.data_ptr() for name, item in again.tensors.items()
    }
    assert torch.equal(again.unpack(), torch.cat(wanted))
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(layers, wanted, strict=True))
    other_order = Products(layers[::-1]).joined
    assert other_order is not None and torch.equal(other_order.unpack(), torch.cat(wanted[::-1]))


def test_joining_dense_layers_again_copies_nothing() -> None:
    layers = [nn.Linear(COLUMNS, rows, bias=False) for rows in (24, 8)]
    x = torch.randn(1, COLUMNS)
    wanted = [layer(x) for layer in layers]
    Products(layers)
    before = [layer.weight.data_ptr() for layer in layers]
    found = Products(layers)(x)
    assert [layer.weight.data_ptr() for layer in layers] == before
    assert all(torch.allclose(mine, theirs) for mine, theirs in zip(found, wanted, strict=True))
    layers[1].weight.data = layers[1].weight.data.clone()  # one was moved: they lie apart
    found = Products(layers)(x)
    assert all(torch.allclose(mine, theirs) for mine, theirs in zip(found, wanted, strict=True))


@pytest.mark.parametrize("join", [True, False])
def test_inputs_that_are_made_first(join: bool) -> None:
    """A normalisation and the products are what the ops one after the other are."""
    modules = []
    for rows in (24, 8):
        module = PackedLinear(JOINABLE[0], rows, COLUMNS, None)
        module.set_packed(packed(JOINABLE[0], rows, rows))
        modules.append(module)
    products = Products(modules, join=join)
    torch.manual_seed(0)
    states, update = (torch.randn(1, COLUMNS) for _ in range(2))
    weight = torch.rand(COLUMNS)
    total, normal = add_rms_norm(states, update, weight, 1e-5)
    found = products.normed(states, update, weight, 1e-5)
    assert torch.equal(found[0], total)
    for mine, module in zip(found[1], modules, strict=True):
        assert torch.allclose(mine, module(normal), rtol=1e-5, atol=1e-5)


def in_sixteen_bits(item: Packed, dtype: torch.dtype) -> bool:
    return dtype != torch.float32 and convertible(item)


def test_weights_are_held_in_the_form_that_products_read_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def prepare(weights: Sequence[Packed]) -> list[Packed]:
        made.append(len(weights))
        return [signed_levels(item, 300) for item in weights]

    here = Preparation("signed levels", in_sixteen_bits, prepare, lambda item: 3.0)
    monkeypatch.setitem(linear._PREPARATIONS, "structured-binary", here)
    layout = StructuredBinary(4, 8, 0, regions=2)
    parts = [packed(layout, rows, rows) for rows in (24, 8)]
    parts[1].tensors["salient"].zero_()
    modules = [PackedLinear(layout, item.rows, COLUMNS, None) for item in parts]
    for module, item in zip(modules, parts, strict=True):
        module.set_packed(item)
    x = torch.randn(3, COLUMNS, generator=torch.Generator().manual_seed(0))
    expected = [item.linear(x) for item in parts]
    for others in ({"join": False, "dtype": torch.bfloat16}, {"dtype": torch.float32}, {}):
        Products(modules, **others)
        assert not made and all(module.running.format == layout for module in modules)
    for _ in range(2):  # what is so already stays
        products = Products(modules, dtype=torch.bfloat16)
        assert made == [2] and products.joined is None
        assert all(torch.equal(*pair) for pair in zip(products(x), expected, strict=True))
        assert products.meeting == [module.running for module in modules]
    assert len({module.running.format for module in modules}) == 1 and modules[0].running.format != layout
    for module, item in zip(modules, parts, strict=True):
        assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in item.tensors.items())
    modules[1].set_packed(parts[1])
    Products(modules[:1], dtype=torch.float16), Products(modules, dtype=torch.float16)
    assert made == [2, 2]


def test_weights_in_another_form_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Preparation(
        "signed levels", in_sixteen_bits, lambda weights: list(map(signed_levels, weights)), lambda item: 3.0
    )
    monkeypatch.setitem(linear._PREPARATIONS, "structured-binary", here)
    layout = StructuredBinary(2, 8, 0, regions=1)  # no marks in which they could differ
    parts = [packed(layout, rows, rows) for rows in (24, 8)]
    modules = [PackedLinear(layout, item.rows, COLUMNS, None) for item in parts]
    for module, item in zip(modules, parts, strict=True):
        module.set_packed(item)
    products = Products(modules, dtype=torch.float16)
    assert products.joined is not None and products.joined.format.name == "signed-levels"
    x = torch.randn(3, COLUMNS, generator=torch.Generator().manual_seed(0))
    for found, module, item in zip(products(x), modules, parts, strict=True):
        assert torch.equal(found, item.linear(x)) and torch.equal(module(x), found)
        assert module.running.tensors["signs"].data_ptr() in _within(products.joined.tensors["signs"])
        assert torch.equal(module.state_dict()["index"], item.tensors["index"])


def _within(tensor: torch.Tensor) -> range:
    return range(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)


class OnDevice(torch.Tensor):
    """On the CPU, but it says otherwise."""

    is_cuda = True


def states_of(texts: int, kind: type[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    states, update = (torch.randn(texts, COLUMNS, generator=generator).as_subclass(kind) for _ in range(2))
    return states, update, torch.rand(COLUMNS, generator=generator)


def gate_and_up() -> list[PackedLinear]:
    """Two codebooks, so that they are not joined."""
    layout, found = VectorCodebook(codes=16, width=4, ternary=False), []
    for seed in (1, 2):
        module = PackedLinear(layout, 16, COLUMNS, None)
        module.set_packed(packed(layout, 16, seed))
        found.append(module)
    return found


def asked(monkeypatch: pytest.MonkeyPatch, answer: object) -> list[list[Packed]]:
    """The weights of each question for a gated launch; others are told that there is none."""
    questions: list[list[Packed]] = []

    def products_of(
        given: object, weights: list[Packed], bias: object = None, *, gated: bool = False
    ) -> tuple[torch.Tensor, list[object]] | None:
        if not gated:
            return None
        assert isinstance(given, Normed) and given.epsilon == 1e-5
        questions.append(weights)
        return None if answer is None else (given.states, [answer])

    monkeypatch.setattr(products_module, "products_of", products_of)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return questions


def test_one_launch_is_given_the_gate_first(monkeypatch: pytest.MonkeyPatch) -> None:
    modules, answer = gate_and_up(), torch.zeros(1, 16)
    products, questions = Products(modules), asked(monkeypatch, answer)
    states, update, weight = states_of(1, OnDevice)
    total, inner = products.gated(states, update, weight, 1e-5)
    assert total is states and inner is answer
    assert len(questions) == 1
    for found, module in zip(questions[0], modules, strict=True):
        assert found is module.running
    assert products.gateable == questions[0]


@pytest.mark.parametrize(
    ("texts", "kind", "branches", "questions"),
    [(1, OnDevice, True, 1), (1, OnDevice, False, 0), (16, OnDevice, True, 0), (1, torch.Tensor, True, 0)],
)
def test_without_such_a_launch_the_gate_comes_after_both_products(
    texts: int, kind: type[torch.Tensor], branches: bool, questions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = gate_and_up()
    products, seen = Products(modules, branches=branches), asked(monkeypatch, None)
    assert products.joined is None and bool(products.gateable) is branches
    states, update, weight = states_of(texts, kind)
    total, inner = products.gated(states, update, weight, 1e-5)
    assert len(seen) == questions
    wanted, normal = add_rms_norm(*states_of(texts, torch.Tensor), 1e-5)
    gate, up = (module(normal) for module in modules)
    assert torch.equal(total.as_subclass(torch.Tensor), wanted)
    assert torch.equal(inner.as_subclass(torch.Tensor), torch.nn.functional.silu(gate) * up)


def test_only_two_packed_layers_are_gateable() -> None:
    modules = gate_and_up()
    assert [item is module.running for item, module in zip(Products(modules).gateable, modules, strict=True)] == [
        True
    ] * 2
    assert Products(modules[:1]).gateable == Products([*modules, *gate_and_up()]).gateable == []
    assert Products([modules[0], nn.Linear(COLUMNS, 16, bias=False)]).gateable == []
