"""The kernels of 4:8 sparse binary weights that decode words of the index, run on a CPU thread by thread."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.kernels.emulator import build
from tests.kernels.test_cuda_kernels import error_bound, inputs, random_packed
from whit.formats.base import Packed
from whit.formats.structured_binary import StructuredBinary
from whit.kernels import structured
from whit.kernels.cuda_layout import Layout, layout_of
from whit.kernels.structured_few import FewLaunch, few_launch, few_options, few_source
from whit.kernels.structured_plan import StructuredLaunch
from whit.kernels.structured_vector import VectorLaunch, reads_words, vector_launch, vector_options, vector_source

needs_compiler = pytest.mark.skipif(build.COMPILER is None, reason="needs g++")
LAYOUT = StructuredBinary(4, 8, 0)


def described(columns: int, layout: StructuredBinary = LAYOUT) -> Layout:
    found = layout_of(layout, columns)
    assert found is not None and reads_words(found)
    return found


def extreme(rows: int, columns: int) -> Packed:
    """Random but for two rows: the largest digits and all signs positive, and the smallest and all negative."""
    generator = torch.Generator().manual_seed(5)
    score = torch.rand(rows, columns // 8, 8, generator=generator)
    kept = torch.zeros_like(score, dtype=torch.bool).scatter_(2, score.topk(4, 2).indices, True)
    kept[0], kept[1] = torch.arange(8) > 3, torch.arange(8) < 4
    signs = torch.rand(rows, columns, generator=generator) < 0.5
    salient = torch.rand(columns, generator=generator) < 0.05
    regions = torch.randint(0, 3, (rows, columns), generator=generator)
    signs[0], signs[1], regions[0], regions[1] = True, False, 2, 0
    regions[:, salient] %= 2
    scalars = torch.rand(rows, 1, 5, generator=generator) + 0.2
    return LAYOUT.pack(kept.flatten(1), signs, regions, salient, scalars)


def within_bound(
    program: Path,
    layout: Layout,
    packed: Packed,
    x: Tensor,
    bias: Tensor | None,
    launch: Sequence[int],
    splits: int = 1,
) -> bool:
    """Whether the result is, and is the same with the warps of a block in either order."""
    tensors = [packed.tensors[name] for name in layout.names if name]
    shape = (packed.rows, packed.columns)
    results = [
        build.executed(program, layout, (*launch, descending, splits), tensors, shape, x, bias) for descending in (0, 1)
    ]
    weight = packed.unpack().double()
    expected = x.double() @ weight.T + (0 if bias is None else bias.double())
    error = (results[0].double() - expected).abs()
    return bool((error <= error_bound(x, weight, expected, "structured")).all()) and torch.equal(*results)


@needs_compiler
@pytest.mark.parametrize(
    ("shape", "vectors", "dtype", "means", "warps"),
    [
        ((35, 1584), 1, torch.float16, False, 3),  # rows that are not whole pieces of 16 bytes
        ((50, 2600), 2, torch.bfloat16, False, 1),
        ((16, 640), 1, torch.bfloat16, True, 2),
        ((100, 4096), 1, torch.float16, False, None),
        ((70, 640), 1, torch.float16, False, 7),  # more warps than slices
    ],
    ids=str,
)
def test_one_or_two_vectors(
    shape: tuple[int, int], vectors: int, dtype: torch.dtype, means: bool, warps: int | None, tmp_path: Path
) -> None:
    layout = StructuredBinary(4, 8, 0, means=means)
    words = described(shape[1], layout)
    launch = vector_launch(words, *shape, 2, 180_000, vectors, warps=warps)
    assert launch is not None
    options = vector_options(words, launch, dtype == torch.bfloat16, False)
    program = build.built("structured_vector", vector_source(words), options, tmp_path)
    packed = random_packed(layout, *shape) if means else extreme(*shape)
    x, bias = inputs(vectors, shape[1], dtype, "cpu"), torch.linspace(-1, 1, shape[0]).to(dtype)
    numbers = (launch.slices, launch.rows, launch.grid, launch.shared)
    assert within_bound(program, words, packed, x, bias, numbers)


@needs_compiler
@pytest.mark.parametrize(
    ("shape", "vectors", "dtype", "splits"),
    [
        ((35, 1584), 16, torch.float16, 1),
        ((50, 2600), 3, torch.bfloat16, 3),
        ((200, 2600), 9, torch.float16, 2),
        ((100, 4096), 9, torch.float16, 2),
    ],
    ids=str,
)
def test_several_vectors(shape: tuple[int, int], vectors: int, dtype: torch.dtype, splits: int, tmp_path: Path) -> None:
    words = described(shape[1])
    launch = few_launch(words, *shape, vectors, 220_000, {1: 2, 2: 2, 3: 2}, splits=splits)
    assert launch is not None and launch.splits == splits
    options = few_options(words, launch, dtype == torch.bfloat16, False)
    program = build.built("structured_few", few_source(words), options, tmp_path)
    x, bias = inputs(vectors, shape[1], dtype, "cpu"), torch.linspace(-1, 1, shape[0]).to(dtype)
    numbers = (launch.slices, launch.rows, launch.grid, launch.shared)
    assert within_bound(program, words, extreme(*shape), x, bias, numbers, splits)


@pytest.mark.parametrize("columns", [512, 1024])
def test_other_words_of_the_index_are_left_to_others(columns: int) -> None:
    layout = layout_of(LAYOUT, columns)
    assert layout is not None and layout.numbers[2] != 9
    assert vector_launch(layout, 64, columns, 132, 227 * 1024) is None
    assert few_launch(layout, 64, columns, 16, 227 * 1024, {1: 132}) is None


@pytest.mark.parametrize("shape", [(11008, 4096), (4096, 11008), (28672, 8192), (32000, 4096), (16, 1152)])
def test_launches_fit_the_device(shape: tuple[int, int]) -> None:
    layout, room = described(shape[1]), {1: 132, 2: 66, 3: 39, 4: 30}
    for vectors in (1, 2) if shape[1] < 8192 else (1,):  # two wide vectors leave no room for codes
        one = vector_launch(layout, *shape, 132, 227 * 1024, vectors)
        assert one is not None and one.shared <= 227 * 1024 and one.threads <= 1024
        assert one.rows * one.grid >= shape[0] and one.slices * 288 >= shape[1]
    for vectors in (3, 16):
        few = few_launch(layout, *shape, vectors, 227 * 1024, room)
        assert few is not None and few.shared <= 227 * 1024 and few.grid <= 132
        assert few.rows * (few.grid // few.splits) >= shape[0] and few.splits * few.slices * 288 >= shape[1]


def test_each_call_takes_the_kernel_that_was_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    words, fewer = described(4096), layout_of(StructuredBinary(5, 8, 0), 4096)
    monkeypatch.setattr(structured, "device_limits", lambda index: ("a device", 132, 227 * 1024))

    def kinds(layout: Layout | None, rows: int, *vectors: int) -> list[type]:
        return [type(structured._launch.__wrapped__(layout, rows, 4096, count, 0)) for count in vectors]

    monkeypatch.setattr(structured, "starts_early", lambda index: True)
    assert kinds(words, 4096, 1, 2, 3, 16) == [VectorLaunch, VectorLaunch, FewLaunch, FewLaunch]
    assert kinds(words, 11008, 1, 2, 8, 16) == [VectorLaunch, VectorLaunch, FewLaunch, StructuredLaunch]
    assert kinds(fewer, 4096, 1, 16) == [StructuredLaunch, StructuredLaunch]
    monkeypatch.setattr(structured, "starts_early", lambda index: False)
    assert kinds(words, 4096, 1, 16) == [StructuredLaunch, StructuredLaunch]
