"""The plan and the checks before work, as functions of numbers; and what a listener hears."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import whit
from tests.pipeline.conftest import Case, Finished, Recorder, make_case
from tests.pipeline.needy import Budgeted, Sensitive
from whit.cli.tables import plan_view
from whit.errors import ResourceError, WhitError
from whit.methods import make_method
from whit.methods.base import Method
from whit.pipeline import estimate
from whit.pipeline import prepare as prepare_module
from whit.pipeline.checks import check_disk, check_memory, disk_bytes
from whit.pipeline.compress import merge_batches
from whit.pipeline.estimate import Probe, estimate_minutes, fit_probe
from whit.pipeline.plan import make_plan
from whit.pipeline.prepare import choose_device, compute_dtype, default_output, prepare
from whit.report.figures import group_reasons


def test_not_enough_disk_says_how_much() -> None:
    check_disk("out", 5_000_000, 5_000_000)
    with pytest.raises(
        ResourceError, match=r"'out' needs 5 MB of disk .*, 4 MB are free: .* choose another disk with -o"
    ):
        check_disk("out", 5_000_000, 4_999_999 - 500_000)
    assert disk_bytes(10**9) == 2_100_000_000 + (8 << 20)


def test_not_enough_memory_says_how_much() -> None:
    check_memory(10_000_000_000, 8_000_000_000)
    with pytest.raises(ResourceError, match=r"needs about 10\.0 GB of memory, 7\.9 GB are available: lower --samples"):
        check_memory(10_000_000_000, 7_900_000_000)


def test_probe_separates_what_grows_with_rows_from_what_does_not() -> None:
    assert fit_probe(64, (32, 1.0), (96, 2.0)) == Probe(64, 0.5, 1 / 64)
    assert fit_probe(64, (32, 1.0), (96, 2.0)).seconds(96, 128) == pytest.approx(4.0)
    launch_bound = fit_probe(64, (32, 1.1), (96, 1.0))  # noise: more rows were faster
    assert launch_bound.seconds(96, 64) == pytest.approx(1.0)
    assert launch_bound.seconds(96_000, 64) == pytest.approx(1.0)
    assert fit_probe(64, (32, 0.1), (96, 3.0)).fixed == 0.0


def test_a_cpu_compiles_beforehand_what_methods_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the weight files are read; each method once, on a matrix that is soon done."""
    seen = []
    monkeypatch.setattr(estimate, "_time", lambda method, rows, columns, device: seen.append((method.name, columns)))
    methods = [make_method("gptq"), make_method("billm"), make_method("gptq")]
    estimate.load_kernels(methods, torch.device("cpu"))
    assert [name for name, _ in seen] == ["gptq", "billm"]
    assert all(columns < estimate.PROBE_COLUMNS for _, columns in seen)


@pytest.mark.parametrize("wrong", ["model", "calibration", "evaluation", "skip", None])
def test_a_cpu_loads_no_kernels_before_what_is_asked_for_is_found(
    wrong: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiling takes seconds, which whoever mistyped a name would wait for."""
    case = make_case("llama", tmp_path)
    loaded = []
    monkeypatch.setattr(prepare_module, "load_kernels", lambda methods, device: loaded.append(list(methods)))
    changed = (
        {"skip": ("*",)} if wrong == "skip" else {wrong: "nowhere"} if wrong in ("calibration", "evaluation") else {}
    )
    options = dataclasses.replace(case.options, **changed)
    arguments = (
        tmp_path / "nowhere" if wrong == "model" else case.model,
        make_method("rtn", {}),
        tmp_path / "out",
        options,
    )
    if wrong is None:
        prepare(*arguments)
        assert [[method.name for method in methods] for methods in loaded] == [["rtn"]]
        return
    with pytest.raises(WhitError, match=r"nowhere|skip"):
        prepare(*arguments)
    assert not loaded


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose speed does not depend on what else it does."""
    monkeypatch.setattr(estimate, "_time", lambda method, rows, columns, device: 1e-9 * rows * columns)
    monkeypatch.setattr(estimate, "_product_rate", lambda device, dtype: 1e11)


@pytest.mark.usefixtures("steady")
def test_minutes_grow_with_the_work_and_shrink_with_what_is_done(tmp_path: Path) -> None:
    case = make_case("llama", tmp_path)
    job = prepare(case.model, make_method("rtn", {}), tmp_path / "out", case.options)
    fields = {"tokens": 10**6, "block_parameters": 10**9, "device": torch.device("cpu"), "compute_dtype": torch.float32}
    idle = estimate_minutes(job.assignment, evaluated=0, **fields)
    assert 0 < idle < 0.1  # round to nearest needs no forward pass, however many tokens there are
    assert estimate_minutes(job.assignment, evaluated=10**15, **fields) > 10 * idle
    job = prepare(case.model, make_method("gptq", {}), tmp_path / "out", case.options)
    whole = estimate_minutes(job.assignment, evaluated=0, **fields)
    assert whole > 10 * idle
    assert estimate_minutes(job.assignment, evaluated=0, left=0.0, **fields) < 0.8 * whole


@pytest.mark.usefixtures("steady")
def test_minutes_count_the_passes_until_they_are_done(tmp_path: Path) -> None:
    case = make_case("llama", tmp_path)
    fields = {"tokens": 10**6, "block_parameters": 10**9, "device": torch.device("cpu"), "compute_dtype": torch.float32}

    def minutes(method: Method, left: float) -> float:
        assignment = prepare(case.model, method, tmp_path / "out", case.options).assignment
        return estimate_minutes(assignment, evaluated=0, left=left, **fields)  # type: ignore[arg-type]

    assert minutes(Sensitive(), 1.0) > 2 * minutes(Sensitive(), 0.99)
    assert minutes(Budgeted(), 1.0) > 10 * minutes(Budgeted(), 0.99)  # rounding itself needs no forward pass


def test_plan_accounts_for_every_parameter(finished_run_of_gpt2: Finished) -> None:
    plan, result = finished_run_of_gpt2.plan, finished_run_of_gpt2.result
    named = {layer.name for layer in plan.layers}
    assert result.untouched == plan.untouched
    model = whit.load(finished_run_of_gpt2.output)
    for name, _ in model.named_parameters():
        module = name.rpartition(".")[0]
        assert name in plan.untouched or module in plan.untouched or module in named, name
    reasons = {reason.text: len(reason.names) for reason in group_reasons(plan.untouched)}
    assert reasons["a bias, not a matrix"] == 2 * 6 + 1
    assert reasons["a vector (norms, scales), not a matrix"] == 2 * 2 + 1
    assert reasons["embedding outside the repeated blocks"] == 1
    assert plan_view(plan) is not None


@pytest.fixture
def finished_run_of_gpt2(finished_run) -> Finished:  # type: ignore[no-untyped-def]
    run: Finished = finished_run("gpt2", "billm")
    return run


def test_listener_hears_notes_once_and_every_window(finished_run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    case: Case = finished_run("llama", "billm").case
    listener = Recorder()
    whit.compress(case.model, "rtn", tmp_path / "out", options=case.options, listener=listener)
    assert listener.notes == []
    assert listener.phases[-1] == ("evaluation", 4)
    steps = listener.steps[-4:]
    assert steps == ["window 1/2", "window 2/2", "sample of the compressed model", "sample of the original"]
    assert listener.blocks == [f"model.layers.{index}" for index in range(3)]


def test_notes_of_the_model_are_in_the_plan_only(tmp_path: Path) -> None:
    case = make_case("llama", tmp_path)
    job = prepare(case.model, make_method("rtn", {}), tmp_path / "out", case.options)
    job.reference.notes.append("read this")
    assert make_plan(job).notes == ["read this"]


def test_timings_are_phases_that_add_up(finished_run) -> None:  # type: ignore[no-untyped-def]
    timings = finished_run("llama", "billm").result.timings
    assert set(timings) == {"compression", "saving", "evaluation", "total"}
    assert timings["total"] > timings["compression"] + timings["saving"] + timings["evaluation"]


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: mit\ntags: [x]\n---\n# Model\n", "mit"),
        ("---\r\nlicense: 'apache-2.0'  # spdx\r\n---\r\n", "apache-2.0"),
        ("---\nlicense: other\nlicense_name: tiny-terms\n---\n", "tiny-terms"),
        ("# Model\nlicense: mit\n", None),
        ("---\ntags: [x]\n---\n", None),
        (None, None),
    ],
)
def test_license_is_passed_on(card: str | None, expected: str | None, tmp_path: Path) -> None:
    case = make_case("llama", tmp_path, evaluate=False)
    if card is not None:
        (case.model / "README.md").write_bytes(card.encode())
    result = whit.compress(case.model, "rtn", tmp_path / "out", options=case.options)
    assert isinstance(result, whit.Result)
    assert result.model["license"] == expected
    front = (tmp_path / "out" / "README.md").read_text().split("---")[1]
    assert (f'license: "{expected}"' in front) == (expected is not None)


def test_batches_of_equal_shape_are_joined_up_to_the_size() -> None:
    one, other = {"x": torch.zeros(1, 3)}, {"x": torch.zeros(1, 4)}
    merged = merge_batches([one, one, one, other, one], 2)
    assert [tuple(batch["x"].shape) for batch in merged] == [(2, 3), (1, 3), (1, 4), (1, 3)]


def test_batch_size_changes_nothing_but_speed(tmp_path: Path) -> None:
    case = make_case("llama", tmp_path, evaluate=False)
    errors = []
    for size in (1, 4):
        options = whit.RunOptions(**{**vars(case.options), "batch_size": size})
        result = whit.compress(case.model, "gptq", tmp_path / str(size), options=options)
        assert isinstance(result, whit.Result)
        errors.append([layer.error for layer in result.layers])
    assert errors[0] == pytest.approx(errors[1], rel=0.05)


def test_defaults() -> None:
    assert default_output("models/Tiny.gguf", "rtn") == Path("whit-output/Tiny-rtn")
    assert compute_dtype("auto", torch.bfloat16, torch.device("cpu")) == torch.float32
    assert compute_dtype("auto", torch.bfloat16, torch.device("cuda")) == torch.bfloat16
    assert compute_dtype("float16", torch.bfloat16, torch.device("cpu")) == torch.float16
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(whit.WhitError, match=r"--device 'abacus' cannot be used here .*; try --device cpu"):
        choose_device("abacus")
