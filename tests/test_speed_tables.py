"""What the tables of docs/speed.md make of a report."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_steps_and_layers_become_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    tables = importlib.import_module("speed_tables")
    product = dict.fromkeys(("float32", "halves", "halves_error", "float32_error"), 1e-3)
    report = {
        "milliseconds": {
            "columns": [{"rows": 4096, "feedback": 0.0204, "descent": 0.03, "plain": 4.2}],
            "products": [{"columns": 64, "rows": 32, **product, "update_float32": 0.5, "update_halves": 0.25}],
            "factors": [{"columns": 64, "by_inverse": 3.0, "by_triangle": 1.0, "difference": 1e-6}],
            "moments": [{"columns": 64, "whole": 1.0, "panels": 0.5, "float32": 9.0}],
        },
        "layers": [{"method": "gptq", "bits": 4, "rows": 8, "columns": 16, "factor_seconds": 0.002, "seconds": 0.0305}],
    }
    assert "| rounding with feedback | 128 columns, 4096 rows | 4.2 ms | 20 µs |" in tables.step_table(report)
    assert "| gptq 4 | 8 x 16 | 2 ms | 30 ms |" in tables.layer_table(report)
