"""What the stand-ins catch is what the real blocks receive, in every family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import tiny
from tests.pipeline.conftest import Case
from tests.pipeline.modules import WIDTH, Parent
from whit.errors import ModelError
from whit.models.resolve import resolve_model
from whit.models.skeleton import load_dense
from whit.models.stacks import find_stacks
from whit.pipeline.catch import CallCatcher, Caught, Finished

FAMILIES = sorted(tiny.FAMILIES)
Batch = dict[str, Tensor]


def batches_of(family: str, masked: bool = True) -> list[Batch]:
    """Three batches of one sequence; the last has padding where the family takes a mask."""
    data = tiny.inputs(family, sequences=3)
    data.pop("labels", None)
    if family != "whisper" and masked:
        data["attention_mask"] = torch.ones_like(data["input_ids"])
        data["attention_mask"][2, -5:] = 0
    return [{name: tensor[row : row + 1] for name, tensor in data.items()} for row in range(3)]


class Watcher:
    """Records every call of some modules in a real forward pass: name, arguments, result."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any], Any]] = []
        self._handles = [
            model.get_submodule(name).register_forward_hook(self._hook(name), with_kwargs=True) for name in names
        ]

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], out: Any) -> None:
            kept = tuple(item.clone() if isinstance(item, Tensor) else item for item in arguments)
            self.calls.append((name, kept, dict(keywords), out))

        return hook

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()


def real_calls(
    model: nn.Module, names: list[str], batch: Batch
) -> list[tuple[str, tuple[Any, ...], dict[str, Any], Any]]:
    watcher = Watcher(model, names)
    with torch.no_grad():
        model(**batch, **({"use_cache": False} if hasattr(model.config, "use_cache") else {}))
    watcher.stop()
    return watcher.calls


def same(a: Any, b: Any) -> bool:
    """Equal values, tensor by tensor; objects of other types (caches, configs) by type."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, tuple | list):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and (a == b if isinstance(a, int | float | str | None) else True)


def compare(model: nn.Module, names: list[str], batch: Batch, caught: Caught) -> None:
    """Replaying the caught calls gives each real block exactly what it got in the real forward, and its result."""
    real = real_calls(model, names, batch)
    assert [call.block for call in caught.calls] == [name for name, *_ in real]
    hidden = caught.hidden
    for call, (name, arguments, keywords, out) in zip(caught.calls, real, strict=True):
        mine, kept = list(call.arguments), dict(call.keywords)
        if isinstance(call.slot, int):
            mine[call.slot] = hidden
        else:
            kept[call.slot] = hidden
        assert same(tuple(mine), arguments), name
        assert same(kept, keywords), name
        with torch.no_grad():
            hidden = call.run(model.get_submodule(name), hidden)
        assert torch.equal(hidden, out if isinstance(out, Tensor) else out[0]), name


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "whisper"])
def test_caught_arguments_are_the_real_ones(family: str, masked: bool, case_of: Callable[[str], Case]) -> None:
    model = load_dense(resolve_model(case_of(family).model), torch.float32, "cpu")
    (stack,) = find_stacks(model)
    probe = CallCatcher(model, stack.blocks, as_tuple=False)
    first = probe.first_call(batches_of(family, masked)[0])
    assert first is not None
    assert len(first.calls) == 1
    as_tuple = first.calls[0].returns_tuple(model.get_submodule(stack.blocks[0]), first.hidden)
    catcher = CallCatcher(model, stack.blocks, as_tuple=as_tuple)
    for index, batch in enumerate(batches_of(family, masked)):
        compare(model, list(stack.blocks), batch, catcher.catch(batch, index))
    assert not [name for name, module in model.named_modules() if "StandIn" in type(module).__name__]


def test_a_shared_block_is_caught_as_often_as_it_runs(case_of: Callable[[str], Case]) -> None:
    model = load_dense(resolve_model(case_of("albert").model), torch.float32, "cpu")
    (stack,) = find_stacks(model)
    batch = batches_of("albert")[0]
    caught = CallCatcher(model, stack.blocks, as_tuple=False).catch(batch, 0)
    assert [call.block for call in caught.calls] == [stack.blocks[0]] * model.config.num_hidden_layers


def test_decoder_sees_the_encoder_as_it_was_left(case_of: Callable[[str], Case]) -> None:
    model = load_dense(resolve_model(case_of("whisper").model), torch.float32, "cpu")
    encoder, decoder = find_stacks(model)
    batches = batches_of("whisper")
    catcher = CallCatcher(model, encoder.blocks, as_tuple=False, later=decoder.blocks)
    caught = [catcher.catch(batch, index) for index, batch in enumerate(batches)]
    assert all(len(item.calls) == len(encoder.blocks) for item in caught)
    with torch.no_grad():  # the compression of the encoder, as far as the decoder is concerned
        for name in encoder.blocks:
            for parameter in model.get_submodule(name).parameters():
                parameter.copy_((parameter * 4).round() / 4)
    results = []
    for item in caught:
        hidden = item.hidden
        for call in item.calls:
            with torch.no_grad():
                hidden = call.run(model.get_submodule(call.block), hidden)
        results.append(hidden)
    finished = [Finished(encoder.blocks, len(encoder.blocks), False, results)]
    catcher = CallCatcher(model, decoder.blocks, as_tuple=False, finished=finished)
    for index, batch in enumerate(batches):
        compare(model, list(decoder.blocks), batch, catcher.catch(batch, index))


def test_equal_arguments_of_later_batches_are_kept_once(case_of: Callable[[str], Case]) -> None:
    model = load_dense(resolve_model(case_of("llama").model), torch.float32, "cpu")
    (stack,) = find_stacks(model)
    catcher = CallCatcher(model, stack.blocks, as_tuple=False)
    first, second = (catcher.catch(batch, index) for index, batch in enumerate(batches_of("llama", masked=False)[:2]))
    cosine = [item.calls[0].keywords["position_embeddings"][0] for item in (first, second)]
    assert cosine[0] is cosine[1]
    assert first.hidden is not second.hidden


@pytest.mark.parametrize("as_tuple", [False, True])
def test_blocks_that_return_tuples(as_tuple: bool) -> None:
    torch.manual_seed(0)
    model = Parent(as_tuple=as_tuple)
    blocks = [f"layers.{index}" for index in range(3)]
    x = torch.randn(1, 5, WIDTH)
    first = CallCatcher(model, blocks, as_tuple=False).first_call({"x": x})
    assert first is not None
    assert first.calls[0].returns_tuple(model.layers[0], first.hidden) is as_tuple
    caught = CallCatcher(model, blocks, as_tuple=as_tuple).catch({"x": x}, 0)
    assert torch.equal(caught.hidden, torch.tanh(x))
    hidden = caught.hidden
    with torch.no_grad():
        for call in caught.calls:
            hidden = call.run(model.get_submodule(call.block), hidden)
        assert torch.equal(hidden * 2, model(x))


def scaled(index: int, hidden: Tensor) -> Tensor:
    return hidden * 2 if index == 2 else hidden


def scaled_in_place(index: int, hidden: Tensor) -> Tensor:
    return hidden.mul_(2) if index == 2 else hidden


@pytest.mark.parametrize("between", [scaled, scaled_in_place])
def test_hidden_states_changed_between_blocks_are_refused(between: Callable[[int, Tensor], Tensor]) -> None:
    blocks = [f"layers.{index}" for index in range(3)]
    with pytest.raises(ModelError, match=r"before 'layers.2', the model changes the hidden states"):
        CallCatcher(Parent(between=between), blocks, as_tuple=False).catch({"x": torch.ones(1, 3, WIDTH)}, 0)


def test_blocks_are_back_in_place_after_an_error() -> None:
    model = Parent(between=scaled)
    before = list(model.layers)
    with pytest.raises(ModelError):
        CallCatcher(model, ["layers.0", "layers.1", "layers.2"], as_tuple=False).catch(
            {"x": torch.ones(1, 3, WIDTH)}, 0
        )
    assert list(model.layers) == before


def test_blocks_that_are_never_called() -> None:
    class Unused(Parent):
        def forward(self, x: Tensor) -> Tensor:
            return x

    assert CallCatcher(Unused(), ["layers.0"], as_tuple=False).first_call({"x": torch.ones(1, 3, WIDTH)}) is None


def test_inputs_that_take_another_way_through_the_model_are_refused() -> None:
    class EarlyExit(Parent):
        def forward(self, x: Tensor) -> Tensor:
            hidden = x.clone()
            for layer in self.layers[: 3 if float(x.sum()) > 0 else 2]:
                hidden = layer(hidden)
            return hidden

    catcher = CallCatcher(EarlyExit(), [f"layers.{index}" for index in range(3)], as_tuple=False)
    catcher.catch({"x": torch.ones(1, 3, WIDTH)}, 0)
    with pytest.raises(ModelError, match="calibration input 2 calls 2 blocks"):
        catcher.catch({"x": -torch.ones(1, 3, WIDTH)}, 1)
