"""The CUDA sources of LLM.int8() for many tokens, run on a CPU thread by thread against the plain meaning."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.kernels.emulator.build import COMPILER, built_call, run_call
from tests.kernels.emulator.meanings import MEANINGS
from whit.formats.outlier_int8 import OutlierInt8
from whit.kernels.cuda_sources import source_of
from whit.kernels.outlier_gather import SLICE, split_options
from whit.kernels.outlier_wide import TILES, Variant, WideTile, fits, product_options, product_source, wide_tile

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++")
MARK = "mark_columns((const u16*)b[0], b[1], n[4], n[5], n[6], n[7])"
SPLIT = (
    "Split s{(const u16*)b[0], (const u32*)b[1], (const int*)b[2], (const short*)b[3], (const signed char*)b[4],"
    " (const u16*)b[5], (signed char*)b[6], (float*)b[7], (u16*)b[8], (u16*)b[9], (u16*)b[10], (u16*)b[11],"
    " (int*)b[12],"
    " n[4], n[5], n[6], n[7], n[8], n[9], n[10], n[11]}; split_tokens(s)"
)
PRODUCT = (
    "TensorMap left{{(u64)b[0], (u64)n[6] / 2, (u64)n[4], M}}, right{{(u64)b[1], (u64)n[6] / 2, (u64)n[5], N}},"
    " loose{{(u64)b[2], (u64)n[7], (u64)n[4], M}}, loose_weight{{(u64)b[3], (u64)n[7], (u64)n[5], N}},"
    " placed{{(u64)b[4], (u64)n[8], (u64)n[4], M}}, placed_weight{{(u64)b[5], (u64)n[8], (u64)n[5], N}};"
    " Work w{(const float*)b[6], (const float*)b[7], (const int*)b[8], (const u16*)b[9], (u16*)b[10],"
    " n[4], n[5], n[6], n[9], n[10]};"
    " outlier_product(left, right, loose, loose_weight, placed, placed_weight, w)"
)


@pytest.fixture
def boxes_of_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Boxes have as many lines as their map says."""
    copy = (
        "static void copy_box(u8* to, const TensorMap& map, u64* barrier, int column, int token)"
        " { copy_box(to, map, barrier, column, token, (int)map.words[3]); }"
    )
    monkeypatch.setitem(MEANINGS, "void copy_box(", copy)
    monkeypatch.setitem(MEANINGS, "void copy_codes(", "")


def inputs(tokens: int, columns: int, loud: int, dtype: torch.dtype) -> Tensor:
    """Normal, with so many loud columns, one of them loud for one token alone; one token is zero."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, columns, generator=generator).clamp(-5, 5)
    chosen = torch.randperm(columns, generator=generator)[:loud]
    x[:, chosen[1:]] *= 20
    x[0, chosen] = 30.0
    x[tokens // 2] = 0
    return x.to(dtype)


def weight(rows: int, columns: int, case: str, dtype: torch.dtype) -> tuple[OutlierInt8, dict[str, Tensor]]:
    """Random tensors of an LLM.int8() layer: `case` is where outliers come from, and what their weights are."""
    generator = torch.Generator().manual_seed(1)
    outliers, _, kept = case.partition(" ")
    tensors = {
        "codes": torch.randint(-127, 128, (rows, columns), dtype=torch.int8, generator=generator),
        "absmax": torch.rand(rows, generator=generator) + 0.5,
    }
    stored = 0
    if outliers == "static" or kept:
        stored = 9
        tensors["outlier_index"] = torch.randperm(columns, generator=generator)[:stored].sort().values.int()
        if kept:
            tensors["outlier_weight"] = torch.randn(rows, stored, generator=generator).to(dtype)
    kind = {torch.float16: "float16", torch.bfloat16: "bfloat16"}[dtype] if kept else "int8"
    return OutlierInt8(6.0, outliers, stored, kind), tensors


def built_once(name: str, call: str, source: str, options: tuple[str, ...], folder: Path) -> Path:
    """The program in a test's own folder, compiled at its first use."""
    program = folder / name
    return program if program.exists() else built_call(name, call, source, options, folder)


def emulated(
    x: Tensor,
    layout: OutlierInt8,
    tensors: dict[str, Tensor],
    bias: Tensor | None,
    folder: Path,
    *,
    descending: bool,
) -> dict[str, Tensor]:
    """What the launches leave behind, by name; `out` is the result."""
    (tokens, columns), rows = x.shape, len(tensors["codes"])
    dynamic, index, wide = layout.outliers == "dynamic", tensors.get("outlier_index"), tensors.get("outlier_weight")
    loose, placed = dynamic or (index is not None and wide is None), wide is not None
    words, shares, stored = -(-columns // 32), 3, 0 if index is None else len(index)
    bfloat = x.dtype == torch.bfloat16
    capacity, placed_capacity = -(-columns // SLICE) * SLICE, -(-stored // SLICE) * SLICE
    place = torch.full((columns,), -1, dtype=torch.int16)
    if index is not None:
        place[index.long()] = torch.arange(stored, dtype=torch.int16)

    def garbage(*shape: int) -> Tensor:
        return torch.full(shape, torch.nan, dtype=x.dtype)

    made = {
        "flags": torch.full((shares, words), -1, dtype=torch.int32),
        "rounded": torch.full((tokens, columns), 77, dtype=torch.int8),
        "largest": torch.full((tokens,), torch.nan),
        "loose_inputs": garbage(tokens, capacity if loose else 0),
        "loose_weight": garbage(rows, capacity if loose else 0),
        "placed_inputs": garbage(tokens, placed_capacity),
        "placed_weight": garbage(rows, placed_capacity),
        "counts": torch.full((2,), -1, dtype=torch.int32),
        "out": torch.full((tokens, rows), torch.nan, dtype=x.dtype),
    }
    options = split_options(columns, bfloat=bfloat, loose=loose, placed=placed, counted=dynamic, early=False)
    source = source_of("words.cuh", "outlier_split.cu")
    if dynamic:
        program = built_once("mark_columns", MARK, source, options, folder)
        run_call(
            program,
            [x, made["flags"]],
            [-(-columns // 256) * shares, 256, 0, descending],
            [tokens, columns, -(-tokens // shares), int(layout.threshold)],
        )
    program = built_once("split_tokens", SPLIT, source, options, folder)
    given = [x, made["flags"], index, place, tensors["codes"], wide, *list(made.values())[1:8]]
    gathering = 3 if loose or placed else 0
    numbers = [tokens, rows, columns, stored, shares, capacity, placed_capacity, gathering]
    shared = 8 * words + 128 + 64 * words * (loose + placed)
    run_call(program, given, [gathering + 2, 256, shared, descending], numbers)
    tile = WideTile(128, 48, 3, 16)
    options = product_options(tile, Variant(bfloat, loose, placed, bias is not None), early=False)
    program = built_once("outlier_product", PRODUCT, product_source(tile.n), options, folder)
    buffers = [
        made["rounded"],
        tensors["codes"],
        *list(made.values())[3:7],
        made["largest"],
        tensors["absmax"],
        made["counts"],
        bias,
        made["out"],
    ]
    run_call(
        program,
        buffers,
        [min(2, tile.tiles(tokens, rows)), 384, -(-tile.shared // 1024) * 1024, descending],
        [tokens, rows, columns, capacity, placed_capacity, 1, 1],
    )
    return made


@pytest.mark.parametrize(
    ("case", "tokens", "rows", "columns", "loud", "dtype"),
    [
        ("dynamic", 150, 56, 400, 70, torch.bfloat16),
        ("dynamic cached", 37, 104, 272, 20, torch.float16),
        ("static cached", 130, 48, 144, 3, torch.bfloat16),
        ("none", 33, 24, 400, 0, torch.float16),
        ("static", 33, 16, 128, 0, torch.float16),
    ],
)
def test_product(
    boxes_of_maps: None, case: str, tokens: int, rows: int, columns: int, loud: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    x = inputs(tokens, columns, loud, dtype)
    layout, tensors = weight(rows, columns, case, dtype)
    bias = torch.linspace(-1, 1, rows).to(dtype) if tokens % 2 else None
    results = [emulated(x, layout, tensors, bias, tmp_path, descending=order) for order in (False, True)]
    made, other = results
    split = layout.split(x, tensors)
    assert torch.equal(made["rounded"], split.codes)
    assert torch.equal(made["largest"], split.absmax[:, 0])
    assert int(made["counts"].sum()) == len(split.outliers)
    assert torch.equal(made["out"], other["out"])
    plain = layout.linear(x.double(), tensors, rows, columns, bias)
    if layout.outliers == "dynamic" or loud:
        assert len(split.outliers) >= loud
    unit = torch.finfo(dtype).eps
    assert bool(((made["out"].double() - plain).abs() <= unit * plain.abs() + 1e-5 * plain.abs().max()).all())


def test_tiles_fit_and_fill_the_device() -> None:
    assert all(tile.shared <= 232448 for tile in TILES)  # bytes that a block on Hopper may have
    assert wide_tile(512, 11008, 132).tiles(512, 11008) <= 132  # one round
    assert wide_tile(512, 4096, 132).tiles(512, 4096) <= 132
    assert wide_tile(2048, 4096, 132).m == 256


def test_what_the_product_leaves_alone() -> None:
    assert not fits(torch.zeros(40, 64).half(), torch.zeros(8, 64, dtype=torch.int8))  # a CPU
