"""What tuning reports of a step of decoding; the search itself is tested in tests/kernels, kernels on a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests import tiny
from tests.kernels.test_cuda_kernels import random_packed
from whit.formats.base import Packed
from whit.formats.level_table import LevelTable
from whit.generation import step_tuning
from whit.generation.blocks import GatedDecoder
from whit.generation.step_tuning import BLOCKS, TunedStep, tune_step, tuned_steps
from whit.generation.weights import decoder_of
from whit.kernels.cuda_shapes import Shape

SHAPE = Shape(384, 1024, 2, True, late=True, patient=True)


def test_times_are_reported_for_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = LevelTable(2, 0)
    parts = tuple(random_packed(layout, rows, 64) for rows in (32, 16))

    def found(decoder: GatedDecoder) -> Iterator[TunedStep]:
        yield TunedStep(parts[:1], None, {})
        yield TunedStep(parts[:1], None, {None: 3e-3, SHAPE: 6e-3})
        yield TunedStep(parts, SHAPE, {None: 3e-3, SHAPE: 1.5e-3})

    monkeypatch.setattr(step_tuning, "tune_step", found)
    first, second = tuned_steps(tiny.llama(layers=3))
    assert (first.seconds_before, first.seconds, first.rows, first.parts) == (1e-3, 1e-3, 32, ())
    assert (second.seconds_before, second.seconds, second.rows, second.parts) == (1e-3, 5e-4, 48, (32, 16))
    assert second.format == layout.to_json() and second.vectors == 1 and second.tried == 2


def test_others_have_nothing_to_tune() -> None:
    assert list(tuned_steps(nn.Linear(4, 4))) == []


def test_where_there_is_no_choice_nothing_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense layers on a CPU."""
    decoder = decoder_of(tiny.llama(layers=BLOCKS + 1))
    assert decoder is not None
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.inference_mode())
    assert list(tune_step(decoder)) == []


def test_gate_and_up_are_timed_without_the_launch_that_takes_both(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = decoder_of(tiny.llama(layers=1))
    assert decoder is not None
    gate, up, other = (random_packed(LevelTable(2, 0), rows, 64) for rows in (32, 32, 16))
    none, single = SimpleNamespace(launched=[], gateable=[]), SimpleNamespace(launched=[other], gateable=[])
    parts: dict[str, Any] = {
        "gate_up": SimpleNamespace(launched=[gate, up], gateable=[gate, up]),
        "down": single,
        "attention": none,
        "output": none,
    }
    aside: list[int] = []
    searched: list[tuple[int, bool, bool, int]] = []

    @contextmanager
    def no_gated_launch(x: torch.Tensor, weights: Sequence[Packed]) -> Iterator[None]:
        aside.append(len(weights))
        yield
        aside.pop()

    def tune_in_step(x: torch.Tensor, weights: Sequence[Packed], seconds: object, *, makes: bool, gated: bool) -> Any:
        searched.append((len(weights), makes, gated, aside[-1]))
        return SHAPE, {None: 2.0, SHAPE: 1.0}

    step = SimpleNamespace(place=SimpleNamespace(position=torch.zeros(1)))
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.inference_mode())
    monkeypatch.setattr(step_tuning, "FusedStep", lambda *given: step)
    monkeypatch.setattr(step_tuning, "no_gated_launch", no_gated_launch)
    monkeypatch.setattr(step_tuning, "tune_in_step", tune_in_step)
    found = list(tune_step(replace(decoder, blocks=[replace(decoder.blocks[0], **parts)])))
    assert searched == [(2, True, False, 2), (2, True, True, 0), (1, False, False, 0)]
    assert [item.gated for item in found] == [False, True, False] and not aside
