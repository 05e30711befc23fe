"""Launch shapes of Triton kernels: what fits, what is kept, and what is taken."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from whit.kernels import launching
from whit.kernels.launching import Tile, choose_tile, default_tile, fitted, keep_tuned, tile_key, tuned_tiles, use_tile

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WHIT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuned_tiles.cache_clear()
    yield tmp_path
    tuned_tiles.cache_clear()


def test_found_shapes_are_kept_and_taken() -> None:
    key, tile = tile_key("outlier-int8", 500, 64, 96), Tile(64, 64, 32, 4, 2)
    keep_tuned("interpreter", {key: tile})
    assert tuned_tiles("interpreter")[key] == tile
    assert choose_tile("outlier-int8", 512, 64, 96, CPU) == tile
    assert choose_tile("outlier-int8", 513, 64, 96, CPU) != tile
    use_tile("interpreter", key, None)
    assert choose_tile("outlier-int8", 512, 64, 96, CPU) != tile


def test_a_shape_that_needs_the_copy_engine_is_not_taken_without_it() -> None:
    key = tile_key("outlier-int8", 512, 64, 96)
    use_tile("interpreter", key, Tile(64, 64, 32, 4, 2, descriptor=True))
    assert not choose_tile("outlier-int8", 512, 64, 96, CPU).descriptor


def test_files_that_cannot_be_read_change_nothing(folder: Path) -> None:
    path = launching.tuning_file("interpreter")
    path.parent.mkdir(parents=True)
    for text in ("{", "[]", '{"a": {"warps": 1}}', '{"a": 1}'):
        path.write_text(text, encoding="utf-8")
        tuned_tiles.cache_clear()
        assert tuned_tiles("interpreter") == {}


@pytest.mark.parametrize("tokens", [1, 2, 16, 33, 64, 65, 300, 5000])
@pytest.mark.parametrize("room", [99 << 10, 163 << 10, 227 << 10])
def test_default_shapes_fit_small_and_large_devices(tokens: int, room: int) -> None:
    for rows, columns in [(64, 64), (4096, 4096), (32000, 8192)]:
        for input_bytes in (1, 2):
            tile = fitted(default_tile(tokens, rows, columns, True, 132), input_bytes, room)
            if tokens > 1:
                assert tile.stages * tile.k * (input_bytes * tile.m + tile.n) + 64 * (tile.m + tile.n) < room
            for size in (tile.m, tile.n, tile.k, tile.warps):
                assert size > 0 and size & (size - 1) == 0


def test_a_full_device_says_nothing_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it works is asked once, and must not be answered by what was wrong at that moment."""

    def full(*size: int, **options: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setitem(sys.modules, "whit.kernels.triton.probe", SimpleNamespace(one={(1,): lambda tensor: None}))
    launching._works.cache_clear()
    with monkeypatch.context() as moment:
        moment.setattr(torch, "empty", full)
        with pytest.raises(torch.OutOfMemoryError):
            launching._works(7)
    monkeypatch.setattr(torch, "empty", lambda *size, **options: None)
    assert launching._works(7)
    launching._works.cache_clear()
