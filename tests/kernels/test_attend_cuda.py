"""Attention shared by the blocks of a cluster: on the CPU emulator and on a GPU against the plain meaning."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.kernels.emulator.build import COMPILER, HERE, translated
from whit.kernels import decode_ops
from whit.kernels.cuda_attend import AttendLaunch, attend_launch, attend_options, attend_source, launch_attend
from whit.kernels.decode_state import KeyValues, Place

DRIVER = """
#include <functional>
static std::function<void()> call;
extern "C" void run(void** t, int* n, float scaling, int grid, int shared, int descending) {
    call = [=]() {
        attend((u16*)t[0], (u16*)t[1], (u16*)t[2], (u16*)t[3], (u16*)t[4], (u16*)t[5], (u16*)t[6], (long long*)t[7],
               (long long*)t[8], (u16*)t[9], n[0], n[1], n[2], n[3], n[4], n[5], scaling);
    };
    kernel_body = []() { call(); };
    run_blocks(grid, THREADS, shared, descending, SPLITS);
}
"""
# heads, key heads, size of a head, length of the cache, position, padding of each sequence
CASES = [
    (2, 2, 64, 150, 149, [0, 5]),
    (4, 2, 128, 90, 80, [0, 80]),
    (2, 1, 256, 40, 0, [0]),
    (3, 3, 128, 300, 290, [0]),
]


def case(
    heads: int, key_heads: int, size: int, length: int, at: int, start: list[int], dtype: torch.dtype, device: str
):  # type: ignore[no-untyped-def]
    torch.manual_seed(at)
    count = len(start)
    angle = torch.arange(length)[:, None] * 0.1 * torch.arange(1, size + 1)
    place = Place(
        torch.tensor(at, device=device),
        torch.tensor(start, device=device),
        angle.cos().to(device, dtype),
        angle.sin().to(device, dtype),
        torch.empty(count * heads, 1, size + 2, device=device),
        torch.zeros(count * heads, dtype=torch.int32, device=device),
    )
    cache = KeyValues(*(torch.randn(count, key_heads, length, size).to(device, dtype) for _ in range(2)))
    wide = torch.randn(count, (heads + 2 * key_heads) * size).to(device, dtype)
    return wide.split([heads * size, key_heads * size, key_heads * size], -1), cache, place


def close(found: Tensor, wanted: Tensor) -> bool:
    unit = torch.finfo(wanted.dtype).eps
    return bool(((found.double() - wanted.double()).abs() <= 4 * unit * wanted.double().abs().amax()).all())


@pytest.mark.skipif(COMPILER is None, reason="needs g++")
@pytest.mark.parametrize(
    ("number", "splits", "threads", "rows"), [(0, 2, 64, 2), (1, 4, 128, 1), (2, 1, 256, 4), (3, 8, 128, 2)]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sources(number: int, splits: int, threads: int, rows: int, dtype: torch.dtype, tmp_path: Path) -> None:
    heads, key_heads, size, length, at, start = CASES[number]
    launch = AttendLaunch(splits, threads, rows)
    (query, key, value), cache, place = case(heads, key_heads, size, length, at, start, dtype, "cpu")
    path = tmp_path / "attend.cpp"
    path.write_text('#include "emulator.h"\n' + translated(attend_source()) + DRIVER)
    options = (*attend_options(launch, size, dtype == torch.bfloat16, early=False), "-DALIGN=16")
    flags = ["-std=c++20", "-O1", "-w", "-shared", "-fPIC", f"-I{HERE}", *options]
    subprocess.run([str(COMPILER), *flags, str(path), "-o", str(tmp_path / "attend.so")], check=True)
    run = ctypes.CDLL(str(tmp_path / "attend.so")).run
    other = KeyValues(cache.keys.clone(), cache.values.clone())
    wanted = decode_ops.rotate_and_attend(query, key, value, other, place, size**-0.5)
    for descending in (0, 1):
        mine, out = KeyValues(cache.keys.clone(), cache.values.clone()), torch.full_like(wanted, torch.nan)
        tensors = (
            query,
            key,
            value,
            place.cosine,
            place.sine,
            mine.keys,
            mine.values,
            place.position,
            place.start,
            out,
        )
        pointers = (ctypes.c_void_p * 10)(*(item.data_ptr() for item in tensors))
        strides = query.stride(0), key.stride(0), value.stride(0)
        numbers = (ctypes.c_int * 6)(*strides, length, heads, heads // key_heads)
        grid = len(start) * heads * splits
        run(pointers, numbers, ctypes.c_float(size**-0.5), grid, launch.shared(size), descending)
        assert close(out, wanted)
        assert close(mine.keys, other.keys) and torch.equal(mine.values, other.values)


def test_a_launch_fills_the_device_and_no_block_is_without_keys() -> None:
    assert attend_launch(32, 256, 128, 132).splits == 4
    assert attend_launch(128, 256, 128, 132).splits == 2
    assert attend_launch(512, 256, 128, 132).splits == 1
    assert attend_launch(9, 4096, 64, 132).splits == 8
    assert attend_launch(9, 40, 64, 132).splits == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("splits", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kernel(splits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_ops, "has_kernels", lambda device: False)
    for heads, key_heads, size, length, at, start in CASES:
        given, cache, place = case(heads, key_heads, size, length, at, start, dtype, "cuda")
        mine = KeyValues(cache.keys.clone(), cache.values.clone())
        wanted = decode_ops.rotate_and_attend(*given, cache, place, size**-0.5)
        tensors = (*given, place.cosine, place.sine, mine.keys, mine.values, place.position, place.start)
        found = [launch_attend(tensors, size**-0.5, AttendLaunch(splits)) for _ in range(2)]
        assert close(found[0], wanted) and torch.equal(*found)
        assert close(mine.keys, cache.keys) and torch.equal(mine.values, cache.values)
