"""The command line, driven with a stand-in for the Python API: what is shown, where, and with which exit code."""

from __future__ import annotations

import errno
import inspect
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from tests.report.example import example_evaluations, example_plan, example_result
from whit import errors
from whit.cli import main
from whit.cli.commands import build, output_directory
from whit.cli.options import RECIPE, RUN_HELP, explain_unknown, requested_method
from whit.cli.tables import tuned_view
from whit.errors import KnobError
from whit.kernels.tuning import TunedProduct
from whit.methods.base import available_methods, knobs
from whit.pipeline.events import Listener, Plan
from whit.pipeline.options import RunOptions
from whit.report.record import EvaluationRecord, ExportRecord, Result
from whit.report.write import write_reports

BLOCKS = 2
RTN = ["compress", "some/model", "--method", "rtn"]


class FakeEngine:
    """Plays a run of two blocks; raises `failure` in the middle if there is one."""

    def __init__(self, failure: BaseException | None = None) -> None:
        self.failure = failure
        self.calls: list[dict[str, Any]] = []

    def compress(
        self,
        model: str | None = None,
        method: str = "billm",
        output: Path | None = None,
        *,
        options: RunOptions | None = None,
        listener: Listener | None = None,
        dry_run: bool = False,
        **knobs: Any,
    ) -> Result | Plan:
        call = {"model": model, "method": method, "output": output, "options": options, "knobs": knobs}
        self.calls.append(call)
        listener = listener or Listener()
        result, plan = example_result(BLOCKS), example_plan(BLOCKS)
        if dry_run:
            return plan
        for note in plan.notes:
            listener.note(note)
        listener.planned(plan)
        listener.phase("calibration", 1)
        listener.step("batch 1/1")
        listener.note("damping raised")
        listener.phase("compression", len(result.layers))
        for index in range(BLOCKS):
            name = f"model.layers.{index}"
            for layer in result.layers:
                if layer.block == name:
                    listener.layer(layer)
            if self.failure is not None:
                raise self.failure
            listener.block(index, BLOCKS, name)
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
            write_reports(output, result)
        return result

    def evaluate(
        self,
        model: str,
        *,
        against: str | None = None,
        options: RunOptions | None = None,
        tasks: Sequence[str] | None = None,
        limit: int | None = None,
    ) -> EvaluationRecord:
        call = {"model": model, "against": against, "options": options, "tasks": tasks, "limit": limit}
        self.calls.append(call)
        return example_evaluations()[1]

    def export(self, directory: Path, target: str, output: Path, *, prefer: str | None = None) -> ExportRecord:
        self.calls.append({"directory": directory, "target": target, "output": output, "prefer": prefer})
        return ExportRecord(target, str(output), {"Q4_0": 14, "Q8_0": 1}, 1000, 1200, ["became [larger]"])

    def generate(
        self,
        directory: str,
        prompt: str,
        *,
        new_tokens: int = 64,
        dtype: torch.dtype | None = None,
        device: str = "auto",
    ) -> str:
        call = {"directory": directory, "prompt": prompt, "new_tokens": new_tokens, "dtype": dtype, "device": device}
        self.calls.append(call)
        return " and so on"

    def tune(
        self,
        directory: Path,
        *,
        vectors: Sequence[int] = (1, 16),
        dtype: torch.dtype | None = None,
        device: str = "auto",
    ) -> Iterator[TunedProduct]:
        self.calls.append({"directory": directory, "vectors": vectors, "dtype": dtype, "device": device})
        layout = {"format": "level-table", "bits": 2, "group_size": 128}
        for count in vectors:
            yield TunedProduct(layout, 64, 128, count, "few", "many", 2e-5, 1e-5, 7)


def help_text(arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "240")
    assert main([*arguments, "--help"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("method", sorted(available_methods()))
def test_every_run_option_and_knob_is_an_option_in_the_help(
    method: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = help_text(["compress", "--method", method], capsys, monkeypatch)
    shown = set(re.findall(r"--[a-z0-9-]+", text))
    expected = {field.name for field in fields(RunOptions)} | {item.name for item in knobs(available_methods()[method])}
    assert {"--" + name.replace("_", "-") for name in expected} <= shown
    assert f"Knobs of {method}" in text


@pytest.mark.parametrize("command", ["compress", "evaluate", "export", "generate", "inspect", "methods", "tune"])
def test_the_help_shows_exactly_the_options_that_the_parser_knows(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [command, "--method", "rtn"] if command == "compress" else [command]
    shown = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", help_text(arguments, capsys, monkeypatch)))
    parser = typer.main.get_command(build(arguments)).commands[command]
    known = {name for item in parser.params for name in (*item.opts, *item.secondary_opts) if name.startswith("--")}
    assert shown - {"--help"} == known


def test_every_option_in_the_documentation_exists(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(__file__).parents[1]
    pages = [root / "README.md", root / "docs" / "cli.md", root / "docs" / "guide.md"]
    lines = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    documented = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", lines))
    known = {"--version", "--no-deps"}
    for command in ("evaluate", "export", "generate", "inspect", "methods", "tune"):
        known |= set(re.findall(r"--[a-z0-9-]+", help_text([command], capsys, monkeypatch)))
    for method in available_methods():
        known |= set(re.findall(r"--[a-z0-9-]+", help_text(["compress", "--method", method], capsys, monkeypatch)))
    assert documented <= known, documented - known


def test_help_texts_cover_exactly_the_run_options() -> None:
    assert set(RUN_HELP) == {field.name for field in fields(RunOptions)}


def test_no_knob_hides_an_option_of_the_command() -> None:
    reserved = {field.name for field in fields(RunOptions)} | {"model", "method", "output", "dry_run", "listener"}
    reserved |= {"options", "as_json", "quiet", "debug", "help"}
    for name, cls in available_methods().items():
        assert not reserved & {item.name for item in knobs(cls)}, name


def test_options_and_knobs_reach_the_engine_with_their_types() -> None:
    engine = FakeEngine()
    arguments = [*RTN, "-o", "out", "--bits", "3", "--symmetric", "--samples", "7", "--skip", "a.*", "--skip", "b"]
    assert main([*arguments, "--no-evaluate", "--dtype", "float32", "--dry-run", "--quiet"], engine) == 0
    call = engine.calls[0]
    assert (call["model"], call["method"], call["output"]) == ("some/model", "rtn", Path("out"))
    assert call["knobs"] == {"bits": 3, "symmetric": True, "group_size": 128, "clip_steps": 0}
    assert call["options"] == RunOptions(samples=7, skip=("a.*", "b"), evaluate=False, dtype="float32")


def test_defaults_of_the_command_line_are_those_of_python() -> None:
    engine = FakeEngine()
    assert main(["compress", "--method", "rtn", "--dry-run", "--quiet"], engine) == 0
    call = engine.calls[0]
    assert call["options"] == RunOptions()
    assert call["knobs"] == {item.name: item.default for item in knobs(available_methods()["rtn"])}
    assert call["output"] == Path("whit-output/smollm2-135m-rtn")


def test_default_output_is_named_after_model_and_method(tmp_path: Path) -> None:
    (tmp_path / "Tiny.Q4_1.gguf").touch()
    (tmp_path / "folder").mkdir()
    assert output_directory(None, "billm") == Path("whit-output/smollm2-135m-billm")
    assert output_directory("org/name", "gptq") == Path("whit-output/name-gptq")
    assert output_directory(str(tmp_path / "Tiny.Q4_1.gguf"), "rtn") == Path("whit-output/Tiny.Q4_1-rtn")
    assert output_directory(f"{tmp_path / 'folder'}/", "rtn") == Path("whit-output/folder-rtn")


def test_the_last_method_on_the_line_counts() -> None:
    assert requested_method(["compress"]) == "billm"
    assert requested_method(["compress", "-m", "a", "--method=b"]) == "b"
    assert requested_method(["compress", "--", "--method", "a"]) == "billm"


def test_plain_lines_when_output_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RTN, "-o", str(tmp_path / "out")], FakeEngine()) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\r" not in out
    assert "14 layers in 2 blocks -> billm" in out
    assert "1 weight: tied to model.embed_tokens.weight" in out
    assert "  model.layers.0.self_attn.q_proj: 2.710 bits, error " in out
    assert re.search(r"^block 1/2 model\.layers\.0: mean error 0\.\d+, about .* left$", out, re.M)
    assert re.search(r"^block 2/2 model\.layers\.1: mean error 0\.\d+$", out, re.M)
    assert "note: damping raised" in out
    assert "JasxFAAA" not in out
    assert out.count("the source lies on a Q4_1 grid") == 1
    assert "131.4 [113.9, 152.6]" in out
    assert out.index("Plan") < out.index("block 1/2") < out.index("perplexity")


def test_dry_run_shows_the_plan_once_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RTN, "-o", str(tmp_path / "out"), "--dry-run"], FakeEngine()) == 0
    out = capsys.readouterr().out
    assert out.count("peak memory") == 1
    assert not (tmp_path / "out").exists()


def test_json_is_one_event_per_line_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RTN, "-o", str(tmp_path / "out"), "--json"], FakeEngine()) == 0
    captured = capsys.readouterr()
    events = [json.loads(line) for line in captured.out.splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds[:2] == ["note", "plan"]
    assert kinds[-1] == "result"
    assert kinds.count("layer") == 14
    assert kinds.count("block") == BLOCKS
    assert set(kinds) == {"plan", "phase", "note", "layer", "block", "result"}
    last = {key: value for key, value in events[-1].items() if key not in ("event", "directory")}
    assert Result.from_json(last) == example_result(BLOCKS)
    assert captured.err == ""


def test_quiet_prints_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RTN, "-o", str(tmp_path / "out"), "--quiet"], FakeEngine()) == 0
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""
    assert (tmp_path / "out" / "report.html").is_file()


def error_classes() -> list[type[errors.WhitError]]:
    found = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, errors.WhitError)]
    return sorted(found, key=lambda cls: cls.exit_code)


@pytest.mark.parametrize("cls", error_classes())
def test_errors_of_whit_are_one_line_with_their_own_code(
    cls: type[errors.WhitError], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main([*RTN, "-o", str(tmp_path / "out")], FakeEngine(cls("'x' is wrong:\n try y")))
    assert code == cls.exit_code
    assert capsys.readouterr().err == "error: 'x' is wrong: try y\n"


@pytest.mark.parametrize(
    ("failure", "code", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "big.file"), 6, "no space left on the disk"),
        (MemoryError(), 6, "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), 6, "out of memory (CUDA out of memory. Tried)"),
        (ModuleNotFoundError("No module named 'gguf'", name="gguf"), 7, "package 'gguf' cannot be imported"),
        (PermissionError(errno.EACCES, "Permission denied", "locked"), 1, "Permission denied: 'locked'"),
        (RuntimeError("odd\nsecond line"), 1, "RuntimeError: odd (run again with --debug for the traceback)"),
    ],
)
def test_other_failures_are_one_line_too(
    failure: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*RTN, "-o", "out", "--quiet"], FakeEngine(failure)) == code
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


def test_debug_adds_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RTN, "-o", "out", "--quiet", "--debug"], FakeEngine(RuntimeError("odd"))) == 1
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert err.splitlines()[-1].startswith("error: RuntimeError: odd")


def test_interruption_has_the_shell_s_code_and_says_how_to_continue(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RTN, "-o", "out", "--quiet"], FakeEngine(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "interrupted: run the same command again to continue\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*RTN, "--bit", "3"], "no option '--bit'; did you mean '--bits'?"),
        ([*RTN, "--sample", "3"], "no option '--sample'; did you mean '--samples'?"),
        ([*RTN, "--bits", "many"], "invalid value for '--bits'"),
        ([*RTN, "--dtype", "int3"], "dtype is one of auto, float32, bfloat16, float16, got 'int3'"),
        ([*RTN, "--samples", "0"], "samples must be a whole number of at least 1, got 0"),
        (["compress", "--method", "rtm"], "unknown method 'rtm'; did you mean 'rtn'?"),
        (["methods", "rtm"], "unknown method 'rtm'; did you mean 'rtn'?"),
        (["evaluate"], "missing argument 'MODEL'"),
        (["generate", "dir", "hello", "--new-token", "3"], "no option '--new-token'; did you mean '--new-tokens'?"),
        (["compres"], "no such command 'compres'"),
    ],
)
def test_usage_errors_have_code_2_and_name_the_remedy(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = FakeEngine()
    assert main(arguments, engine) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
    assert engine.calls == []


def test_a_knob_of_another_method_says_whose_it_is() -> None:
    text = explain_unknown("--no-symmetric", ["--samples"], "billm")
    assert "'--no-symmetric' is a knob of" in text
    assert "rtn" in text
    assert "not of billm: add --method" in text
    assert "write it into its step" in explain_unknown("--bits", ["--device"], RECIPE)
    assert explain_unknown("--bits", ["--device"], None) == "no option '--bits' (--help lists the options)"


def test_a_knob_of_another_method_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    own = {item.name for item in knobs(available_methods()["rtn"])}
    other, foreign = next(
        (name, item.name) for name, cls in available_methods().items() for item in knobs(cls) if item.name not in own
    )
    option = "--" + foreign.replace("_", "-")
    engine = FakeEngine()
    assert main([*RTN, option, "1"], engine) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: option {option!r} is a knob of ")
    assert other in err
    assert engine.calls == []


def test_evaluate_shows_metrics_with_intervals(capsys: pytest.CaptureFixture[str]) -> None:
    engine = FakeEngine()
    assert main(["evaluate", "dir", "--against", "original", "--evaluation-windows", "3"], engine) == 0
    call = {"model": "dir", "against": "original", "options": RunOptions(evaluation_windows=3)}
    assert engine.calls[0] == call | {"tasks": None, "limit": None}
    out = capsys.readouterr().out
    assert "131.4 [113.9, 152.6]" in out
    assert "wikitext2-test" in out
    assert main(["evaluate", "dir", "--json"], engine) == 0
    assert json.loads(capsys.readouterr().out)["metrics"][0]["name"] == "perplexity"


def test_tasks_are_separated_by_commas() -> None:
    engine = FakeEngine()
    assert main(["evaluate", "dir", "--tasks", "hellaswag, my/task.yaml", "--limit", "7", "--quiet"], engine) == 0
    assert (engine.calls[0]["tasks"], engine.calls[0]["limit"]) == (["hellaswag", "my/task.yaml"], 7)


def test_export_shows_the_record(capsys: pytest.CaptureFixture[str]) -> None:
    engine = FakeEngine()
    arguments = ["export", "dir", "--to", "gguf", "-o", "x.gguf"]
    assert main(arguments, engine) == 0
    call = {"directory": Path("dir"), "target": "gguf", "output": Path("x.gguf"), "prefer": None}
    assert engine.calls[0] == call
    out = capsys.readouterr().out
    assert "14 weights as Q4_0, 1 weight as Q8_0" in out
    assert "1.00 kB -> 1.20 kB" in out
    assert "became [larger]" in out
    assert main([*arguments, "--json"], engine) == 0
    assert json.loads(capsys.readouterr().out)["stored"] == {"Q4_0": 14, "Q8_0": 1}


def test_generate_prints_prompt_and_continuation_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "dir", "Once", "--new-tokens", "5"], FakeEngine()) == 0
    assert capsys.readouterr().out == "Once and so on\n"


@pytest.mark.parametrize("command", [["generate", "dir", "Once"], ["tune", "dir"]])
def test_the_dtype_is_one_of_those_there_are(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    engine = FakeEngine()
    assert main([*command, "--dtype", "float16"], engine) == 0
    assert engine.calls[0]["dtype"] is torch.float16
    assert main([*command, "--dtype", "half"], engine) == KnobError.exit_code
    assert "--dtype is one of auto, float32, bfloat16, float16, got 'half'" in capsys.readouterr().err


def test_tuned_weights_of_one_launch_are_named_each() -> None:
    layout = {"format": "level-table", "bits": 2, "group_size": 128}
    product = TunedProduct(layout, 96, 128, 1, "few", "few", 2e-5, 1e-5, 7, (64, 16, 16))
    assert str(tuned_view(product)).startswith("64+16+16x128 level-table")


def test_tune_shows_each_product_as_it_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    engine = FakeEngine()
    assert main(["tune", "dir", "--vectors", "1, 16"], engine) == 0
    assert engine.calls == [{"directory": Path("dir"), "vectors": [1, 16], "dtype": None, "device": "auto"}]
    first, second = capsys.readouterr().out.strip().split("\n")
    assert first.startswith("64x128 level-table")
    assert "1 vector: 20.0 -> 10.0 µs of 7 tried, few -> many" in first
    assert "16 vectors" in second
    assert main(["tune", "dir", "--json"], engine) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["vectors"] for line in lines] == [1, 16]


@pytest.mark.parametrize("vectors", ["0", "1,two", "", "-3"])
def test_tune_refuses_what_is_no_number_of_vectors(vectors: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "dir", f"--vectors={vectors}"], FakeEngine()) == KnobError.exit_code
    assert "is no whole number of at least 1" in capsys.readouterr().err


def test_methods_lists_every_method_and_every_knob(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in available_methods())
    for name, cls in available_methods().items():
        assert main(["methods", name, "--json"]) == 0
        data = json.loads(capsys.readouterr().out)[name]
        assert [item["name"] for item in data["knobs"]] == [item.name for item in knobs(cls)]


def test_version_and_bare_call(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert re.fullmatch(r"whit \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)
    assert main([]) == 0
    assert "compress" in capsys.readouterr().out


def test_building_the_parser_for_other_commands_needs_no_method() -> None:
    assert build(["methods"]).registered_commands
    with pytest.raises(errors.KnobError, match="unknown method 'nothing'"):
        build(["compress", "--method", "nothing"])
