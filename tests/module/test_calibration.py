"""What an item of the user's calibration means."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding

import whit
from tests.module.nets import WIDTH, seeded, vectors
from whit.errors import DataError
from whit.module.calibration import arguments_of, move, read_calibration

Pair = namedtuple("Pair", ["x", "scale"])


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor, scale: float | Tensor = 1.0) -> Tensor:
        out: Tensor = self.layer(x * scale)
        return out


X = vectors(1)[0]


@pytest.mark.parametrize(
    ("item", "same"),
    [
        (X, X),
        ((X, 2.0), 2 * X),
        (Pair(X, torch.tensor(2.0)), 2 * X),
        ({"x": X, "scale": 3.0}, 3 * X),
        (BatchEncoding({"x": X, "scale": torch.tensor(3.0)}), 3 * X),
        ([X, torch.zeros(32)], X),
        ([(X, 2.0), "label"], 2 * X),
        ([{"x": X, "scale": 3.0}, None, None], 3 * X),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_type_of_an_item_says_what_it_is(item: Any, same: Tensor) -> None:
    module = seeded(Scaled)
    found = whit.compress(module, "gptq", calibration=[item])
    expected = whit.compress(module, "gptq", calibration=[same])
    assert found.layers[0].error == expected.layers[0].error


def test_a_data_loader_is_calibration_and_its_labels_are_not_inputs() -> None:
    loader = DataLoader(TensorDataset(X, torch.zeros(32, dtype=torch.long)), batch_size=8)
    found = whit.compress(seeded(Scaled), "gptq", calibration=loader)
    expected = whit.compress(seeded(Scaled), "gptq", calibration=list(X.split(8)))
    assert found.layers[0].error == expected.layers[0].error


def test_a_generator_is_gone_through_once_and_serves_every_pass() -> None:
    drawn: list[int] = []

    def items() -> Any:
        for index, item in enumerate(vectors()):
            drawn.append(index)
            yield item

    module = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 8))
    result = whit.compress(module, "gptq", calibration=items())
    assert drawn == [0, 1, 2, 3]
    again = whit.compress(module, "gptq", calibration=vectors())
    assert [layer.error for layer in result.layers] == [layer.error for layer in again.layers]


def test_forward_replaces_the_rules() -> None:
    module = seeded(Scaled)
    found = whit.compress(
        module, "gptq", calibration=[("ignored", X)], forward=lambda part, item: part(item[1], scale=2.0)
    )
    assert found.layers[0].error == whit.compress(module, "gptq", calibration=[2 * X]).layers[0].error


def test_inputs_by_keyword_reach_the_layer() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, 8)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(input=x)
            return out

    module = seeded(Keyword)
    found = whit.compress(module, "gptq", calibration=[X])
    assert found.layers[0].error == whit.compress(nn.Sequential(module.layer), "gptq", calibration=[X]).layers[0].error
    assert found.module(X).shape == (32, 8)


def test_moving_keeps_the_structure() -> None:
    meta = torch.device("meta")
    moved = move(Pair([X, {"a": X}], "text"), meta)
    assert isinstance(moved, Pair) and moved.x[0].is_meta and moved.x[1]["a"].is_meta and moved.scale == "text"
    assert read_calibration(None) == []
    with pytest.raises(DataError, match=r"item is a dict, which cannot be read"):
        arguments_of({1: X})
    with pytest.raises(DataError, match=r"item is a list, which cannot be read"):
        arguments_of([])
