"""Tasks of the LM Evaluation Harness on local files: scores by hand, paired differences, errors that say what to do."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import whit
from whit.cli import main
from whit.errors import DataError, KnobError, MissingDependencyError, ModelError
from whit.evaluation import harness
from whit.evaluation.tasks import item_interval
from whit.report.record import EvaluationRecord

ASSETS = Path(__file__).parents[1] / "assets"
STORIES, TASK = ASSETS / "stories260k", ASSETS / "tasks" / "endings.yaml"
needs_harness = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("lm_eval", "datasets")), reason="lm-eval is not installed"
)


def items() -> list[dict[str, Any]]:
    return [json.loads(line) for line in TASK.with_suffix(".jsonl").read_text().splitlines()]


def test_without_the_harness_the_error_holds_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    with pytest.raises(MissingDependencyError, match=r"pip install 'whit\[lm-eval\]'"):
        whit.evaluate(STORIES, tasks=[str(TASK)])


def test_a_limit_belongs_to_tasks() -> None:
    with pytest.raises(KnobError, match="give --tasks as well"):
        whit.evaluate(STORIES, limit=3)
    with pytest.raises(KnobError, match="limit must be at least 1, got 0"):
        whit.evaluate(STORIES, tasks=[str(TASK)], limit=0)


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("tasks") / "out"
    options = whit.RunOptions(samples=1, sequence_length=16, evaluate=False)
    whit.compress(STORIES, "rtn", output, bits=2, group_size=0, options=options)
    return output


@pytest.fixture(scope="module")
def record(compressed: Path) -> EvaluationRecord:
    return whit.evaluate(compressed, against=STORIES, tasks=[str(TASK)])


def expected_choices(model: Any) -> tuple[list[bool], list[bool]]:
    """Right answers by the sum of log-probabilities of each ending, and by that sum per character."""
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    plain, normalised = [], []
    for item in items():
        sums = []
        for choice in item["choices"]:
            context = tokenizer(item["question"])["input_ids"]
            whole = tokenizer(f"{item['question']} {choice}")["input_ids"]
            with torch.no_grad():
                scores = model(torch.tensor([whole[:-1]])).logits[0].log_softmax(-1)
            ending = range(len(context), len(whole))
            sums.append(sum(float(scores[position - 1, whole[position]]) for position in ending))
        lengths = [len(choice) for choice in item["choices"]]
        plain.append(int(np.argmax(sums)) == item["answer"])
        normalised.append(int(np.argmax(np.array(sums) / lengths)) == item["answer"])
    return plain, normalised


@needs_harness
def test_scores_are_those_computed_by_hand(record: EvaluationRecord, compressed: Path) -> None:
    mine, mine_normalised = expected_choices(whit.load(compressed))
    theirs, _ = expected_choices(AutoModelForCausalLM.from_pretrained(STORIES).eval())
    found = {metric.name: metric for metric in record.metrics}
    assert found["endings/acc"].value == pytest.approx(np.mean(mine))
    assert found["endings/acc_norm"].value == pytest.approx(np.mean(mine_normalised))
    assert found["original endings/acc"].value == pytest.approx(np.mean(theirs))
    difference = found["endings/acc difference"]
    pairs = np.array(mine, dtype=float) - np.array(theirs, dtype=float)
    assert difference.value == pytest.approx(pairs.mean())
    draws = np.random.default_rng(0).choice(pairs, (20000, len(pairs))).mean(1)
    assert [difference.low, difference.high] == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.09)
    assert {metric.better for metric in record.metrics} == {"higher"}
    assert found["original endings/acc"].protocol == found["endings/acc"].protocol


def test_items_that_all_score_the_same_leave_room_for_those_that_were_missed() -> None:
    # (1 - p)^10 = 0.05 for the share p that ten items miss with probability 5 %.
    share = 1 - 0.05**0.1
    assert (1 - share) ** 10 == pytest.approx(0.05)
    assert item_interval([1.0] * 10, 0, 1) == pytest.approx((1 - share, 1))
    assert item_interval([0.0] * 10, 0, 1) == pytest.approx((0, share))
    assert item_interval([0.0] * 10, -1, 1) == pytest.approx((-share, share))
    low, high = item_interval([0.0, 1.0] * 50, 0, 1)
    assert (low, high) == pytest.approx((0.4, 0.6), abs=0.02)


@needs_harness
def test_the_protocol_says_what_numbers_depend_on(record: EvaluationRecord) -> None:
    protocol = record.metrics[0].protocol
    assert protocol.startswith("endings/acc/1;tokenizer=")
    for field in ("corpus=endings@", "dtype=float32", "items=12", "lm_eval=0.", "shots=0", "task_version=1.0"):
        assert field in protocol
    assert record.data["items"] == 12
    # The harness's standard error of a mean: sample deviation / sqrt(n).
    share = record.metrics[0].value
    assert record.data["standard_errors"]["endings/acc"] == pytest.approx((share * (1 - share) / 11) ** 0.5)


@needs_harness
def test_a_limit_takes_the_first_items_and_changes_the_protocol(record: EvaluationRecord) -> None:
    state, numbers, drawn = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    few = whit.evaluate(STORIES, tasks=[str(TASK)], limit=3)
    assert random.getstate() == state
    assert np.random.get_state()[1].tolist() == numbers
    assert torch.equal(torch.get_rng_state(), drawn)
    assert few.data["items"] == 3
    assert "items=3" in few.metrics[0].protocol
    assert few.metrics[0].protocol != record.metrics[0].protocol


@needs_harness
def test_items_that_were_calibrated_on_are_found(tmp_path: Path) -> None:
    text = tmp_path / "items.txt"
    questions = [f"{item['question']} {' '.join(item['choices'])}" for item in items()]
    text.write_text("\n\n".join(questions * 6))
    options = whit.RunOptions(calibration=str(text), samples=1, sequence_length=64, evaluate=False)
    whit.compress(STORIES, "rtn", tmp_path / "out", options=options)
    with pytest.raises(DataError, match="'endings' share"):
        whit.evaluate(tmp_path / "out", tasks=[str(TASK)])
    allowed = whit.evaluate(tmp_path / "out", tasks=[str(TASK)], options=whit.RunOptions(allow_leak=True))
    assert allowed.leak


@needs_harness
def test_a_model_that_is_no_language_model(tmp_path: Path) -> None:
    from tests.tiny import save_model

    folder = save_model("bert", tmp_path / "bert")
    for path in STORIES.glob("tokenizer*"):
        shutil.copyfile(path, folder / path.name)
    config = json.loads((folder / "config.json").read_text())
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(DataError, match="tasks need a tokenizer"):
        whit.evaluate(folder, tasks=[str(TASK)])
    assert config["model_type"] == "bert"
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    with harness._quiet(), pytest.raises(ModelError, match="causal language model, and Linear is none"):
        harness.run_tasks(torch.nn.Linear(2, 2), tokenizer, {}, limit=None, batch_size=1)


@needs_harness
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("task: x\nprocess_docs: !function utils.f\n", "runs Python code"),
        ("task: [", "is not YAML"),
        ("- a\n", "names no 'task'"),
        ("task: x\ninclude: other.yaml\n", "includes 'other.yaml'"),
        ("task: x\ndataset_path: json\n", "no data_files"),
        ("task: x\ndataset_path: json\ndataset_kwargs: {data_files: {test: [a]}}\n", "no paths"),
        ("task: x\ndataset_path: json\ndataset_kwargs: {data_files: {test: gone.jsonl}}\n", "'gone.jsonl', which does"),
        (
            "task: x\ndataset_path: json\ndataset_kwargs: {data_files: {test: bad.jsonl}}\ntest_split: test\n",
            "cannot be loaded",
        ),
    ],
)
def test_task_files_that_cannot_be_used(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{not json\n")
    path = tmp_path / "task.yaml"
    path.write_text(content)
    with pytest.raises(DataError, match=words) as caught:
        whit.evaluate(STORIES, tasks=[str(path)])
    assert "\n" not in str(caught.value)


@needs_harness
def test_tasks_that_are_missing_or_given_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="cannot read task file"):
        whit.evaluate(STORIES, tasks=[str(tmp_path / "gone.yaml")])
    with pytest.raises(KnobError, match="'endings' is asked for twice"):
        whit.evaluate(STORIES, tasks=[str(TASK), str(TASK)])
    with pytest.raises(KnobError, match="--tasks needs"):
        whit.evaluate(STORIES, tasks=[""])
    assert main(["evaluate", str(STORIES), "--tasks", str(TASK), "--limit", "2", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [metric["name"] for metric in shown["metrics"]] == ["endings/acc", "endings/acc_norm"]


@needs_harness
@pytest.mark.slow
def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(KnobError, match=r"no task 'helaswag' in lm-eval.*did you mean 'hellaswag'"):
        whit.evaluate(STORIES, tasks=["helaswag"])


def test_hellaswag_as_text_becomes_a_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    location = Path(__file__).parents[2] / "benchmarks" / "lm_eval" / "hellaswag.py"
    spec = importlib.util.spec_from_file_location("hellaswag_text", location)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    source = tmp_path / "some.txt"
    source.write_text("Cooking: A man cuts\n1\na car.\nan onion.\na song.\na day.\n" * 2)
    monkeypatch.setattr("sys.argv", ["hellaswag.py", str(source), str(tmp_path / "task")])
    assert module.main() == 0
    made = [json.loads(line) for line in (tmp_path / "task" / "hellaswag.jsonl").read_text().splitlines()]
    assert len(made) == 2
    assert made[0]["endings"][made[0]["label"]] == "an onion."
    if importlib.util.find_spec("lm_eval") is not None:
        record = whit.evaluate(STORIES, tasks=[str(tmp_path / "task" / "hellaswag.yaml")])
        assert [metric.name for metric in record.metrics] == ["hellaswag_text/acc", "hellaswag_text/acc_norm"]
    source.write_text("one\ntwo\n")
    assert module.main() == 1
