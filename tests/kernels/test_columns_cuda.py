"""The CUDA C++ of the column kernels, run by the emulator of CUDA on the CPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from tests.kernels.test_columns import block, plain_feedback
from whit.kernels import columns, nvrtc
from whit.kernels.split_product import split
from whit.methods.rounders import GridRounder, LevelRounder

COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++")
HERE = Path(__file__).parent
PRELUDE = """
#define BF16 1
#include "emulator.h"
#define __restrict__ __restrict
#define __shared__ static
#include <functional>
static std::function<void()> call;
"""
DRIVER = """
extern "C" void run(float* a, const float* b, const float* c, const float* d, const int* e, unsigned char* f,
                    float* g, const unsigned char* h, unsigned short* i, int rows, int columns, int stride,
                    int plane, float top) {
    call = [=]() { round_columns(a, b, c, d, e, f, g, h, i, rows, columns, stride, plane, top); };
    kernel_body = []() { call(); };
    run_blocks((rows * LANES + THREADS - 1) / THREADS, THREADS, 16, rows % 2, 1);
}
"""


class Emulated:
    """The kernel as a library for this machine."""

    def __init__(self, folder: Path, source: str, options: tuple[str, ...]) -> None:
        path = folder / "columns.cpp"
        path.write_text(PRELUDE + source + DRIVER)
        flags = ["-std=c++20", "-O1", "-w", "-shared", "-fPIC", f"-I{HERE / 'emulator'}", *options]
        command = [str(COMPILER), *flags, str(path), "-o", str(folder / "columns.so")]
        subprocess.run(command, check=True, timeout=120)
        self.library = ctypes.CDLL(str(folder / "columns.so"))

    def launch(self, grid: int, threads: int, shared: int, arguments: list[object]) -> None:
        self.library.run(*arguments)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Emulated]:
    """Builds each kind of loop once."""
    return lru_cache(lambda source, name, options, device: Emulated(tmp_path_factory.mktemp("build"), source, options))


@pytest.fixture(params=[1, 2, 4])
def lanes(
    request: pytest.FixtureRequest, built: Callable[..., Emulated], monkeypatch: pytest.MonkeyPatch
) -> Iterator[int]:
    """So many threads share a row, in the emulator."""
    monkeypatch.setattr(nvrtc, "kernel", built)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(columns, "CUDA_SHAPES", ())
    monkeypatch.setattr(columns, "CUDA_WIDE_SHAPE", (request.param, 64))
    columns._cuda_kernel.cache_clear()
    yield request.param
    columns._cuda_kernel.cache_clear()


@pytest.mark.parametrize(("count", "rows"), [(33, 70), (128, 37), (1, 1)])
@pytest.mark.parametrize("kind", ["levels", "grid", "masked", "descent"])
def test_the_kernel_is_the_plain_loop(kind: str, count: int, rows: int, lanes: int) -> None:
    values, inner, book = block(count, rows, "cpu")
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(count, rows, generator=generator)
    kept = torch.rand(count, rows, generator=generator) < 0.6
    if kind == "grid":
        zero = torch.randint(0, 15, (3, rows), generator=generator).float()
        table = torch.stack([torch.rand(3, rows, generator=generator) * 0.5, zero], 1)
        table[0, 0, 0] = 0
        rounder: LevelRounder | GridRounder = GridRounder(table, book, 4)
    else:
        table = torch.randn(3, 4, rows, generator=generator).sort(1).values.contiguous()
        rounder = LevelRounder(table, book, kept if kind == "masked" else None)
    codes, errors = torch.zeros_like(values, dtype=torch.uint8), torch.full_like(values, float("nan"))
    halves = torch.zeros(3, count + 3, rows, dtype=torch.bfloat16)[:, 1 : count + 1]
    wide = torch.full((count, count + 5), float("nan"))[:, :count].copy_(inner)
    moved = values.clone()
    tensors = (moved, gradient, wide, table, book, codes, errors, kept.view(torch.uint8))
    columns._on_cuda(tensors, halves, kind == "masked", kind == "descent", kind == "grid", 15)
    high, low = split(errors)
    assert torch.equal(halves, torch.stack([high, low, high]))
    if kind == "descent":
        expected_codes, expected = torch.zeros_like(codes), torch.zeros_like(values)
        for j in range(count):
            slope = gradient[j] - (expected[:j] * inner[:j, j, None]).sum(0)
            expected_codes[j], rounded = rounder(j, values[j] + slope / inner[j, j])
            expected[j] = rounded - values[j]
        torch.testing.assert_close(moved, values + errors)
    else:
        expected_codes, expected = plain_feedback(rounder, values, inner)
    same = (codes == expected_codes).all(0)
    assert same.float().mean() > 0.9  # rows in which a value lay within rounding of a tie may go another way
    torch.testing.assert_close(errors[:, same], expected[:, same], atol=2e-5, rtol=1e-4)
