"""Layers compressed side by side: results come in order, failures are told, and on a GPU the bytes are the same."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

import whit
from tests import tiny
from whit.models.source import hash_file
from whit.pipeline import abreast
from whit.pipeline.abreast import Abreast

CPU = torch.device("cpu")


def test_on_a_cpu_every_job_is_done_at_once() -> None:
    seen: list[object] = []
    with Abreast[int](CPU) as jobs:
        for number in range(3):
            jobs.submit(1, lambda number=number: number, seen.append)
            assert seen[-1] == number
            jobs.after(lambda: seen.append("freed"))
            assert seen[-1] == "freed"
    assert seen == [0, "freed", 1, "freed", 2, "freed"]


class _Threads(Abreast[int]):
    """Threads as on a GPU, without its streams."""

    def submit(self, weights: int, job, finished) -> None:
        pool = self._pool = self._pool or abreast.ThreadPoolExecutor(max_workers=abreast.ABREAST)
        self._hand_out(abreast.ABREAST)
        self._queue.append((pool.submit(job), finished))


def test_results_are_handed_out_in_order_whoever_is_done_first() -> None:
    second = threading.Event()
    seen: list[object] = []

    def slow() -> int:
        assert second.wait(10)
        return 0

    def quick() -> int:
        second.set()
        return 1

    with _Threads(CPU) as jobs:
        jobs.submit(1, slow, seen.append)
        jobs.after(lambda: seen.append("freed"))
        jobs.submit(1, quick, seen.append)
    assert seen == [0, "freed", 1]


def test_a_failure_is_told_and_what_comes_after_it_is_dropped() -> None:
    seen: list[int] = []

    def fail() -> int:
        raise ArithmeticError("no such root")

    with pytest.raises(ArithmeticError, match="no such root"), _Threads(CPU) as jobs:
        jobs.submit(1, lambda: 0, seen.append)
        jobs.submit(1, fail, seen.append)
        for number in range(5):
            jobs.submit(1, lambda number=number: number, seen.append)
    assert seen == [0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["billm", "stbllm", "gptq", "kmeans", "codebook", "sparsegpt", "flexible"])
def test_the_bytes_do_not_depend_on_who_runs_beside(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.save_model("llama", tmp_path / "model")
    data = tiny.save_inputs("llama", tmp_path / "calibration.safetensors", sequences=8)
    hashes = []
    for count in (1, 2, 2, 3):
        monkeypatch.setattr(abreast, "ABREAST", count)
        out = tmp_path / f"out-{len(hashes)}"
        options = whit.RunOptions(calibration=str(data), evaluate=False, device="cuda")
        whit.compress(model, method, out, options=options)
        hashes.append(hash_file(out / "model.safetensors"))
    assert len(set(hashes)) == 1
