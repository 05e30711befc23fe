"""Several processes give the very bytes of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.pipeline.conftest import make_case
from whit.cli import main
from whit.errors import WhitError
from whit.methods.statistics import Statistic
from whit.pipeline.gather import InputAccumulator
from whit.pipeline.ranks import ALONE, Ranks, spread
from whit.pipeline.relay import Relay

SCRIPT = """
import dataclasses, os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import whit
from whit.errors import KnobError

folder, out = Path(sys.argv[1]), Path(sys.argv[2])
together = "RANK" in os.environ
CASES = [("llama", "billm", {}), ("whisper", "gptq", {"bits": 3}), ("llama", "wanda", {"allocation": "owl"}),
         ("gpt2", "llm-int8", {}), ("albert", "rtn", {})]

class Stopper(whit.Listener):
    def block(self, index, total, name):
        raise KeyboardInterrupt

def options(family, **changes):
    data = str(folder / family / "calibration.safetensors")
    return whit.RunOptions(calibration=data, evaluate=False, device="cpu", **changes)

for family, method, knobs in CASES:
    chosen = options(family, batch_size=2)
    result = whit.compress(folder / family / "model", method, out / method, options=chosen, **knobs)
    assert len(result.layers) > 3
    again = whit.compress(folder / family / "model", method, out / method, options=chosen, **knobs)
    assert again.to_json() == result.to_json()  # it is finished: nobody does anything
if together:
    whit.compress(folder / "llama" / "model", "stbllm", out.parent / "half", options=options("llama"))
    try:
        whit.compress(folder / "llama" / "model", "gptq", out / "few", options=options("llama", batch_size=99))
    except KnobError as error:
        (out.parent / f"refused-{os.environ['RANK']}").write_text(str(error))  # lines of two processes may mix
else:
    whit.compress(folder / "llama" / "model", "stbllm", out / "stbllm", options=options("llama"))
    try:
        chosen = options("llama")
        whit.compress(folder / "llama" / "model", "stbllm", out.parent / "half", options=chosen, listener=Stopper())
    except KeyboardInterrupt:
        print("INTERRUPTED")
"""


FAILING = """
import os, sys
from pathlib import Path
from unittest import mock
import torch
torch.set_num_threads(1)
import whit
from whit.errors import WhitError
from whit.pipeline import engine, gather, layer, relay, team

folder, rank = Path(sys.argv[1]), os.environ["RANK"]
options = whit.RunOptions(calibration=str(folder / "calibration.safetensors"), evaluate=False, device="cpu",
                          batch_size=2)
said = []

def fail(*arguments, **keywords):
    raise RuntimeError("out of memory")

PLACES = [(engine, "materialise_outside"), (engine, "materialise"), (engine, "propagate"), (engine, "compress_block"),
          (engine, "release"), (gather.InputAccumulator, "update"), (gather.InputAccumulator, "restore"),
          (relay.Relay, "finish"), (relay.Relay, "_empty"), (team, "compress_layer"), (team, "adopt"),
          (team, "format_from_json")]
for number, (owner, name) in enumerate(PLACES):
    for failing in ("0", "1"):
        with mock.patch.object(owner, name, fail if rank == failing else getattr(owner, name)):
            try:
                whit.compress(folder / "model", "gptq", folder / f"out{number}-{failing}", options=options)
                said.append(f"{owner.__name__}.{name} {failing} went well")
            except (RuntimeError, WhitError) as error:
                said.append(f"{owner.__name__}.{name} {failing}: {error}")
result = whit.compress(folder / "model", "gptq", folder / "good", options=options)
said.append(str(len(result.layers)))
(folder / f"said-{rank}").write_text("\\n".join(said))
"""


def start(launcher: list[str], arguments: list[str]) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[:3000]
    return done.stdout


def test_two_processes_write_the_bytes_of_one(tmp_path: Path) -> None:
    for family in ("llama", "whisper", "gpt2", "albert"):
        make_case(family, tmp_path / family)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    assert "INTERRUPTED" in start([], [str(script), str(tmp_path), str(tmp_path / "one")])
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    start(launcher, [str(script), str(tmp_path), str(tmp_path / "two")])
    refused = [(tmp_path / f"refused-{rank}").read_text() for rank in (0, 1)]
    assert all("1 calibration batches cannot be shared among 2 processes" in text for text in refused)
    (tmp_path / "half").rename(tmp_path / "two" / "stbllm")  # begun by one process, finished by two
    compared = 0
    for path in sorted((tmp_path / "one").rglob("*")):
        if path.suffix in (".safetensors", ".json") and path.name != "result.json":
            assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes(), path
            compared += 1
    assert compared >= 12


def test_an_error_in_one_process_is_raised_in_both_and_they_go_on(tmp_path: Path) -> None:
    make_case("llama", tmp_path)
    script = tmp_path / "script.py"
    script.write_text(FAILING)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    start(launcher, [str(script), str(tmp_path)])
    for rank in (0, 1):
        *said, last = (tmp_path / f"said-{rank}").read_text().splitlines()
        wanted = ["out of memory", f"process {1 - rank} of 2 failed: out of memory"]
        assert [line.partition(": ")[2] for line in said] == (wanted if rank == 0 else wanted[::-1]) * 12
        assert last == "23"


def test_only_the_first_process_shows_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = make_case("gpt2", tmp_path)
    command = ["compress", str(case.model), "--method", "rtn", "--calibration", str(case.options.calibration)]
    command += ["--no-evaluate", "--device", "cpu", "--dry-run", "-o", str(tmp_path / "out")]
    shown = []
    for rank in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
        monkeypatch.setenv("RANK", rank)
        capsys.readouterr()
        assert main(command) == 0
        shown.append(capsys.readouterr().out)
    assert "rtn" in shown[0] and shown[1] == ""


def test_the_dearest_work_goes_to_whom_has_least() -> None:
    assert spread([1, 9, 5, 5], 2) == [0, 0, 1, 1]
    assert spread([], 3) == []
    assert spread([3, 3, 3], 1) == [0, 0, 0]


def test_alone_there_is_nobody_to_tell() -> None:
    tensor = torch.arange(3)
    ALONE.broadcast(tensor, 0)
    assert ALONE.gather({"a": 1}) == [{"a": 1}] and tensor.tolist() == [0, 1, 2] and ALONE.first
    with pytest.raises(ZeroDivisionError), ALONE.together():
        raise ZeroDivisionError


def test_losing_touch_points_at_the_process_that_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*arguments: object) -> None:
        raise RuntimeError("Connection reset by peer")

    for name in ("all_gather", "broadcast"):
        monkeypatch.setattr(torch.distributed, name, gone)
    ranks = Ranks(0, 2)
    for talk in (lambda: ranks.gather(1), lambda: ranks.broadcast(torch.ones(3), 1)):
        with pytest.raises(WhitError, match=r"process 0 of 2 lost touch .* run the same command again"):
            talk()


NEEDS = frozenset({Statistic.SECOND_MOMENT, Statistic.SQUARE_SUMS, Statistic.RANGE, Statistic.SAMPLE})


@pytest.mark.parametrize("silent", [False, True], ids=["both", "second-only"])
def test_the_second_process_goes_on_where_the_first_one_stopped(monkeypatch: pytest.MonkeyPatch, silent: bool) -> None:
    """What the second of two processes does, with the first one's messages by hand: the bits are those of one."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 9, 300, generator=generator) for _ in range(4)]
    alone, first, second = (InputAccumulator(300, NEEDS, 4) for _ in range(3))
    for x in inputs[2:] if silent else inputs:
        alone.update(x)
    for x in [] if silent else inputs[:2]:
        first.update(x)
    numbers, tensors = first.state()
    sent = [tensor.clone() for tensor in tensors]
    told = [[numbers, [[list(t.shape), str(t.dtype).removeprefix("torch.")] for t in tensors]]]
    monkeypatch.setattr(Ranks, "gather", lambda self, value: [told, value])
    monkeypatch.setattr(Ranks, "broadcast", lambda self, t, source: t.copy_(sent.pop(0)) if source == 0 else None)
    relay = Relay(Ranks(1, 2))
    relay.connect([second])
    for x in inputs[2:]:
        given = x.clone()
        relay.record(0, given, 1)
        given.zero_()  # what a block does to its inputs afterwards does not matter
    assert second.tokens == 0
    relay.finish()
    for kind in ("square_sums", "maximum", "sequences", "tokens"):
        assert torch.equal(torch.as_tensor(getattr(alone, kind)), torch.as_tensor(getattr(second, kind)))
    assert alone.moment is not None and second.moment is not None
    assert torch.equal(alone.moment.moment, second.moment.moment)
    assert torch.equal(torch.cat(alone.sample), torch.cat(second.sample)) and not sent
