"""Token sums against a direct computation."""

from __future__ import annotations

import math

import pytest
import torch

from whit.evaluation.tokens import IGNORED, ROWS, most_likely, token_sums


def logits(rows: int, vocabulary: int = 11, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", [1, 7, ROWS, 2 * ROWS + 3])
def test_against_direct_computation(rows: int) -> None:
    model, reference = logits(rows, seed=1), logits(rows, seed=2)
    targets = torch.randint(0, 11, (rows,), generator=torch.Generator().manual_seed(3))
    kept = (model.clone(), reference.clone())
    sums = token_sums(model, targets, reference)
    p, q = reference.double().softmax(-1), model.double().softmax(-1)
    assert sums.tokens == rows
    assert sums.likelihood == pytest.approx(float(-q[torch.arange(rows), targets].log().sum()), rel=1e-5)
    assert sums.reference_likelihood == pytest.approx(float(-p[torch.arange(rows), targets].log().sum()), rel=1e-5)
    assert sums.divergence == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5)
    assert sums.agreement == int((p.argmax(-1) == q.argmax(-1)).sum())
    assert torch.equal(model, kept[0]) and torch.equal(reference, kept[1])


def test_divergence_has_a_direction() -> None:
    sharp, flat = torch.tensor([[math.log(9.0), 0.0]]), torch.zeros(1, 2)
    of_sharp = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    of_flat = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert token_sums(flat, None, sharp).divergence == pytest.approx(of_sharp, rel=1e-6)
    assert token_sums(sharp, None, flat).divergence == pytest.approx(of_flat, rel=1e-6)


def test_ignored_positions_count_nowhere() -> None:
    model, reference = logits(6, seed=4), logits(6, seed=5)
    targets = torch.tensor([1, IGNORED, 2, IGNORED, IGNORED, 3])
    kept = targets != IGNORED
    assert token_sums(model, targets, reference) == token_sums(model[kept], targets[kept], reference[kept])


def test_without_targets_or_reference() -> None:
    sums = token_sums(logits(5), None)
    assert (sums.tokens, sums.likelihood, sums.divergence, sums.agreement) == (5, None, None, None)


def test_half_precision_logits_are_scored_in_single_precision() -> None:
    model = logits(300, vocabulary=40)
    targets = torch.zeros(300, dtype=torch.int64)
    exact = token_sums(model.bfloat16().float(), targets).likelihood
    assert token_sums(model.bfloat16(), targets).likelihood == exact


@pytest.mark.parametrize("width", [5, 256, 700])
def test_most_likely_is_the_first_largest(width: int) -> None:
    rows = (torch.randn(40, width, generator=torch.Generator().manual_seed(0)) * 2).round()  # many ties
    rows[3] = -torch.inf
    rows[3, 4] = 0.0
    assert torch.equal(most_likely(rows), rows.argmax(-1))
