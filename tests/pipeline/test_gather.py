"""Statistics of layer inputs, and one block compressed on them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.pipeline.conftest import Case
from tests.pipeline.modules import WIDTH, Block
from whit.errors import ModelError
from whit.kernels.cpu.bfloat16 import products_of_bfloat16
from whit.methods import make_method
from whit.methods.statistics import Statistic, relative_output_error
from whit.models.layers import layer_kind
from whit.models.resolve import resolve_model
from whit.models.skeleton import load_dense
from whit.models.source import InMemorySource
from whit.models.stacks import find_stacks
from whit.pipeline import gather
from whit.pipeline.assign import AssignedLayer
from whit.pipeline.block import UNREACHED, Groups, Streams, compress_block, propagate
from whit.pipeline.catch import Call, CallCatcher
from whit.pipeline.gather import InputAccumulator, SecondMoment, find_groups, gathering
from whit.pipeline.layer import Swaps, packed_from, restore_layers
from whit.pipeline.team import Team
from whit.report.record import LayerRecord

NEEDS = frozenset({Statistic.SECOND_MOMENT})
GROUPS = {
    "llama": [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",),
              ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)],
    "gpt2": [("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)],
    "bert": [("attention.self.query", "attention.self.key", "attention.self.value"), ("attention.output.dense",),
             ("intermediate.dense",), ("output.dense",)],
}  # fmt: skip


def linear_layers(block: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in block.named_modules() if layer_kind(module) is not None}


@pytest.mark.parametrize("family", sorted(GROUPS))
def test_layers_with_the_very_same_inputs_form_a_group(family: str, case_of: Callable[[str], Case]) -> None:
    model = load_dense(resolve_model(case_of(family).model), torch.float32, "cpu")
    (stack,) = find_stacks(model)
    caught = CallCatcher(model, stack.blocks, as_tuple=False).catch({"input_ids": torch.arange(7)[None]}, 0)
    block = model.get_submodule(stack.blocks[0])

    def run() -> None:
        with torch.no_grad():
            caught.calls[0].run(block, caught.hidden)

    found = find_groups(run, linear_layers(block))
    assert [set(group) for group in found] == [set(group) for group in GROUPS[family]]


def test_equal_values_are_not_the_same_inputs() -> None:
    layers = {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}
    x = torch.ones(2, 4)
    assert find_groups(lambda: (layers["a"](x), layers["b"](x.clone())), layers) == [("a",), ("b",)]
    assert find_groups(lambda: (layers["a"](x), layers["b"](x)), layers) == [("a", "b")]


@pytest.mark.parametrize("batches", [[1, 1, 1], [3], [2, 1]])
def test_second_moment_is_the_direct_sum(batches: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(batches), 7, WIDTH, generator=generator)
    layers = {"a": nn.Linear(WIDTH, 3), "b": nn.Linear(WIDTH, 5)}
    with gathering([("a", "b")], layers, NEEDS) as statistics, torch.no_grad():
        for part in x.split(batches):
            layers["a"](part)
            layers["b"](part)
    flat = x.reshape(-1, WIDTH).double()
    found = statistics["a", "b"]
    assert found.tokens == len(flat)
    assert found.second_moment is not None
    torch.testing.assert_close(found.second_moment.double(), 2 / len(x) * flat.T @ flat, rtol=1e-5, atol=1e-6)


def test_statistics_nobody_needs_are_not_gathered() -> None:
    layer = nn.Linear(WIDTH, 3)
    with gathering([("a",)], {"a": layer}, frozenset()) as statistics:
        layer(torch.ones(2, WIDTH))
    assert statistics["a",].second_moment is None
    assert not layer._forward_pre_hooks


def test_released_statistics_hold_no_tensor() -> None:
    layer = nn.Linear(WIDTH, 3)
    with gathering([("a",)], {"a": layer}, NEEDS) as statistics:
        layer(torch.randn(20, WIDTH))
    factor = statistics["a",].inverse_factor(0.01)
    assert statistics["a",].inverse_factor(0.01) is factor
    statistics["a",].release()
    assert statistics["a",].second_moment is None
    with pytest.raises(ValueError, match="second moments were not gathered"):
        statistics["a",].inverse_factor(0.01)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_refused(bad: float) -> None:
    layer = nn.Linear(WIDTH, 3)
    x = torch.ones(2, WIDTH)
    x[1, 3] = bad
    with (
        pytest.raises(ModelError, match=r"calibration inputs of 'deep.layer' hold NaN or Inf: try --dtype float32"),
        gathering([("deep.layer",)], {"deep.layer": layer}, NEEDS),
    ):
        layer(x)


def make_block(method_name: str = "gptq") -> tuple[Block, InMemorySource, dict[str, AssignedLayer]]:
    torch.manual_seed(0)
    block = Block()
    source = InMemorySource({f"block.{name}": value.clone() for name, value in block.state_dict().items()})
    method = make_method(method_name, {"bits": 2, "group_size": 0})
    layers = {}
    for name, module in linear_layers(block).items():
        kind = layer_kind(module)
        assert kind is not None
        layers[f"block.{name}"] = AssignedLayer(f"block.{name}", "block", kind, *kind.shape(module), method)
    return block, source, layers


def streams_of(count: int = 4) -> Streams:
    generator = torch.Generator().manual_seed(1)
    hidden = [torch.randn(1, 9, WIDTH, generator=generator) for _ in range(count)]
    return Streams(hidden, [[Call("block", (None,), {"scale": torch.tensor(2.0)}, 0)] for _ in hidden])


def compressed(
    block: Block,
    layers: dict[str, AssignedLayer],
    source: InMemorySource,
    true_sequential: bool,
    known: Groups | None = None,
) -> list[LayerRecord]:
    """Records of a block's layers, compressed from the usual inputs."""
    return compress_block(
        block,
        layers,
        "block",
        source,
        streams_of(),
        true_sequential=true_sequential,
        done=lambda _: None,
        swaps=Swaps(block, "block"),
        known=known,
    )[1]


def moment(inputs: list[Tensor]) -> Tensor:
    return sum((2 / len(inputs)) * x[0].T @ x[0] for x in inputs)  # type: ignore[return-value]


@pytest.mark.parametrize("true_sequential", [False, True])
def test_errors_are_measured_on_the_inputs_each_order_promises(true_sequential: bool) -> None:
    block, source, layers = make_block()
    original = Block()
    original.load_state_dict({name.removeprefix("block."): source.load(name) for name in source.names()})
    streams = streams_of()
    seen: list[LayerRecord] = []
    packed, records = compress_block(
        block,
        layers,
        "block",
        source,
        streams,
        true_sequential=true_sequential,
        done=seen.append,
        swaps=Swaps(block, "block"),
    )
    assert seen == records
    upstream = block if true_sequential else original
    with torch.no_grad():
        inner = [torch.tanh(upstream.gate(x)) * upstream.up(x) for x in streams.hidden]
    expected = {"gate": moment(streams.hidden), "up": moment(streams.hidden), "down": moment(inner)}
    for record in records:
        short = record.name.removeprefix("block.")
        weight, quantised = source.load(f"{record.name}.weight"), packed[record.name].unpack()
        assert torch.equal(block.get_submodule(short).weight, quantised)
        error = relative_output_error(weight, quantised, expected[short])
        assert record.error == pytest.approx(float(error), rel=1e-4)


@pytest.mark.parametrize(
    ("expected", "runs"),
    [
        (None, 5),
        ([("block.gate", "block.up"), ("block.down",)], 4),
        ([("block.gate",), ("block.up",), ("block.down",)], 6),
        ([("block.gate", "block.up", "block.down")], 6),
    ],
)
def test_groups_of_an_earlier_block_are_checked_on_the_way(expected: list[tuple[str, ...]] | None, runs: int) -> None:
    found = []
    for known in (None, expected):
        block, source, layers = make_block()
        groups = Groups()
        if known is not None:
            groups.remember(list(layers), "block.", known)
        count = []
        block.register_forward_hook(lambda *_: count.append(1))  # noqa: B023
        _, records = compress_block(
            block,
            layers,
            "block",
            source,
            streams_of(),
            true_sequential=False,
            done=lambda _: None,
            swaps=Swaps(block, "block"),
            known=groups,
        )
        found.append([(record.name, record.error) for record in records])
        assert groups.expected(list(layers), "block.") == [("block.gate", "block.up"), ("block.down",)]
        assert groups.expected([name.replace("block", "next") for name in layers], "next.") is not None
    assert found[0] == found[1]
    assert len(count) == runs


@pytest.mark.parametrize("true_sequential", [False, True])
@pytest.mark.parametrize("known", [None, [("block.gate", "block.up", "block.down")], [("block.down",)]])
def test_a_block_whose_methods_need_no_data_is_not_grouped(
    known: list[tuple[str, ...]] | None, true_sequential: bool
) -> None:
    """Groups of an earlier block could not be checked without a run, and one would be for nothing."""
    block, source, layers = make_block("rtn")
    groups = Groups()
    if known is not None:
        groups.remember(list(layers), "block.", known)
    runs = []
    block.register_forward_hook(lambda *_: runs.append(1))
    records = compressed(block, layers, source, true_sequential, groups)
    assert [record.name for record in records] == list(layers)
    assert not any(record.notes for record in records)
    assert all(record.error == record.weight_error for record in records)
    assert not runs and groups.expected(list(layers), "block.") == known


@pytest.mark.parametrize(
    ("method", "true_sequential", "parts"), [("rtn", True, 1), ("gptq", False, 1), ("gptq", True, 2)]
)
def test_layers_are_divided_all_at_once_unless_later_statistics_follow_from_earlier_ones(
    method: str, true_sequential: bool, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is divided separately is compressed by one process after the other."""
    block, source, layers = make_block(method)
    divided = []
    plain = Team.dividing

    def dividing(team: Team, names: list[str]):  # type: ignore[no-untyped-def]
        divided.extend([list(names)] if names else [])
        return plain(team, names)

    monkeypatch.setattr(Team, "dividing", dividing)
    compressed(block, layers, source, true_sequential)
    assert len(divided) == parts
    assert sorted(name for names in divided for name in names) == sorted(layers)


def test_a_restored_block_is_the_compressed_block() -> None:
    block, source, layers = make_block()
    streams = streams_of()
    packed, records = compress_block(
        block, layers, "block", source, streams, true_sequential=False, done=lambda _: None, swaps=Swaps(block, "block")
    )
    tensors = {f"{name}.{key}": tensor for name, item in packed.items() for key, tensor in item.tensors.items()}
    again = Block()
    restore_layers(again, "block", layers, records, tensors, Swaps(block, "block"))
    for name, value in block.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert torch.equal(packed_from(tensors, records[0]).unpack(), packed[records[0].name].unpack())


def test_propagation_replaces_the_hidden_states_in_order() -> None:
    block, _, _ = make_block()
    streams = streams_of()
    with torch.no_grad():
        expected = [block(block(x, scale=torch.tensor(2.0)), scale=torch.tensor(2.0)) for x in streams.hidden]
    streams.calls = [calls * 2 for calls in streams.calls]
    propagate(block, streams)
    assert all(torch.equal(a, b) for a, b in zip(streams.hidden, expected, strict=True))


def test_a_block_without_inputs_is_compressed_and_says_so() -> None:
    block, source, layers = make_block()
    packed, records = compress_block(
        block,
        layers,
        "block",
        source,
        Streams([], []),
        true_sequential=False,
        done=lambda _: None,
        swaps=Swaps(block, "block"),
    )
    assert set(packed) == set(layers)
    assert all(record.notes[0] == UNREACHED for record in records)
    assert all(record.error == pytest.approx(record.weight_error, rel=1e-5) for record in records)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_second_moments_by_blocks_are_the_whole_product(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(5, 30, 300, generator=generator).to(dtype)
    accumulated = SecondMoment(torch.zeros(300, 300))
    accumulated.update(inputs[:2])
    accumulated.update(inputs[2])
    accumulated.update(inputs[3:])
    flat = inputs.double().flatten(0, 1)
    torch.testing.assert_close(accumulated.moment.double(), flat.T @ flat * (2 / 5), rtol=1e-5, atol=1e-4)
    assert torch.equal(accumulated.moment, accumulated.moment.T)


def test_sums_go_on_in_a_process_whose_panels_have_another_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """As between two machines of which one multiplies bfloat16 in matrix units."""
    columns = gather.UNIT_COLUMNS + 100
    first, second = torch.randn(2, 1, 9, columns, generator=torch.Generator().manual_seed(0))
    whole, here, there = (InputAccumulator(columns, NEEDS, 0) for _ in range(3))
    monkeypatch.setattr(gather, "has_matrix_units", lambda: True)
    whole.update(first), whole.update(second), here.update(first)
    state = here.state()
    monkeypatch.setattr(gather, "has_matrix_units", lambda: False)
    there.restore(*state)
    there.update(second)
    assert whole.moment is not None and there.moment is not None
    torch.testing.assert_close(there.moment.moment, whole.moment.moment)
    assert there.moment.tokens == 18 and torch.equal(there.moment.moment, there.moment.moment.T)


def test_bfloat16_products_leave_the_setting_as_it_was() -> None:
    a = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    before = a @ a
    with products_of_bfloat16():
        inside = a @ a
    assert torch.equal(a @ a, before)
    assert float((inside - before).abs().max()) < 0.5
