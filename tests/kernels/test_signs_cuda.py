"""The CUDA C++ of the sign kernels, run thread by thread on the CPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from whit.kernels import signs

COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++")
THREADS = 4
PRELUDE = """
#define __global__
struct Index { int x; };
static Index threadIdx = {0}, blockIdx = {0};
"""
DRIVER = """
#define EACH(call) for (blockIdx.x = 0; blockIdx.x < (rows + THREADS - 1) / THREADS * height; blockIdx.x++) \\
    for (threadIdx.x = 0; threadIdx.x < THREADS; threadIdx.x++) call
typedef unsigned char u8;
extern "C" void run_pattern_rows(const u8* a, unsigned short* b, int columns, int rows, int height) {
    EACH(pattern_rows(a, b, columns, rows, height));
}
extern "C" void run_signed_sums(const float* a, const u8* b, float* c, int columns, int count, int rows, int chunk,
                                int height) {
    EACH(signed_sums(a, b, c, columns, count, rows, chunk, height));
}
extern "C" void run_decode_signs(const u8* a, const float* b, const float* c, const long long* d, float* e, int columns,
                                 int rows, int height) {
    EACH(decode_signs(a, b, c, d, e, columns, rows, height));
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    assert COMPILER is not None
    folder = tmp_path_factory.mktemp("signs")
    (folder / "signs.cpp").write_text(PRELUDE + signs.cuda_source() + DRIVER)
    flags = ["-O1", "-w", "-shared", "-fPIC", f"-DTHREADS={THREADS}"]
    subprocess.run([COMPILER, *flags, str(folder / "signs.cpp"), "-o", str(folder / "signs.so")], check=True)
    return ctypes.CDLL(str(folder / "signs.so"))


def test_on_a_gpu_they_are_what_they_are_on_a_cpu(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 4, (70, 13), generator=generator, dtype=torch.uint8)
    products = torch.randn(70, 2, 13, generator=generator)
    low, high = torch.rand(4, 13, generator=generator), 1 + torch.rand(4, 13, generator=generator)
    book = torch.randint(0, 4, (70,), generator=generator)
    expected = (
        signs.pattern_rows(codes),
        signs.signed_sums(products, codes),
        signs.decode_signs(codes, low, high, book),
    )

    def launch(name: str, rows: int, height: int, tensors: Sequence[Tensor], numbers: Sequence[int]) -> None:
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
        getattr(library, f"run_{name}")(*pointers, *numbers, height)

    monkeypatch.setattr(signs, "_launch", launch)
    monkeypatch.setattr(signs, "_on_cuda", lambda tensor: True)
    assert torch.equal(signs.pattern_rows(codes).float(), expected[0])
    torch.testing.assert_close(signs.signed_sums(products, codes), expected[1])
    assert torch.equal(signs.decode_signs(codes, low, high, book), expected[2])
