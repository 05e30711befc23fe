"""Tiny models, their inputs and finished runs, made once and shared by the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import whit
from tests import tiny
from whit.pipeline.events import Listener, Plan
from whit.report.record import Result


@dataclass(frozen=True)
class Case:
    """A saved tiny model with calibration and evaluation inputs."""

    family: str
    model: Path
    options: whit.RunOptions


@dataclass(frozen=True)
class Finished:
    """A case compressed into `output`."""

    case: Case
    output: Path
    plan: Plan
    result: Result


class Recorder(Listener):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.plans: list[Plan] = []
        self.notes: list[str] = []
        self.steps: list[str] = []
        self.phases: list[tuple[str, int]] = []
        self.blocks: list[str] = []

    def planned(self, plan: Plan) -> None:
        self.plans.append(plan)

    def note(self, message: str) -> None:
        self.notes.append(message)

    def step(self, description: str) -> None:
        self.steps.append(description)

    def phase(self, name: str, total: int) -> None:
        self.phases.append((name, total))

    def block(self, index: int, total: int, name: str) -> None:
        self.blocks.append(name)


def make_case(family: str, folder: Path, **options: Any) -> Case:
    """Save a model of a family and inputs for it."""
    model = tiny.save_model(family, folder / "model")
    calibration = tiny.save_inputs(family, folder / "calibration.safetensors")
    evaluation = tiny.save_inputs(family, folder / "evaluation.safetensors", seed=2, sequences=2)
    chosen = {"calibration": str(calibration), "evaluation": str(evaluation), "device": "cpu", **options}
    return Case(family, model, whit.RunOptions(**chosen))


@pytest.fixture(scope="session")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """Family -> its case."""
    cases: dict[str, Case] = {}

    def get(family: str) -> Case:
        if family not in cases:
            cases[family] = make_case(family, tmp_path_factory.mktemp(family))
        return cases[family]

    return get


@pytest.fixture(scope="session")
def finished_run(case_of: Callable[[str], Case], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Finished]:
    """(family, method, **knobs) -> a finished run; tests must not change its files."""
    runs: dict[str, Finished] = {}

    def get(family: str, method: str = "gptq", **knobs: Any) -> Finished:
        key = f"{family}-{method}-{sorted(knobs.items())}"
        if key not in runs:
            case = case_of(family)
            output = tmp_path_factory.mktemp("output") / "out"
            recorder = Recorder()
            result = whit.compress(case.model, method, output, options=case.options, listener=recorder, **knobs)
            assert isinstance(result, Result)
            runs[key] = Finished(case, output, recorder.plans[0], result)
        return runs[key]

    return get
