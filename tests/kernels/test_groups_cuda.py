"""The CUDA C++ of the group kernel in the emulator, and on a GPU, against the loops that are its meaning."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from whit.kernels import groups
from whit.methods import group_feedback
from whit.methods.group_feedback import GroupOrder, decode, descend_groups, loudest_first, metrics, round_groups

COMPILER = shutil.which("g++")
HERE = Path(__file__).parent
PRELUDE = """
#define BF16 1
#include "emulator.h"
#include <functional>
#define __restrict__ __restrict
#define __shared__ static
static std::function<void()> call;
"""
DRIVER = """
extern "C" void run(const float* a, const float* b, const float* c, const float* d, const float* e, const float* f,
                    const float* g, const float* h, const float* i, const int* j, long long* k, float* l, float* m,
                    int rows, int n, int s0, int s1, int s2, int s3, int s4, int s5) {
    call = [=]() { round_groups(a, b, c, d, e, f, g, h, i, j, k, l, m, rows, n, s0, s1, s2, s3, s4, s5); };
    kernel_body = []() { call(); };
    run_blocks((rows * LANES + THREADS - 1) / THREADS, THREADS, 16, rows % 2, 1);
}
"""


@pytest.fixture
def emulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Lets the kernel run in the emulator from then on."""

    class Emulated:
        def __init__(self, source: str, options: tuple[str, ...]) -> None:
            path = tmp_path / f"groups{len(list(tmp_path.iterdir()))}.cpp"
            path.write_text(PRELUDE + source + DRIVER)
            flags = ["-std=c++20", "-O1", "-w", "-shared", "-fPIC", f"-I{HERE / 'emulator'}", *options]
            subprocess.run(
                [str(COMPILER), *flags, str(path), "-o", str(path.with_suffix(".so"))], check=True, timeout=120
            )
            self.library = ctypes.CDLL(str(path.with_suffix(".so")))

        def launch(self, grid: int, threads: int, shared: int, arguments: list[object]) -> None:
            self.library.run(*arguments)

    built: dict[tuple[str, ...], Emulated] = {}

    def kernel(source: str, name: str, options: tuple[str, ...], device: object) -> Emulated:
        if options not in built:
            built[options] = Emulated(source, options)
        return built[options]

    def switch() -> None:
        monkeypatch.setattr("whit.kernels.nvrtc.kernel", kernel)
        monkeypatch.setattr("torch.cuda.device", lambda number: __import__("contextlib").nullcontext())
        monkeypatch.setattr(group_feedback, "available", lambda device, width: True)

    return switch


class Layer:
    """A permuted layer, its damped moments and their factor, a random codebook."""

    def __init__(self, columns: int, width: int, half: int, rows: int = 21) -> None:
        generator = torch.Generator().manual_seed(columns)
        inputs = torch.randn(2 * columns, columns, generator=generator) * torch.rand(columns, generator=generator)
        self.moment = inputs.T @ inputs / columns + 0.1 * torch.eye(columns)
        lower = torch.linalg.cholesky(torch.linalg.inv(self.moment))
        self.upper = torch.linalg.cholesky(lower @ lower.T, upper=True)
        self.order: GroupOrder = loudest_first(torch.rand(columns, generator=generator), width)
        self.metric = metrics(self.upper, self.order, width)
        self.weight = torch.randn(rows, columns, generator=generator)
        self.words = torch.randn(half, width, generator=generator)
        self.scales = 0.3 + torch.rand(rows, generator=generator)

    def results(self, device: str = "cpu") -> list[Tensor]:
        order = GroupOrder(self.order.columns.to(device), self.order.groups.to(device), self.order.bounds)
        weight, upper, moment, metric, words, scales = (
            item.to(device) for item in (self.weight, self.upper, self.moment, self.metric, self.words, self.scales)
        )
        codes, current = round_groups(weight, upper, order, metric, scales, words)
        found = [codes.clone(), current]
        values = decode(codes, scales, words, order)
        gradient = (weight - values) @ moment
        descend_groups(codes, values, gradient, moment, order, scales, words)
        return [item.cpu() for item in (*found, codes, values, gradient)]

    def assert_same(self, found: list[Tensor], expected: list[Tensor]) -> None:
        """Rows in which a value lay within rounding of a tie may go another way."""
        same = (found[0] == expected[0]).all(1) & (found[2] == expected[2]).all(1)
        assert same.float().mean() > 0.85
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours[same], theirs[same], atol=1e-4, rtol=1e-3)


SIZES = [(40, 12, 128), (100, 8, 16), (30, 1, 2), (70, 16, 8)]


@pytest.mark.skipif(COMPILER is None, reason="needs g++")
@pytest.mark.parametrize(("columns", "width", "half"), SIZES)
def test_the_kernel_is_the_plain_loop(columns: int, width: int, half: int, emulated: Callable[[], None]) -> None:
    layer = Layer(columns, width, half)
    expected = layer.results()
    emulated()
    layer.assert_same(layer.results(), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("columns", "width", "half"), [*SIZES, (400, 12, 128)])
def test_a_gpu_gives_what_the_cpu_gives(columns: int, width: int, half: int) -> None:
    assert groups.available(torch.device("cuda"), width)
    layer = Layer(columns, width, half, 333)
    layer.assert_same(layer.results("cuda"), layer.results())
