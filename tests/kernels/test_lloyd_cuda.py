"""The CUDA C++ of Lloyd's iteration, run on the CPU lane by lane, is that of `weighted_levels`."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from whit.kernels import lloyd
from whit.methods.kmeans import weighted_levels

COMPILER = shutil.which("g++")
# One thread stands for a warp: it takes every column, and sums over lanes are its own.
PRELUDE = """
#define __device__
#define __global__
#define __restrict__ __restrict
static double __shfl_xor_sync(unsigned, double, int) { return 0.0; }
struct Index { int x; };
static Index threadIdx = {0}, blockIdx = {0};
"""
DRIVER = """
extern "C" void run(const float* values, const double* mass, double* levels, int rows, int count, int iterations) {
    for (blockIdx.x = 0; blockIdx.x < rows; blockIdx.x++) lloyd(values, mass, levels, rows, count, iterations);
}
"""


@pytest.mark.skipif(COMPILER is None, reason="needs g++")
@pytest.mark.parametrize("count", [2, 4, 8])
def test_the_kernel_finds_the_levels_of_the_plain_version(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert COMPILER is not None
    source = lloyd.cuda_source()
    assert source.count("j += 32") == 1
    (tmp_path / "lloyd.cpp").write_text(PRELUDE + source.replace("j += 32", "j += 1") + DRIVER)
    flags = ["-O1", "-w", "-shared", "-fPIC", f"-DLEVELS={count}", "-DWARPS=1"]
    subprocess.run([COMPILER, *flags, str(tmp_path / "lloyd.cpp"), "-o", str(tmp_path / "lloyd.so")], check=True)
    library = ctypes.CDLL(str(tmp_path / "lloyd.so"))

    def stand_in(values: Tensor, mass: Tensor, levels: Tensor, iterations: int) -> None:
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (values, mass, levels)]
        library.run(*pointers, *values.shape, iterations)

    generator = torch.Generator().manual_seed(count)
    values = torch.randn(20, 70, generator=generator)
    importance = torch.rand(70, generator=generator) + 0.1
    expected = weighted_levels(values, importance, count, 20)
    monkeypatch.setattr(lloyd, "available", lambda device: True)
    monkeypatch.setattr(lloyd, "lloyd", stand_in)
    assert torch.equal(weighted_levels(values, importance, count, 20), expected)
    assert not torch.equal(weighted_levels(values, importance, count, 1), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("width", [1, 33, 128, 3000])
def test_levels_on_a_gpu_are_those_on_a_cpu(width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(50, width, generator=generator)
    importance = torch.rand(width, generator=generator) + 0.1
    expected = weighted_levels(values, importance, 4, 20)
    found = weighted_levels(values.cuda(), importance.cuda(), 4, 20).cpu()
    assert float((found - expected).abs().max()) <= 2**-9 * float(expected.abs().max())
