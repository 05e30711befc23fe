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
from whit.pipeline.exchange import Exchange
from whit.pipeline.ranks import ALONE, Ranks, spread

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
if together:
    whit.compress(folder / "llama" / "model", "stbllm", out.parent / "half", options=options("llama"))
    try:
        whit.compress(folder / "llama" / "model", "gptq", out / "few", options=options("llama", batch_size=99))
    except KnobError as error:
        print("REFUSED", error)
else:
    whit.compress(folder / "llama" / "model", "stbllm", out / "stbllm", options=options("llama"))
    try:
        chosen = options("llama")
        whit.compress(folder / "llama" / "model", "stbllm", out.parent / "half", options=chosen, listener=Stopper())
    except KeyboardInterrupt:
        print("INTERRUPTED")
"""


def start(launcher: list[str], arguments: list[str]) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[:3000]
    return done.stdout


def test_two_processes_write_the_bytes_of_one(tmp_path: Path) -> None:
    for family in ("llama", "whisper", "gpt2", "albert"):
        make_case(family, tmp_path / family)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    assert "INTERRUPTED" in start([], [str(script), str(tmp_path), str(tmp_path / "one")])
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    said = start(launcher, [str(script), str(tmp_path), str(tmp_path / "two")])
    assert said.count("REFUSED 1 calibration batches cannot be shared among 2 processes") == 2
    (tmp_path / "half").rename(tmp_path / "two" / "stbllm")  # begun by one process, finished by two
    compared = 0
    for path in sorted((tmp_path / "one").rglob("*")):
        if path.suffix in (".safetensors", ".json") and path.name != "result.json":
            assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes(), path
            compared += 1
    assert compared >= 12


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
    found = []
    exchange = Exchange(ALONE)
    exchange.connect([lambda inputs, parts: found.append((inputs, parts))])
    exchange.record(0, tensor, 2)
    exchange.turn()
    assert len(found) == 1 and found[0][0] is tensor and found[0][1] == 2


def test_inputs_are_taken_in_by_the_order_of_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What two processes would see, by a stand-in for the second: each takes its turn, whoever asks."""
    ranks = Ranks(1, 2)
    theirs = [[0, [2, 3], "float32", 1]]
    monkeypatch.setattr(Ranks, "gather", lambda self, value: [theirs, value])
    monkeypatch.setattr(Ranks, "broadcast", lambda self, tensor, source: tensor.fill_(7) if source == 0 else None)
    found: list[list[float]] = []
    exchange = Exchange(ranks)
    exchange.connect([lambda inputs, parts: found.append(inputs.flatten().tolist())])
    exchange.record(0, torch.zeros(1, 3), 1)
    assert found == []
    exchange.turn()
    assert found == [[7.0] * 6, [0.0] * 3]
