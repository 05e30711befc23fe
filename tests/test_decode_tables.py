"""What the speed tables of README and docs/decoding.md make of a report."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def tables() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield importlib.import_module("decode_tables")
    finally:
        sys.path.pop(0)


def test_rows_that_failed_or_were_disturbed_are_left_out(tables: ModuleType) -> None:
    step = {
        "milliseconds_per_token": 2.0,
        "spread_milliseconds": 0.01,
        "tokens_per_second": 500.0,
        "way": "fused",
        "graph": True,
        "peak_bytes": 1e9,
        "products": "joined",
    }
    dense = {
        "hardware": "a device",
        "batch 1": step,
        "resident_bytes": 1e10,
        "prefill_milliseconds": 10.0,
        "prefill_spread_milliseconds": 0.1,
    }
    half = {"batch 1": step | {"milliseconds_per_token": 1.0, "tokens_per_second": 1000.0}, "resident_bytes": 2e9}
    report = {
        "versions": {"torch": "2", "transformers": "5"},
        "prompt": 1,
        "new_tokens": 2,
        "prefill": 3,
        "rows": {tables.DENSE: dense, "k-means 2 (row)": half, "signs (g128)": {"error": "out of memory"}},
    }
    text = tables.readme_table(report)
    assert "| k-means 2 (row) | 16.000 | 1,000 | 2.00 |  | 2.00 |" in text
    half["batch 1"]["spread_milliseconds"] = 0.2
    assert "k-means" not in tables.readme_table(report)
    assert "1,000" not in tables.decode_table(report)
    assert "signs" not in text + tables.decode_table(report)
