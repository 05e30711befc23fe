"""Compiled loops kept on disk: damaged files are compiled again."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest

pytest.importorskip("numba")

import numba

from whit.kernels.cpu import cache, compiling

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "zeros": lambda content: bytes(len(content)),
    "other": lambda content: b"no such thing",
    "code": lambda content: content.replace(b".text", b".tixt"),
}


def triple(values: numpy.ndarray) -> None:
    """A loop to compile."""
    for place in range(len(values)):
        values[place] *= 3


def run() -> int:
    """Compile as a new process would, and use it; whether it came from disk."""
    loop: Any = compiling.compiled(triple)
    values = numpy.arange(5.0)
    loop(values)
    assert values.tolist() == [0, 3, 6, 9, 12]
    return sum(loop.stats.cache_hits.values())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("ending", "damage"),
    [("nbc", damage) for damage in DAMAGES] + [("nbi", damage) for damage in DAMAGES if damage != "code"],
)
def test_a_damaged_file_is_compiled_again(folder: Path, ending: str, damage: str) -> None:
    assert [run(), run()] == [0, 1]
    (path,) = folder.rglob(f"*.{ending}")
    whole = path.read_bytes()
    path.write_bytes(DAMAGES[damage](whole))
    assert path.read_bytes() != whole
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [run(), run()] == [0, 1]


def test_code_of_other_sources_is_not_taken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [run(), run()] == [0, 1]
    monkeypatch.setattr(cache, "sources_sum", lambda: "another")  # a function that the loop calls has changed
    assert [run(), run()] == [0, 1]


def test_the_sum_of_sources_is_that_of_all_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sums = []
    for text in ("one", "two"):
        (tmp_path / "cache.py").write_text("")
        (tmp_path / "helper.py").write_text(text)
        monkeypatch.setattr(cache, "__file__", str(tmp_path / "cache.py"))
        sums.append(cache.sources_sum.__wrapped__())
    assert sums[0] != sums[1]
    assert cache.sources_sum.__wrapped__() == sums[1]


@pytest.mark.parametrize("ending", ["nbi", "nbc"])
def test_a_damaged_step_is_compiled_again(folder: Path, ending: str) -> None:
    def hits() -> int:
        step = compiling._step.__wrapped__("block_steps.gate")
        assert ctypes.cast(step.address, ctypes.c_void_p).value
        return int(step.cache_hits)

    assert [hits(), hits()] == [0, 1]
    for path in folder.rglob(f"*.{ending}"):
        path.write_bytes(b"")
    assert [hits(), hits()] == [0, 1]


def test_a_file_that_cannot_be_replaced_costs_only_time(folder: Path) -> None:
    assert run() == 0
    (path,) = folder.rglob("*.nbi")
    path.unlink()
    path.mkdir()
    assert [run(), run()] == [0, 0]
