"""A run that is killed, or whose working folder is hurt, loses nothing: the same command ends with the same bytes."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import whit
from tests.pipeline.conftest import Case, Finished, Recorder
from whit.errors import OutputError
from whit.pipeline.journal import WORK_FOLDER, Journal
from whit.report.record import LayerRecord, Result

METHOD: dict[str, Any] = {"bits": 3}
Run = Callable[..., Finished]


@pytest.fixture(scope="module")
def whole(finished_run: Run) -> Finished:
    """The uninterrupted run that all others must equal."""
    return finished_run("llama", "gptq", **METHOD)


class Stopper(Recorder):
    """Raises KeyboardInterrupt when block number `last` is finished."""

    def __init__(self, last: int) -> None:
        super().__init__()
        self.last = last

    def block(self, index: int, total: int, name: str) -> None:
        super().block(index, total, name)
        if index == self.last:
            raise KeyboardInterrupt


def compress(case: Case, output: Path, listener: whit.Listener | None = None, **changes: Any) -> Result:
    method = changes.pop("method", "gptq")
    knobs = changes.pop("knobs", METHOD)
    options = dataclasses.replace(case.options, **changes)
    result = whit.compress(
        changes.get("model", case.model), method, output, options=options, listener=listener, **knobs
    )
    assert isinstance(result, Result)
    return result


def interrupt(case: Case, output: Path, last: int = 1) -> None:
    with pytest.raises(KeyboardInterrupt):
        compress(case, output, Stopper(last))


def assert_same_files(output: Path, whole: Finished) -> None:
    """Everything but the reports, which hold timings, is byte for byte that of the uninterrupted run."""
    reports = {"result.json", "README.md", "report.html"}
    names = {path.name for path in whole.output.iterdir()}
    assert {path.name for path in output.iterdir()} == names
    for name in names - reports:
        assert (output / name).read_bytes() == (whole.output / name).read_bytes(), name
    result = Result.load(output / "result.json")
    for mine, other in zip(result.layers, whole.result.layers, strict=True):
        assert dataclasses.replace(mine, seconds=0) == dataclasses.replace(other, seconds=0)
    assert result.size == whole.result.size


def shards(output: Path) -> list[Path]:
    return sorted((output / WORK_FOLDER).glob("unit-*.safetensors"))


@pytest.mark.parametrize("last", [0, 1, 2])
def test_interrupted_after_a_block(last: int, whole: Finished, tmp_path: Path) -> None:
    interrupt(whole.case, tmp_path / "out", last)
    kept = [path.read_bytes() for path in shards(tmp_path / "out")]
    assert len(kept) == last + 2  # and the embeddings
    recorder = Recorder()
    compress(whole.case, tmp_path / "out", recorder)
    assert recorder.plans[0].blocks_done == last + 1
    assert recorder.notes == []
    assert_same_files(tmp_path / "out", whole)


def test_interrupted_before_the_first_block(whole: Finished, tmp_path: Path) -> None:
    class Early(Recorder):
        def phase(self, name: str, total: int) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(whole.case, tmp_path / "out", Early())
    compress(whole.case, tmp_path / "out")
    assert_same_files(tmp_path / "out", whole)


@pytest.mark.parametrize("phase", ["saving", "evaluation"])
def test_interrupted_after_the_last_block(phase: str, whole: Finished, tmp_path: Path) -> None:
    class Late(Recorder):
        def step(self, description: str) -> None:
            super().step(description)
            if self.phases[-1][0] == phase:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(whole.case, tmp_path / "out", Late())
    listener = Recorder()
    compress(whole.case, tmp_path / "out", listener)
    assert "compression" not in [name for name, _ in listener.phases]
    assert_same_files(tmp_path / "out", whole)


@pytest.mark.parametrize("family", ["whisper", "albert", "gpt2"])
def test_other_families_continue_as_well(family: str, finished_run: Run, tmp_path: Path) -> None:
    whole = finished_run(family, "gptq", **METHOD)
    interrupt(whole.case, tmp_path / "out", 0)
    compress(whole.case, tmp_path / "out")
    assert_same_files(tmp_path / "out", whole)


SCRIPT = """
    import os, signal, sys
    import torch
    torch.set_num_threads(1)
    import whit

    class Killer(whit.Listener):
        def block(self, index, total, name):
            if index == 1:
                {action}

    options = whit.RunOptions(calibration={calibration!r}, evaluation={evaluation!r}, device="cpu")
    whit.compress({model!r}, "gptq", {output!r}, options=options, listener=Killer(), bits=3)
"""


def run_script(case: Case, output: Path, action: str, before: str = "") -> subprocess.CompletedProcess[str]:
    script = textwrap.dedent(SCRIPT).format(
        action=action,
        calibration=case.options.calibration,
        evaluation=case.options.evaluation,
        model=str(case.model),
        output=str(output),
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(before) + script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_killed_by_the_system(whole: Finished, tmp_path: Path) -> None:
    done = run_script(whole.case, tmp_path / "out", "os.kill(os.getpid(), signal.SIGKILL)")
    assert done.returncode == -signal.SIGKILL
    assert len(shards(tmp_path / "out")) == 3
    compress(whole.case, tmp_path / "out")
    assert_same_files(tmp_path / "out", whole)


def test_disk_full(whole: Finished, tmp_path: Path) -> None:
    """No file may grow beyond a limit: the shards fit, the final file does not."""
    limit = max(path.stat().st_size for path in whole.output.iterdir() if path.name == "model.safetensors") // 2
    before = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
    done = run_script(whole.case, tmp_path / "out", "pass", before)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("whit.errors.ResourceError")
    assert "File too large" in last
    assert "run the same command again, finished blocks are kept" in last
    assert len(shards(tmp_path / "out")) == 4
    assert not list((tmp_path / "out").rglob("*.partial"))
    listener = Recorder()
    compress(whole.case, tmp_path / "out", listener)
    assert listener.plans[0].blocks_done == 3
    assert_same_files(tmp_path / "out", whole)


def test_disk_full_while_a_shard_is_written(whole: Finished, tmp_path: Path) -> None:
    done = run_script(
        whole.case, tmp_path / "out", "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))", "import resource\n"
    )
    assert "whit.errors.ResourceError" in done.stderr
    assert len(shards(tmp_path / "out")) == 3
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    compress(whole.case, tmp_path / "out")
    assert_same_files(tmp_path / "out", whole)


def tear(output: Path) -> None:
    journal = output / WORK_FOLDER / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])


def tear_the_next(output: Path) -> None:
    with (output / WORK_FOLDER / "journal.jsonl").open("ab") as file:
        file.write(b'{"unit": "model.layers.2", "shard": "unit-00003.safe')


def spoil_a_line(output: Path) -> None:
    journal = output / WORK_FOLDER / "journal.jsonl"
    first, *rest = journal.read_text().splitlines(keepends=True)
    journal.write_text(first.replace('"layers": [', '"layers": [5, ', 1) + "".join(rest))


def corrupt(output: Path) -> None:
    shard = shards(output)[1]
    content = bytearray(shard.read_bytes())
    content[-10] ^= 1
    shard.write_bytes(bytes(content))


def truncate(output: Path) -> None:
    os.truncate(shards(output)[1], 1000)


def delete(output: Path) -> None:
    shards(output)[1].unlink()


def delete_embeddings(output: Path) -> None:
    shards(output)[0].unlink()


def leave_partial(output: Path) -> None:
    (output / WORK_FOLDER / "unit-00003.safetensors.partial").write_bytes(b"half")
    (output / "model.safetensors.partial").write_bytes(b"half")


@pytest.mark.parametrize(
    ("hurt", "left", "note"),
    [
        (tear, 1, None),
        (tear_the_next, 2, None),
        (spoil_a_line, 2, None),
        (corrupt, 1, "shard 'unit-00001.safetensors' of 'model.layers.0' is damaged: compressed again"),
        (truncate, 1, "shard 'unit-00001.safetensors' of 'model.layers.0' is damaged: compressed again"),
        (delete, 1, "shard 'unit-00001.safetensors' of 'model.layers.0' is missing: compressed again"),
        (delete_embeddings, 2, "shard 'unit-00000.safetensors' of 'the embeddings' is missing: compressed again"),
        (leave_partial, 2, None),
    ],
)
def test_a_hurt_working_folder_costs_only_what_was_hurt(
    hurt: Callable[[Path], None], left: int, note: str | None, whole: Finished, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    interrupt(whole.case, output)
    hurt(output)
    journal = Journal(output, json.loads((output / WORK_FOLDER / "run.json").read_text()))
    assert len([unit for unit in journal.units if unit]) == left
    journal.close()
    if note is not None:  # the damaged line is gone now; hurt a second run to see the note
        assert journal.notes == [note]
    compress(whole.case, output)
    assert_same_files(output, whole)


def test_damage_is_told(whole: Finished, tmp_path: Path) -> None:
    interrupt(whole.case, tmp_path / "out")
    corrupt(tmp_path / "out")
    listener = Recorder()
    compress(whole.case, tmp_path / "out", listener)
    assert [note for note in listener.notes if "damaged" in note]


def test_a_filled_hole_never_overwrites_another_shard(tmp_path: Path) -> None:
    import torch

    record = LayerRecord("a.x", "a", 1, 1, {}, {}, 4, 0.0, 0.0, 0.0)
    journal = Journal(tmp_path / "out", {"model": "x"})
    for number, unit in enumerate("abcd"):
        journal.write(unit, {f"{unit}.w": torch.tensor([float(number)])}, [record], 0.0)
    journal.close()
    shards(tmp_path / "out")[1].unlink()
    again = Journal(tmp_path / "out", {"model": "x"})
    assert set(again.units) == set("acd")
    again.write("b", {"b.w": torch.tensor([1.0])}, [record], 0.0)
    again.write("e", {"e.w": torch.tensor([4.0])}, [record], 0.0)
    again.close()
    last = Journal(tmp_path / "out", {"model": "x"})
    assert {unit: float(last.load(unit)[f"{unit}.w"]) for unit in last.units} == dict(
        zip("acdbe", (0, 2, 3, 1, 4), strict=True)
    )
    last.close()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "rtn"}, "another method"),
        ({"knobs": {"bits": 4}}, "another method"),
        ({"seed": 1, "samples": 4}, "another samples, seed"),
        ({"seed": 1}, "another seed (seed: 0, now 1)"),
        ({"embedding_bits": 4}, "another embedding_bits (embedding_bits: 8, now 4)"),
        ({"true_sequential": True}, "another true_sequential"),
        ({"skip": ("model.layers.0.*",)}, "another skip"),
        ({"dtype": "bfloat16"}, "another dtype"),
    ],
)
def test_journal_of_a_different_run(changes: dict[str, Any], words: str, interrupted: tuple[Case, Path]) -> None:
    case, output = interrupted
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    with pytest.raises(OutputError) as caught:
        compress(case, output, **changes)
    message = str(caught.value)
    assert "\n" not in message
    assert words in message
    assert "choose another directory with -o" in message
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


@pytest.fixture(scope="module")
def interrupted(whole: Finished, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Path]:
    output = tmp_path_factory.mktemp("interrupted") / "out"
    interrupt(whole.case, output)
    return whole.case, output


@pytest.mark.parametrize(
    ("key", "value"), [("whit", "0.0.1"), ("model", "0" * 64), ("torch", "1.0"), ("calibration", "x")]
)
def test_journal_of_another_version_or_model(key: str, value: str, whole: Finished, tmp_path: Path) -> None:
    interrupt(whole.case, tmp_path / "out", 0)
    run = tmp_path / "out" / WORK_FOLDER / "run.json"
    run.write_text(json.dumps({**json.loads(run.read_text()), key: value}))
    with pytest.raises(OutputError, match=f"holds an unfinished run with another {key} "):
        compress(whole.case, tmp_path / "out")


def test_damaged_description_of_the_run(whole: Finished, tmp_path: Path) -> None:
    interrupt(whole.case, tmp_path / "out", 0)
    (tmp_path / "out" / WORK_FOLDER / "run.json").write_text("{")
    with pytest.raises(OutputError, match=r"run\.json' is damaged: delete that folder to start again"):
        compress(whole.case, tmp_path / "out")


def test_directory_with_something_else(whole: Finished, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match=r"already holds thesis\.tex: choose another directory with -o"):
        compress(whole.case, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]
    with pytest.raises(OutputError, match="is a file: choose a directory with -o"):
        compress(whole.case, tmp_path / "out" / "thesis.tex")


def test_output_that_looks_like_an_option(whole: Finished) -> None:
    with pytest.raises(OutputError, match="'--help' looks like an option"):
        compress(whole.case, Path("--help"))


def test_empty_directory_is_used(whole: Finished, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    compress(whole.case, tmp_path / "out")
    assert_same_files(tmp_path / "out", whole)


def test_two_processes_in_one_directory(whole: Finished, interrupted: tuple[Case, Path]) -> None:
    case, output = interrupted
    holder = Journal(output, json.loads((output / WORK_FOLDER / "run.json").read_text()))
    try:
        with pytest.raises(OutputError, match="another whit process is working in"):
            compress(case, output)
    finally:
        holder.close()


def test_a_finished_run_is_not_repeated(whole: Finished) -> None:
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in whole.output.iterdir()}
    listener = Recorder()
    result = compress(whole.case, whole.output, listener)
    assert result == Result.load(whole.output / "result.json")
    assert (listener.plans, listener.phases) == ([], [])
    assert "nothing to do" in listener.notes[0]
    after = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in whole.output.iterdir()}
    assert after == before


def test_a_finished_run_with_other_evaluation_data_is_not_taken_for_this_one(whole: Finished) -> None:
    with pytest.raises(OutputError, match=r"measured on other data or not at all: measure it with whit evaluate"):
        compress(whole.case, whole.output, evaluation_windows=1)
    assert compress(whole.case, whole.output, evaluate=False) == Result.load(whole.output / "result.json")


def test_a_finished_run_of_another_method_is_kept(whole: Finished) -> None:
    with pytest.raises(OutputError, match="already holds"):
        compress(whole.case, whole.output, method="rtn")


def test_a_finished_run_whose_weights_are_gone_is_not_returned(whole: Finished, tmp_path: Path) -> None:
    compress(whole.case, tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").unlink()
    with pytest.raises(OutputError, match="already holds"):
        compress(whole.case, tmp_path / "out")


def test_a_crash_at_the_very_end_leaves_no_working_folder_for_ever(whole: Finished, tmp_path: Path) -> None:
    compress(whole.case, tmp_path / "out")
    identity = Result.load(tmp_path / "out" / "result.json").run["identity"]
    (tmp_path / "out" / WORK_FOLDER).mkdir()
    (tmp_path / "out" / WORK_FOLDER / "run.json").write_text(json.dumps(identity))
    compress(whole.case, tmp_path / "out")
    assert_same_files(tmp_path / "out", whole)


def test_dry_run_touches_nothing(whole: Finished, interrupted: tuple[Case, Path], tmp_path: Path) -> None:
    plan = whit.compress(whole.case.model, "gptq", tmp_path / "out", options=whole.case.options, dry_run=True, bits=3)
    assert isinstance(plan, whit.Plan)
    assert plan.blocks_done == 0
    assert list(tmp_path.iterdir()) == []
    case, output = interrupted
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in output.rglob("*") if path.is_file()}
    plan = whit.compress(case.model, "gptq", output, options=case.options, dry_run=True, bits=3)
    assert isinstance(plan, whit.Plan)
    assert plan.blocks_done == 2
    assert {
        path: (path.stat().st_mtime_ns, path.read_bytes()) for path in output.rglob("*") if path.is_file()
    } == before
