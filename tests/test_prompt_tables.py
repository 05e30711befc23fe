"""What the table of prompts in docs/decoding.md makes of a report."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_a_format_that_was_not_measured_at_a_length_leaves_its_cells_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    tables = importlib.import_module("prompt_tables")
    dense = {"host_milliseconds": 6.04, "milliseconds": 45.0, "first_host_milliseconds": 7.0}
    report = {
        "hardware": "a device",
        "versions": {"torch": "2", "transformers": "5"},
        "busy": 3,
        "rows": {
            tables.DENSE: {"2048": dense, "8": dense},
            "k-means": {"2048": dense | {"milliseconds": 50.0}},
            "signs": {"error": "out of memory"},
        },
    }
    lines = tables.prompt_table(report).splitlines()
    assert "3 processes computed beside" in lines[0]
    assert lines[4] == "| bfloat16 | 6.0 | 45.0 | 1.00 | 6.0 | 45.0 | 1.00 |"
    assert lines[5] == "| k-means | 6.0 | 50.0 | 0.90 |  |  |  |"
    assert lines[6] == "| signs |  |  |  |  |  |  |"
