"""Files of launch shapes: what is in them may be anything, and no kernel gets what it is not written for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from whit.errors import OutputError
from whit.formats.bits import packed_width
from whit.formats.level_table import LevelTable
from whit.kernels import cuda_tuned, launching
from whit.kernels.cuda_layout import WHOLE_ROW, Layout, layout_of
from whit.kernels.cuda_plan import choose
from whit.kernels.cuda_shapes import Outside, Shape, gemv_shapes
from whit.kernels.cuda_step import place_step
from whit.kernels.cuda_tuned import tuned_shapes, tuning_key
from whit.kernels.cuda_wide import Decode, WideShape
from whit.kernels.cuda_wide_plan import wide_shapes
from whit.kernels.found import keep_shapes
from whit.kernels.launching import Tile, choose_tile, tile_key, tuned_tiles

H200 = (132, 232448)
GOOD = {"threads": 256, "item": 256, "unroll": 2, "bitwise": True, "resident": 1, "share": 1}
TILE = {"m": 64, "n": 64, "k": 32, "warps": 4, "stages": 2, "group": 8, "descriptor": False, "tail": 0}
ABSURD = (0, -1, 3, 10**30, 256.0, True, "512", None, [1], {})


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WHIT_CACHE", str(tmp_path))
    tuned_shapes.cache_clear()
    tuned_tiles.cache_clear()
    yield tmp_path / "kernels"
    tuned_shapes.cache_clear()
    tuned_tiles.cache_clear()


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    tuned_shapes.cache_clear()
    tuned_tiles.cache_clear()


@pytest.mark.parametrize("field", GOOD)
def test_absurd_shapes_are_never_launched(field: str) -> None:
    layout = layout_of(LevelTable(2, 128), 4096)
    assert layout is not None
    key, other = (tuning_key(layout, rows, 4096, 1) for rows in (512, 1024))
    wanted = choose("No Such GPU", layout, 512, 4096, 1, *H200)
    for value in ABSURD:
        write(cuda_tuned.tuning_file("No Such GPU"), {key: {**GOOD, field: value}, other: GOOD})
        found = choose("No Such GPU", layout, 512, 4096, 1, *H200)
        assert found == wanted or found.shape in gemv_shapes(layout, True, True)
        assert tuned_shapes("No Such GPU")[other] == Shape(256, 256, 2, True), "one bad entry spoils no other"


@pytest.mark.parametrize("field", TILE)
def test_absurd_tiles_are_never_launched(field: str) -> None:
    cpu = torch.device("cpu")
    key, other = (tile_key("outlier-int8", tokens, 64, 96) for tokens in (512, 1))
    for value in (*ABSURD, 1, 2, 1024):
        write(launching.tuning_file("interpreter"), {key: {**TILE, field: value}, other: TILE})
        tile = choose_tile("outlier-int8", 512, 64, 96, cpu)
        assert all(type(size) is int and size >= 16 and not size & size - 1 for size in (tile.m, tile.n, tile.k))
        assert tile.warps in (1, 2, 4, 8, 16, 32)
        assert 1 <= tile.stages <= 8
        assert tile.group >= 1
        assert tile.m * tile.n <= 512 * 512
        assert choose_tile("outlier-int8", 1, 64, 96, cpu) == Tile(**TILE), "one bad entry spoils no other"  # type: ignore[arg-type]


def test_every_shipped_shape_is_one_that_its_kernel_is_written_for() -> None:
    found = tuned_shapes("NVIDIA H200")
    assert len(found) > 100
    assert len(tuned_tiles("NVIDIA H200")) > 10
    for key, shape in found.items():
        kind, group, size, tokens, *together = key.split("/")
        numbers = [int(part) for part in kind.split("-") if part != "zeros"]
        rows, columns = (int(part) for part in size.split("x"))
        width = WHOLE_ROW if group == "row" else int(group)
        groups = 1 if group == "row" else 2 if width == WHOLE_ROW else -(-columns // width)
        packed = packed_width(columns, numbers[1])
        names = ("a", "b", "c", "d", "e")
        layout = Layout(*numbers[:2], numbers[2], "zeros" in kind, width, packed, groups, names, tuple(numbers[3:]))
        assert "/".join([tuning_key(layout, rows, columns, int(tokens)), *together]) == key
        if together and together[-1] in ("step", "gated"):
            parts = [int(part) for part in together[0].split("+")] if len(together) > 1 else [rows]
            placed = place_step(layout, parts, columns, *H200, shape, gated=together[-1] == "gated")
            assert (placed is None) == (shape == Outside()), key
        elif together:  # several weights in one launch
            assert sum(map(int, together[0].split("+"))) == rows
            assert shape in gemv_shapes(layout, True, True), key
        elif isinstance(shape, WideShape):
            assert shape in wide_shapes(layout, int(tokens), columns, H200[1]), key
        elif not isinstance(shape, Decode):
            assert choose("NVIDIA H200", layout, rows, columns, int(tokens), *H200).shape == shape, key


def test_what_was_shipped_is_not_kept_as_found() -> None:
    layout = layout_of(LevelTable(2, 128), 4096)
    assert layout is not None
    key = tuning_key(layout, 77, 4096, 1)
    cuda_tuned.keep_tuned("NVIDIA H200", {key: Shape(256, 256, 2, True)})
    assert set(json.loads(cuda_tuned.tuning_file("NVIDIA H200").read_text())) == {key}
    assert len(tuned_shapes("NVIDIA H200")) > 100
    launching.keep_tuned("NVIDIA H200", {"a": Tile(64, 64, 32, 4, 2)})
    launching.keep_tuned("NVIDIA H200", {"b": Tile(64, 64, 32, 4, 2)})
    assert set(json.loads(launching.tuning_file("NVIDIA H200").read_text())) == {"a", "b"}


def test_a_folder_that_cannot_be_written_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.parent.mkdir(exist_ok=True)
    folder.write_text("a file where the folder would be")
    with pytest.raises(OutputError, match=r"'a.json' .* set WHIT_CACHE"):
        keep_shapes("a.json", {"a": Tile(64, 64, 32, 4, 2)}, lambda values: values)
    monkeypatch.delenv("WHIT_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def no_home() -> None:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(launching.Path, "home", no_home)
    with pytest.raises(OutputError, match="set WHIT_CACHE"):
        keep_shapes("a.json", {"a": Tile(64, 64, 32, 4, 2)}, lambda values: values)
    assert len(tuned_tiles("NVIDIA H200")) > 10
