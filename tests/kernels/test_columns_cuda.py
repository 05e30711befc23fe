"""The CUDA C++ of the column kernels, run on the CPU: one thread per block, so that barriers have nothing to do."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.kernels.test_columns import block, plain_feedback
from whit.kernels.columns import cuda_options, cuda_source
from whit.kernels.split_product import joined
from whit.methods.rounders import GridRounder, LevelRounder

COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++")
PRELUDE = """
#include <cmath>
#include <cstring>
#define __restrict__ __restrict
#define __global__
#define __device__
#define __shared__ static
#define __align__(x) __attribute__((aligned(x)))
#define __launch_bounds__(x)
static void __syncthreads() {}
static float __fdividef(float x, float y) { return x / y; }
static float __shfl_xor_sync(unsigned, float x, int) { return x; }
static unsigned __float_as_uint(float x) { unsigned out; memcpy(&out, &x, 4); return out; }
static float __uint_as_float(unsigned x) { float out; memcpy(&out, &x, 4); return out; }
struct Index { int x; };
static Index threadIdx = {0}, blockIdx = {0};
"""
DRIVER = """
extern "C" void run(float* a, const float* b, const float* c, const float* d, const int* e, unsigned char* f,
                    float* g, const unsigned char* h, unsigned short* i, int rows, int columns, int stride, float top) {
    for (blockIdx.x = 0; blockIdx.x < rows; blockIdx.x++)
        round_columns(a, b, c, d, e, f, g, h, i, rows, columns, stride, top);
}
"""


def compiled(folder: Path, levels: int, masked: bool, descend: bool, grid: bool) -> ctypes.CDLL:
    """The kernel as a library for this machine."""
    assert COMPILER is not None
    options = cuda_options(levels, 1, 1, masked, True, descend, grid)
    source = folder / "columns.cpp"
    source.write_text(PRELUDE + cuda_source() + DRIVER)
    flags = ["-O1", "-w", "-shared", "-fPIC", *options]
    subprocess.run([COMPILER, *flags, str(source), "-o", str(folder / "columns.so")], check=True, timeout=120)
    return ctypes.CDLL(str(folder / "columns.so"))


def run(library: ctypes.CDLL, tensors: list[Tensor], top: int) -> None:
    columns, rows = tensors[0].shape
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    library.run(*pointers, rows, columns, tensors[2].stride(0), ctypes.c_float(top))


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (33, 7), (128, 20)])
@pytest.mark.parametrize("kind", ["levels", "grid", "masked", "descent"])
def test_the_kernel_is_the_plain_loop(kind: str, count: int, rows: int, tmp_path: Path) -> None:
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
    library = compiled(tmp_path, table.shape[1], kind == "masked", kind == "descent", kind == "grid")
    halves = torch.empty(3 * count, rows, dtype=torch.bfloat16)
    wide = torch.full((count, count + 5), float("nan"))[:, :count].copy_(inner)
    moved = values.clone()
    run(library, [moved, gradient, wide, table, book, codes, errors, kept.view(torch.uint8), halves], 15)
    assert torch.equal(halves, joined(errors))
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
