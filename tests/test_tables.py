"""The committed frontiers, and what tables and plots make of them."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tables() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("tables")


def test_bits_in_the_results_are_stored_bytes(tables: ModuleType) -> None:
    parameters = {"smollm2-135m": 134_515_008}
    for model, report in tables.load_all("frontier-").items():
        for name, row in report["rows"].items():
            assert row["stored_bits_layers"] > 0.5, name
            if model in parameters:
                assert row["stored_bits_file"] == pytest.approx(row["file_bytes"] * 8 / parameters[model], abs=1e-6)


def test_the_pruning_table_is_that_of_the_committed_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    layers = importlib.import_module("pruning_layers")
    rows = json.loads((ROOT / "benchmarks" / "results" / "pruning_layers.json").read_text(encoding="utf-8"))["rows"]
    assert (ROOT / "docs" / "generated" / "pruning-layers.md").read_text(encoding="utf-8") == layers.table(rows)
    made = {(label, column): method for label, row in layers.configurations().items() for column, method in row.items()}
    assert {(row["label"], row["pattern"]): row["method"] for row in rows} == {
        key: method.to_json() for key, method in made.items()
    }


def test_the_front_holds_what_no_smaller_row_equals(tables: ModuleType) -> None:
    point = importlib.import_module("frontier_tables").Point
    rows = [(2.0, 5.0), (1.0, 9.0), (3.0, 5.0), (2.0, 4.0), (2.5, 6.0), (4.0, 1.0)]
    points = [point(bits, value, "BiLLM x", "BiLLM") for bits, value in rows]
    front = importlib.import_module("frontier_tables").pareto_front(points)
    assert [(item.bits, item.value) for item in front] == [(1.0, 9.0), (2.0, 4.0), (4.0, 1.0)]
    assert front[0].label == "x"
