"""Decoding as one compiled program gives the tokens of transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

pytest.importorskip("numba")

from tests import tiny
from tests.generation.test_blocks import SMALL, llama, loud
from tests.kernels.test_cpu_decode import random_packed
from whit.errors import KnobError
from whit.formats.base import Format
from whit.formats.binary_residual import BinaryResidual
from whit.formats.grouped_integer import GroupedInteger
from whit.formats.level_table import LevelTable
from whit.generation import compiled, continue_greedily
from whit.models.packed import PackedLinear, replace_module

IDS = torch.tensor([[5, 3, 9, 1, 20]])
NEW = 24


def pack(model: Any, layouts: list[Format]) -> Any:
    """Random weights in these layouts, in turn, of a size that keeps sums of the order of one."""
    names = [name for name, item in model.named_modules() if isinstance(item, nn.Linear) and "layers" in name]
    for number, name in enumerate(names):
        linear, layout = model.get_submodule(name), layouts[number % len(layouts)]
        packed = random_packed(layout, linear.out_features, linear.in_features, seed=number)
        for key, item in packed.tensors.items():
            if item.is_floating_point():
                item /= 40 if key == "scales" else 8
        module = PackedLinear(layout, packed.rows, packed.columns, None)
        module.set_packed(packed)
        replace_module(model, name, module)
    return model


def qwen() -> Qwen2ForCausalLM:
    torch.manual_seed(2)
    return Qwen2ForCausalLM(Qwen2Config(**SMALL))


WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
PACKED: list[Format] = [
    BinaryResidual(0, False),
    GroupedInteger(4, 32, False),
    LevelTable(2, 16),
    BinaryResidual(24, True),
    GroupedInteger(8, 32, True),
]
MODELS: dict[str, Callable[[], Any]] = {
    "dense": lambda: loud(llama()),
    "tied": lambda: loud(llama(tie_word_embeddings=True)),
    "with biases": lambda: loud(llama(attention_bias=True, mlp_bias=True)),
    "Qwen2": lambda: loud(qwen()),
    "packed": lambda: pack(loud(llama(**WIDE)), PACKED),
    "planes": lambda: pack(loud(llama()), [BinaryResidual(0, False)]),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("padding", [0, 2])
def test_same_tokens_as_the_library(name: str, padding: int) -> None:
    model = MODELS[name]().eval()
    mask = torch.ones_like(IDS)
    mask[:, :padding] = 0
    wanted = continue_greedily(model, IDS, mask, new_tokens=NEW, way="library")
    found = continue_greedily(model, IDS, mask, new_tokens=NEW)
    assert (found.way, found.graph, found.reasons) == ("compiled", False, ())
    assert torch.equal(found.tokens, wanted.tokens)
    assert len(wanted.tokens[0, 5:].unique()) > 2


def test_the_number_of_threads_changes_nothing() -> None:
    model = MODELS["packed"]().eval()
    before = torch.get_num_threads()
    alone = continue_greedily(model, IDS, new_tokens=NEW).tokens
    try:
        torch.set_num_threads(3)
        assert all(torch.equal(continue_greedily(model, IDS, new_tokens=NEW).tokens, alone) for _ in range(5))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: model.bfloat16(), "one sequence in float32"),
        (lambda model: pack(model, [GroupedInteger(5, 16, True)]), "no compiled product for PackedLinear"),
        (lambda model: model.lm_head.register_forward_hook(lambda *given: None), "Linear carries hooks"),
        (lambda model: model.model.layers[1].register_forward_hook(lambda *given: None), None),
    ],
)
def test_what_is_not_compiled_is_left_to_the_library(change: Callable[[Any], object], reason: str | None) -> None:
    model = loud(llama()).eval()
    change(model)
    found = continue_greedily(model, IDS, new_tokens=NEW)
    assert torch.equal(found.tokens, continue_greedily(model, IDS, new_tokens=NEW, way="library").tokens)
    if reason is None:
        return
    assert found.way == "library"
    assert reason in found.reasons[0]
    with pytest.raises(KnobError, match=reason):
        continue_greedily(model, IDS, new_tokens=NEW, way="compiled")


def test_several_sequences_and_a_missing_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    model = loud(llama()).eval()
    assert continue_greedily(model, IDS.repeat(2, 1), new_tokens=NEW).way == "library"
    assert continue_greedily(model, IDS, new_tokens=3).explain() == "library"
    monkeypatch.setattr(compiled, "numba_works", lambda: False)
    found = continue_greedily(model, IDS, new_tokens=NEW)
    assert found.explain() == "library; not compiled: numba is missing"


def test_a_program_that_computes_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model = loud(llama()).eval()
    wanted = continue_greedily(model, IDS, new_tokens=NEW, way="library").tokens
    inner = compiled.CompiledStep._norm

    def doubled(self: Any, norm: Any, update: Any) -> Any:
        return inner(self, compiled.Norm(2 * norm.weight, norm.epsilon), update)

    monkeypatch.setattr(compiled.CompiledStep, "_norm", doubled)
    found = continue_greedily(model, IDS, new_tokens=NEW)
    assert (found.way, found.reasons) == ("library", ("not compiled: the compiled program computes something else",))
    assert torch.equal(found.tokens, wanted)


def test_tiny_models_of_other_forms_say_why() -> None:
    found = continue_greedily(tiny.gpt2().eval(), IDS, new_tokens=NEW)
    assert found.way == "library"
    assert found.reasons[0].startswith("not compiled: ")
