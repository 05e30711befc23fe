"""The detector of systematic outlier features, on planted ones."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from tests import tiny
from whit.errors import KnobError
from whit.methods.outlier_features import Crossings, OutlierFeature, count_crossings, emergent_outliers

PATTERNS = ("*.q_proj", "*.up_proj")


def planted(features: Sequence[int], layers: Sequence[int]) -> list[Crossings]:
    """A random Llama of five layers; some features come out of the norms of some layers twenty times as loud."""
    torch.manual_seed(0)
    model = tiny.llama(layers=5).eval()
    with torch.no_grad():
        for index in layers:
            block = model.model.layers[index]
            for norm in (block.input_layernorm, block.post_attention_layernorm):
                norm.weight[list(features)] *= 20
    ids = tiny.inputs("llama")["input_ids"]
    return list(count_crossings(model, [{"input_ids": part} for part in ids.split(2)], PATTERNS).values())


def test_exactly_the_planted_features_are_found() -> None:
    found = emergent_outliers(planted([4, 17, 40], range(5)))
    assert [feature.index for feature in found] == [4, 17, 40]
    assert all(feature.layers == 1.0 and feature.positions > 0.5 for feature in found)


def test_a_feature_of_too_few_layers_is_not_systematic() -> None:
    counts = planted([4, 17, 40], [2])
    assert emergent_outliers(counts) == []
    assert [feature.index for feature in emergent_outliers(counts, layer_share=0.2)] == [4, 17, 40]


def test_a_feature_of_too_few_positions_is_not_systematic() -> None:
    layers = [Crossings(torch.tensor([0, count, 50]), 100) for count in (5, 6, 0, 0)]
    assert emergent_outliers(layers) == [OutlierFeature(2, 1.0, 0.5)]
    assert emergent_outliers(layers, position_share=0.055)[0] == OutlierFeature(1, 0.5, 0.055)


def test_crossings_are_counted_over_all_batches() -> None:
    model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(2, 2))
    batches = [{"input": torch.tensor([[6.0, -7.0], [5.0, 6.5]])}, {"input": torch.tensor([[-6.0, 0.0]])}]
    counts = count_crossings(model, batches, ["1"])
    assert (counts["1"].counts.tolist(), counts["1"].positions) == ([2, 2], 3)
    assert not model[1]._forward_pre_hooks


def test_bad_input_is_quoted() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(KnobError, match=r"pattern '\*.k_proj' matches no module"):
        count_crossings(model, [], ["*.k_proj"])
    with pytest.raises(KnobError, match=r"got widths \[2, 3\]"):
        emergent_outliers([Crossings(torch.zeros(2), 1), Crossings(torch.zeros(3), 1)])
    with pytest.raises(KnobError, match=r"got widths \[\]"):
        emergent_outliers([])
