"""Compiled programs on a CPU: their steps, and the sharing of them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

pytest.importorskip("numba")

from tests.kernels.test_cpu_decode import normal, random_packed
from whit.formats.base import Format
from whit.formats.binary_residual import BinaryResidual
from whit.formats.grouped_integer import GroupedInteger
from whit.formats.level_table import LevelTable
from whit.kernels.cpu.program import Phase, Program, Step
from whit.kernels.cpu_decode import dense_steps, steps_of
from whit.kernels.decode_ops import add_rms_norm, gated, rotate_and_attend
from whit.kernels.decode_state import KeyValues, Place


def assert_close(out: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(out, wanted, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("columns", [1, 16, 37, 64, 576])
def test_normalisation(columns: int) -> None:
    states, update, weight = (normal(1, columns, seed=seed) for seed in range(3))
    out = torch.empty(1, columns)
    for addend in (None, update):
        total, wanted = add_rms_norm(states, addend, weight[0], 1e-5)
        Program([Phase([Step("block_steps.normalise", (states, addend, weight, out, columns, 1e-5))])]).run()
        assert_close(out, wanted)
        assert_close(states, total)


@pytest.mark.parametrize("columns", [1, 16, 37, 100])
def test_gate(columns: int) -> None:
    left, right = 30 * normal(1, columns), normal(1, columns, seed=2)
    left[0, 0] = -200.0  # e^200 is no float32
    out = torch.empty_like(left)
    Program([Phase([Step("block_steps.gate", (left, right, out, columns))])]).run()
    torch.testing.assert_close(out, gated(left, right), rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize("size", [6, 16, 40, 64])
@pytest.mark.parametrize("position", [0, 1, 15, 16, 40])
@pytest.mark.parametrize("first", [0, 3])
def test_attention(size: int, position: int, first: int) -> None:
    heads, key_heads, length = 6, 2, 50
    first = min(first, position)
    query, key, value = (
        normal(1, heads * size),
        normal(1, key_heads * size, seed=2),
        normal(1, key_heads * size, seed=3),
    )
    caches = [KeyValues(*(normal(1, key_heads, length, size, seed=seed) for seed in (4, 5))) for _ in range(2)]
    cosine, sine = normal(length, size, seed=6), normal(length, size, seed=7)
    where, start = torch.tensor(position), torch.tensor([first])
    place = Place(where, start, cosine, sine, torch.empty(0), torch.empty(0))
    wanted = rotate_and_attend(query, key, value, caches[0], place, 0.3)
    out, room = torch.empty_like(query), torch.empty(heads, length + 2 * size)
    tensors = (query, key, value, caches[1].keys, caches[1].values, out, cosine, sine, torch.stack([where, start[0]]))
    step = Step("block_steps.attend", (*tensors, room, heads // key_heads, length, size, 0.3), heads)
    Program([Phase([step])]).run()
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    assert_close(caches[1].keys, caches[0].keys)
    assert torch.equal(caches[1].values, caches[0].values)


LAYOUTS = [BinaryResidual(24, True), GroupedInteger(4, 32, False), GroupedInteger(8, 32, True), LevelTable(2, 48)]


def chain(length: int) -> tuple[Program, Tensor]:
    """A chain of packed and dense products, each of the one before; and what comes out."""
    phases, x = [], normal(1, 96)
    for number in range(length):
        layout: Format = LAYOUTS[number % 4]
        out = torch.empty(1, 96)
        bias = normal(96, seed=number) if number % 2 else None
        steps = steps_of(random_packed(layout, 96, 96, seed=number), x, out, bias)
        assert steps is not None
        more = torch.empty(1, 96)
        dense = dense_steps(normal(96, 96, seed=number) / 10, x, more, None)
        assert dense is not None
        before = [steps.before] if steps.before is not None else []
        small = [Step(item.function, item.arguments, item.items, 7) for item in (steps.product, dense.product)]
        scaled = torch.empty(1, 96)
        after = Step("block_steps.normalise", (out, more, torch.ones(96), scaled, 96, 1e-5))
        phases += [Phase(before, together=True), Phase(small), Phase([after], together=True)]
        x = scaled
    return Program(phases), x


def test_threads_share_a_program_without_changing_a_bit() -> None:
    program, out = chain(20)
    program.run()
    alone = out.clone()
    assert bool(alone.isfinite().all())
    before = torch.get_num_threads()
    try:
        for threads in (2, 5):  # more than there are cores, so that helpers come late and are interrupted
            torch.set_num_threads(threads)
            for _ in range(100):
                out.zero_()
                program.run()
                assert torch.equal(out, alone)
    finally:
        torch.set_num_threads(before)


def test_what_a_program_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        Program([Phase([Step("block_steps.gate", (normal(4, 4).T, 1, 1, 1))])])
    with pytest.raises(ValueError, match="40 arguments"):
        Program([Phase([Step("block_steps.gate", tuple(range(40)))])])
    Program([]).run()


NARROW = {
    "AVX2": {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+sse4.2"},
    "nothing": {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""},
}
CHECK = """
import torch
from tests.kernels.test_cpu_decode import LAYOUTS, normal, random_packed
from tests.kernels.test_cpu_program import assert_close, test_gate
from whit.kernels import packed_linear
from whit.kernels.cpu.processor import features
assert not any(name.startswith("avx512") for name in features())
for layout in LAYOUTS[2:4] + LAYOUTS[7:12] + LAYOUTS[-4:]:
    packed, x = random_packed(layout, 19, 112), normal(1, 112)
    weight = packed.unpack()
    error = (packed_linear(x, packed).double() - x.double() @ weight.double().T).abs()
    assert (error <= 115 * 2.0**-24 * (x.abs() @ weight.abs().T)).all(), layout
    unit = packed_linear(torch.eye(112)[40:56], packed).T
    torch.testing.assert_close(unit, weight[:, 40:56], rtol=2.0**-23, atol=0)
test_gate(37)
print("right")
"""


@pytest.mark.parametrize("instructions", NARROW)
def test_processors_with_narrower_registers(instructions: str, tmp_path: object) -> None:
    """The same functions compiled for less than this processor can do, in a process of its own."""
    x86 = os.uname().machine == "x86_64" if hasattr(os, "uname") else False
    if not x86:
        pytest.skip("instructions of x86 are left out")
    environment = os.environ | NARROW[instructions] | {"NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout == "right\n", done.stderr[-2000:]
