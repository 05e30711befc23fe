"""Peak memory: bounded by the largest block, and what the plan says about it."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests import tiny
from tests.pipeline.conftest import make_case
from tests.pipeline.needy import Sensitive
from whit.kernels import semi_structured
from whit.methods import make_method
from whit.methods.rtn import RTN
from whit.pipeline.memory import (
    COMPILER_BYTES,
    RUNTIME_BYTES,
    GradientSizes,
    Sizes,
    compression_bytes,
    evaluation_bytes,
    expected_memory,
    gradient_bytes,
    gradient_sizes,
    hidden_width,
    kept_columns,
    original_fits,
    peak_host_bytes,
)
from whit.pipeline.options import RunOptions
from whit.pipeline.plan import make_plan
from whit.pipeline.prepare import Job, prepare

SCRIPT = """
import sys, torch, whit
from whit.pipeline.memory import peak_host_bytes
torch.set_num_threads(1)
model, calibration, output = sys.argv[1:]
options = whit.RunOptions(calibration=calibration, evaluate=False, device="cpu")
whit.compress(model, "gptq", output, options=options, bits=4)
print(peak_host_bytes())
"""
SIZES = Sizes(
    outside=100, block=10, dense=500, matrix=4, moment=2, end=80, streams=30, activations=6, packed=60, answer=40
)


def save_wide(blocks: int, folder: Path, dtype: torch.dtype = torch.float32) -> int:
    """A LLaMA of 10 MB blocks and next to nothing else; returns the bytes of one block."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config)
    model.to(dtype).save_pretrained(folder, max_shard_size="40MB")
    return 4 * sum(parameter.numel() for parameter in model.model.layers[0].parameters())


def printed(script: str, *arguments: Path) -> list[str]:
    """Words that a script prints in a process of its own, of one thread."""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def peak_of(blocks: int, folder: Path) -> tuple[int, int]:
    """(peak resident bytes, bytes of a block) of compressing a model of many equal blocks in a process of its own."""
    size = save_wide(blocks, folder / "model")
    calibration = tiny.save_inputs("llama", folder / "calibration.safetensors", sequences=2, length=16)
    return int(printed(SCRIPT, folder / "model", calibration, folder / "out")[-1]), size


def test_peak_is_that_of_this_process_not_of_its_parent() -> None:
    ballast = torch.ones(64 << 20)  # 256 MB
    script = "from whit.pipeline.memory import peak_host_bytes; print(peak_host_bytes())"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert 50 << 20 < int(done.stdout) < peak_host_bytes() - 0.3 * ballast.numel() * 4


def test_more_blocks_need_no_more_memory(tmp_path: Path) -> None:
    few, size = peak_of(2, tmp_path / "few")
    many, _ = peak_of(12, tmp_path / "many")
    added = 10 * size
    assert added > 100e6
    assert many - few < 0.3 * added  # resident memory varies by about 15 MB from run to run


def test_a_run_peaks_in_its_largest_phase() -> None:
    assert compression_bytes(SIZES) == 100 + 5 * 80 + 30
    beside = 500 + 40 + (60 + 2 * 80 + 50 + 40)
    assert evaluation_bytes(SIZES, available=10_000) == beside
    assert evaluation_bytes(SIZES, available=100) == beside - 540
    assert evaluation_bytes(dataclasses.replace(SIZES, converted=7), available=100) == beside - 540 + 7


def test_what_waits_for_sums_of_another_process_counts() -> None:
    assert compression_bytes(dataclasses.replace(SIZES, end=0)) == 100 + 6 + 30
    assert compression_bytes(dataclasses.replace(SIZES, end=0, kept=500)) == 10 + 6 * 4 + 3 * 2 + 6 + 2 * 30 + 500
    assert (
        compression_bytes(dataclasses.replace(SIZES, end=0, kept=500, copies=5))
        == 10 + 6 * 4 + 5 * 2 + 6 + 2 * 30 + 500
    )


def test_several_processes_keep_the_inputs_of_a_block(tmp_path: Path) -> None:
    case = make_case("llama", tmp_path, evaluate=False)

    def job(method: str, **changes: object) -> Job:
        options = dataclasses.replace(case.options, batch_size=2, **changes)
        return prepare(case.model, make_method(method), tmp_path / "out", options)

    made = job("gptq")
    inside = [layer for layer in made.assignment.layers.values() if layer.block == made.stacks[0].blocks[0]]
    assert kept_columns(made) == sum(layer.columns for layer in inside) > 6 * 48
    assert kept_columns(job("gptq", true_sequential=True)) == max(layer.columns for layer in inside)
    assert kept_columns(job("rtn")) == 0
    long = dataclasses.replace(made, calibration=dataclasses.replace(made.calibration, tokens=144_000))
    alone, two = (expected_memory(long, 50_000, 10**10, processes).host for processes in (1, 2))
    # Two of three forward passes: their inputs are kept, and there are fewer hidden states, old and new.
    assert two - alone == 4 * (96_000 * kept_columns(made) - 2 * 48_000 * 48)


def test_the_gradient_pass_keeps_what_fits() -> None:
    sizes = GradientSizes(
        outside=100,
        block=10,
        dense=500,
        sums=300,
        flowing=7,
        boundaries=60,
        activations=6,
        logits=8,
        whole=False,
    )
    assert gradient_bytes(sizes, available=10_000) == 60 + 100 + 4 * 8
    assert gradient_bytes(sizes, available=100) == 25 + 100 + 4 * 8
    assert gradient_bytes(dataclasses.replace(sizes, outside=0), available=100) == 25 + 4 * (10 + 6)
    assert gradient_bytes(dataclasses.replace(sizes, whole=True), available=100) == 1000 + 20 + 4 * (8 + 6)
    assert sizes.disk == 300 + 14
    without = dataclasses.replace(sizes, sums=0)
    assert gradient_bytes(without, available=100) == without.disk == 0


def test_gradients_count_in_the_plan(tmp_path: Path) -> None:
    case = make_case("llama", tmp_path, evaluate=False)
    plans = [
        make_plan(prepare(case.model, method, tmp_path / "out", case.options)) for method in (RTN(bits=4), Sensitive())
    ]
    assert plans[0].working_bytes == 0
    inside = sum(layer.rows * layer.columns for layer in plans[1].layers if layer.block)
    assert plans[1].working_bytes == 4 * inside + 2 * 4 * 6 * 24 * 48
    assert plans[1].host_bytes > plans[0].host_bytes
    for family, whole in (("whisper", True), ("albert", False)):
        case = make_case(family, tmp_path / family, evaluate=False)
        sizes = gradient_sizes(prepare(case.model, Sensitive(), tmp_path / "out", case.options))
        assert sizes.whole is whole


def test_original_is_measured_only_where_it_fits() -> None:
    assert original_fits(100, 163)
    assert not original_fits(100, 162)


def test_evaluation_counts_in_the_plan(tmp_path: Path) -> None:
    case = make_case("llama", tmp_path)
    job = prepare(case.model, make_method("gptq", {}), tmp_path / "out", case.options)
    assert hidden_width(job.assignment) == 48
    measured = expected_memory(job, 50_000, 10**10)
    job.evaluation = None
    unmeasured = expected_memory(job, 50_000, 10**10)
    assert measured.device == unmeasured.device == 0
    assert measured.host > unmeasured.host > RUNTIME_BYTES
    parameters = sum(parameter.numel() for parameter in job.skeleton.parameters())
    assert measured.host - RUNTIME_BYTES > 4 * parameters + 50_000


def half_packed(folder: Path) -> Job:
    """Eleven of twelve blocks are left alone: stored in float16, loaded in float32."""
    save_wide(12, folder / "model", torch.float16)
    data = {
        name: str(tiny.save_inputs("llama", folder / f"{name}.safetensors", sequences=3, length=16))
        for name in ("calibration", "evaluation")
    }
    options = RunOptions(**data, device="cpu", allow_leak=True, skip=("model.layers.[1-9].*", "model.layers.1?.*"))
    return prepare(folder / "model", make_method("rtn"), folder / "out", options)


MEASURE = """
import sys, psutil, torch, whit
from whit.pipeline.events import Listener
from whit.pipeline.memory import peak_host_bytes
torch.set_num_threads(1)
model, calibration, evaluation, output = sys.argv[1:]
resident = []
class Evaluation(Listener):
    def phase(self, name, total):
        resident[:] = [psutil.Process().memory_info().rss]
    def step(self, description):
        resident.append(psutil.Process().memory_info().rss)
skip = ("model.layers.[1-9].*", "model.layers.1?.*")
options = whit.RunOptions(calibration=calibration, evaluation=evaluation, allow_leak=True, device="cpu", skip=skip)
whit.compress(model, "rtn", output, options=options, listener=Evaluation())
print(peak_host_bytes(), max(resident) - resident[0])
"""


def test_what_is_left_dense_is_measured_as_large_as_planned(tmp_path: Path) -> None:
    """Both models in float32, and the file, which stays mapped: twelve blocks, eleven, and these in float16."""
    job = half_packed(tmp_path)
    plan = make_plan(job)
    arguments = [tmp_path / name for name in ("model", "calibration.safetensors", "evaluation.safetensors", "measured")]
    peak, grown = map(int, printed(MEASURE, *arguments)[-2:])
    models = 4 * sum(parameter.numel() for parameter in job.skeleton.parameters()) * 23 // 12
    planned = plan.host_bytes - RUNTIME_BYTES - COMPILER_BYTES
    assert planned == pytest.approx(models + plan.file_bytes, rel=0.05)
    assert grown > models + 0.9 * plan.file_bytes and peak < plan.host_bytes


@pytest.mark.parametrize(("kind", "dtype", "counted"), [("cuda", "float16", True), ("cuda", "float32", False)])
def test_sparse_weights_held_twice_count(
    kind: str, dtype: str, counted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2:4 weights that sparse tensor cores multiply are kept in their own layout beside what is stored."""
    save_wide(12, tmp_path / "model")
    calibration = str(tiny.save_inputs("llama", tmp_path / "calibration.safetensors", sequences=2, length=16))
    options = RunOptions(calibration=calibration, evaluation=calibration, allow_leak=True, device="cpu", dtype=dtype)
    plans = {}
    for pattern in ("2:4", "4:8"):
        job = prepare(tmp_path / "model", make_method("magnitude", {"pattern": pattern}), tmp_path / "out", options)
        job.device = torch.device(kind)
        monkeypatch.setattr(semi_structured, "library", lambda device: "cusparselt" if device.type == "cuda" else None)
        plans[pattern] = expected_memory(job, 10**6, 10**12).device
    inside = sum(layer.rows * layer.columns for layer in job.assignment.layers.values() if layer.block)
    assert plans["2:4"] - plans["4:8"] == (inside * 9 // 8 if counted else 0)


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_hidden_width_of_every_family(family: str, tmp_path: Path) -> None:
    case = make_case(family, tmp_path)
    job = prepare(case.model, make_method("rtn", {}), tmp_path / "out", case.options)
    config = job.reference.config
    assert hidden_width(job.assignment) == getattr(config, "d_model", None) or config.hidden_size
