from __future__ import annotations

import pytest
from torch import nn

from tests.models.conftest import random_model
from whit.errors import ModelError
from whit.models.stacks import find_stacks


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", {"model.layers": 3}),
        ("qwen2", {"model.layers": 3}),
        ("gemma3", {"model.layers": 3}),
        ("gpt2", {"transformer.h": 3}),
        ("opt", {"model.decoder.layers": 3}),
        ("gpt-neox", {"gpt_neox.layers": 3}),
        ("bert", {"encoder.layer": 3}),
        ("albert", {"albert.encoder.albert_layer_groups": 1}),
        ("whisper", {"model.encoder.layers": 2, "model.decoder.layers": 3}),
        ("t5", {"encoder.block": 2, "decoder.block": 2}),
    ],
)
def test_stacks_of_families(family: str, expected: dict[str, int]):
    stacks = find_stacks(random_model(family))
    assert {stack.name: len(stack.blocks) for stack in stacks} == expected
    for stack in stacks:
        assert stack.blocks == tuple(f"{stack.name}.{index}" for index in range(len(stack.blocks)))


def test_vision_transformer_has_one_stack_that_holds_almost_all_linear_layers():
    model = random_model("vit")
    (stack,) = find_stacks(model)
    assert len(stack.blocks) == 3
    linear = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    inside = [name for name in linear if name.startswith(f"{stack.name}.")]
    assert len(inside) >= len(linear) - 1  # the pooler is outside


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 4)


class _Recurrence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)


class _Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(_Attention() for _ in range(3))


def _root(**children: nn.Module) -> nn.Module:
    root = nn.Module()
    for name, child in children.items():
        root.add_module(name, child)
    return root


def test_outermost_list_counts():
    (stack,) = find_stacks(_root(layers=nn.ModuleList(_Experts() for _ in range(2))))
    assert stack.blocks == ("layers.0", "layers.1")


def test_hybrid_list_with_recurring_classes_is_a_stack():
    layers = nn.ModuleList([_Recurrence(), _Attention(), _Recurrence(), _Attention()])
    assert len(find_stacks(_root(layers=layers))[0].blocks) == 4


def test_sequential_of_blocks_is_a_stack():
    assert find_stacks(nn.Sequential(_Attention(), _Attention()))[0].blocks == ("0", "1")


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)),
        nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]),
        nn.ModuleList([_Recurrence(), _Attention()]),
        nn.ModuleList(),
        nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)),
    ],
)
def test_heads_and_bare_layers_are_no_stacks(module: nn.Module):
    with pytest.raises(ModelError, match="no repeated block"):
        find_stacks(_root(part=module))
