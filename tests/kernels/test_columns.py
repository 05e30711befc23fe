"""The column kernels against their plain meaning on random blocks of ragged sizes; whole methods against the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from whit.kernels import columns
from whit.methods import make_method
from whit.methods.rounders import GridRounder, LevelRounder
from whit.methods.statistics import LayerStatistics, relative_output_error

HAS_CUDA = torch.cuda.is_available() and columns.available(torch.device("cuda"))
HAS_NUMBA = columns.available(torch.device("cpu"))
needs_cuda = pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device and Triton")
needs_numba = pytest.mark.skipif(not HAS_NUMBA, reason="needs numba")
on_devices = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=needs_numba), pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda])]
)


SIZES = [(1, 1), (7, 33), (64, 40), (128, 65), (77, 8500), (128, 17000)]


def block(count: int, rows: int, device: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Values, a well-conditioned inner matrix and table numbers."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, rows, generator=generator)
    spread = torch.randn(count, count + 8, generator=generator)
    inner = spread @ spread.T / count + torch.eye(count)
    book = torch.randint(0, 3, (count,), generator=generator, dtype=torch.int32)
    return values.to(device), inner.to(device), book.to(device)


def plain_feedback(rounder: LevelRounder | GridRounder, values: Tensor, inner: Tensor) -> tuple[Tensor, Tensor]:
    codes, errors = torch.zeros_like(values, dtype=torch.uint8), torch.zeros_like(values)
    for j in range(len(values)):
        target = values[j] - (errors[:j] * inner[:j, j, None]).sum(0)
        codes[j], rounded = rounder(j, target)
        errors[j] = (target - rounded) / inner[j, j]
    return codes, errors


@on_devices
@pytest.mark.parametrize(("count", "rows"), SIZES)
@pytest.mark.parametrize("kind", ["levels", "grid"])
def test_feedback_is_the_plain_loop(count: int, rows: int, kind: str, device: str) -> None:
    values, inner, book = block(count, rows, device)
    generator = torch.Generator().manual_seed(1)
    if kind == "levels":
        rounder: LevelRounder | GridRounder = LevelRounder(
            torch.randn(3, 4, rows, generator=generator).sort(1).values.to(device), book
        )
    else:
        scale = torch.rand(3, rows, generator=generator) * 0.5
        scale[0, 0] = 0
        zero = torch.randint(0, 15, (3, rows), generator=generator).float()
        rounder = GridRounder(torch.stack([scale, zero], 1).to(device), book, 4)
    codes, errors = torch.zeros_like(values, dtype=torch.uint8), torch.full_like(values, float("nan"))
    rounder.round_block(0, values, inner, codes, errors)
    expected_codes, expected = plain_feedback(rounder, values, inner)
    same = (codes == expected_codes).all(0)
    assert same.float().mean() > 0.95  # rows in which a value lay within rounding of a tie may go another way
    torch.testing.assert_close(errors[:, same], expected[:, same], atol=2e-5, rtol=1e-4)


@on_devices
@pytest.mark.parametrize(("count", "rows"), SIZES)
def test_descent_is_the_plain_loop(count: int, rows: int, device: str) -> None:
    values, inner, book = block(count, rows, device)
    gradient = torch.randn_like(values)
    table = torch.randn(3, 4, rows, generator=torch.Generator().manual_seed(1)).sort(1).values.to(device)
    rounder = LevelRounder(table, book)
    codes, change = torch.zeros_like(values, dtype=torch.uint8), torch.full_like(values, float("nan"))
    moved = values.clone()
    columns.descend_levels(moved, gradient, inner, table, book, codes, change)
    expected_codes, expected = torch.zeros_like(codes), torch.zeros_like(values)
    for j in range(count):
        slope = gradient[j] - (expected[:j] * inner[:j, j, None]).sum(0)
        expected_codes[j], rounded = rounder(j, values[j] + slope / inner[j, j])
        expected[j] = rounded - values[j]
    same = (codes == expected_codes).all(0)
    assert same.float().mean() > 0.95
    torch.testing.assert_close(change[:, same], expected[:, same], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(moved, values + change)


@on_devices
@pytest.mark.parametrize("descend", [False, True])
def test_a_weight_that_is_not_kept_becomes_zero(descend: bool, device: str) -> None:
    values, inner, book = block(50, 37, device)
    generator = torch.Generator().manual_seed(1)
    kept = (torch.rand(50, 37, generator=generator) < 0.5).to(device)
    table = torch.randn(3, 6, 37, generator=generator).sort(1).values.to(device)
    rounder = LevelRounder(table, book, kept)
    gradient = torch.randn(50, 37, generator=generator).to(device)
    codes, errors = torch.zeros_like(values, dtype=torch.uint8), torch.full_like(values, float("nan"))
    if descend:
        rounded = values.clone()
        rounder.descend_block(0, rounded, gradient, inner, codes, errors)
        torch.testing.assert_close(rounded, values + errors)
    else:
        rounder.round_block(0, values, inner, codes, errors)
        fed_back = torch.stack([values[j] - (errors[:j] * inner[:j, j, None]).sum(0) for j in range(50)])
        rounded = fed_back - errors * inner.diagonal().unsqueeze(1)
    expected = table[book.long()].gather(1, codes.long().unsqueeze(1)).squeeze(1) * kept
    torch.testing.assert_close(rounded, expected, atol=2e-5, rtol=1e-4)
    assert bool((expected[kept] != 0).any())


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize(
    ("method", "knobs"),
    [
        ("gptq", {"bits": 4, "group_size": 64}),
        ("gptq", {"bits": 2, "group_size": 0, "act_order": True}),
        ("gptq", {"bits": 1, "group_size": 64, "symmetric": True}),
        ("kmeans", {"bits": 2, "act_order": True}),
        ("billm", {}),
        ("billm", {"block_size": 128}),
        ("stbllm", {"block_size": 64}),
        ("stbllm", {"regions": 2, "pattern": "8:8"}),
    ],
)
def test_methods_on_the_gpu_lose_no_more_than_on_the_cpu(method: str, knobs: dict[str, object]) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(96, 320, generator=generator)
    inputs = torch.randn(2000, 320, generator=generator) @ torch.randn(320, 320, generator=generator)
    moment = inputs.T @ inputs / 1000
    errors = []
    for device in ("cpu", "cuda"):
        statistics = LayerStatistics(320, 2000, moment.to(device))
        packed = make_method(method, knobs).compress(weight.to(device), statistics).packed
        errors.append(relative_output_error(weight, packed.unpack().cpu(), moment))
    assert errors[1] == pytest.approx(errors[0], rel=0.03)


def test_blocks_that_are_too_wide_are_refused() -> None:
    wide = torch.zeros(129, 4)
    with pytest.raises(ValueError, match="at most 128 columns"):
        columns.feedback_levels(wide, wide, torch.zeros(1, 2, 4), torch.zeros(129, dtype=torch.int32), wide, wide)


@needs_numba
@pytest.mark.parametrize(("method", "knobs"), [("gptq", {"bits": 3}), ("kmeans", {"bits": 2}), ("billm", {})])
def test_methods_with_and_without_the_compiled_loop_lose_the_same(
    method: str, knobs: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(96, 320, generator=generator)
    inputs = torch.randn(2000, 320, generator=generator) @ torch.randn(320, 320, generator=generator)
    statistics = LayerStatistics(320, 2000, inputs.T @ inputs / 1000)
    errors = []
    for _ in range(2):
        packed = make_method(method, knobs).compress(weight, statistics).packed
        errors.append(relative_output_error(weight, packed.unpack(), inputs.T @ inputs))
        monkeypatch.setattr(columns, "available", lambda device, **kind: False)
    assert errors[1] == pytest.approx(errors[0], rel=0.03)


@needs_numba
def test_the_number_of_threads_does_not_change_the_bytes() -> None:
    values, inner, book = block(100, 333, "cpu")
    table = torch.randn(3, 4, 333, generator=torch.Generator().manual_seed(1)).sort(1).values
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            codes, errors = torch.zeros_like(values, dtype=torch.uint8), torch.full_like(values, float("nan"))
            columns.feedback_levels(values, inner, table, book, codes, errors)
            found.append((codes, errors))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(codes, found[0][0]) and torch.equal(errors, found[0][1]) for codes, errors in found)


def test_without_numba_a_cpu_has_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "numba_works", lambda: False)
    assert not columns.available(torch.device("cpu"))


def test_without_nvrtc_masks_take_the_plain_loop_and_all_else_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(columns, "_triton_found", lambda: True)
    monkeypatch.setattr(columns, "nvrtc_found", lambda: True)
    assert columns.available(gpu, masked=True) and columns.writes_halves(gpu)
    monkeypatch.setattr(columns, "nvrtc_found", lambda: False)
    assert columns.available(gpu) and not columns.available(gpu, masked=True) and not columns.writes_halves(gpu)
    monkeypatch.setattr(columns, "_triton_found", lambda: False)
    assert not columns.available(gpu)
