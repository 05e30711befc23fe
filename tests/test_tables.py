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


def test_what_a_machine_can_do_becomes_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    report = {
        "hardware": "A GPU",
        "torch": "2.11",
        "cuda": "13.0",
        "read_bytes_per_second": 4.236e12,
        "copy_bytes_per_second": 3.9e12,
        "operations_per_second": {"float16": 7.78e14, "int8": 1.5e15},
        "cycles_per_instruction": {"LOP3": {"1": 2.004, "16": 1.998}, "mma": {"1": 16.5, "16": 6.1}},
    }
    table = importlib.import_module("kernel_tables").machine_table(report)
    assert "Reading 4.24 TB/s, copying 3.90 TB/s" in table
    assert "float16 778, int8 1500." in table
    assert "| cycles of a scheduler per instruction of 32 lanes | 1 warp | 16 warps |" in table
    assert table.endswith("| LOP3 | 2.00 | 2.00 |\n| mma | 16.50 | 6.10 |\n")
