"""The speed tables of README and docs/decoding.md are those of the committed measurement."""

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


def test_generated_speed_tables_are_up_to_date(tables: ModuleType) -> None:
    report = tables.decode_report()
    assert tables.DENSE in report["rows"]
    written = (ROOT / "docs" / "generated" / "decode-7b.md").read_text(encoding="utf-8")
    assert written == tables.decode_table(report), "run python benchmarks/decode_tables.py"
    steps = (ROOT / "docs" / "generated" / "history-of-decoding.md").read_text(encoding="utf-8")
    assert steps == tables.history_table(tables.history()), "run python benchmarks/decode_tables.py"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme == tables.readme_with(readme, tables.readme_table(report)), "run python benchmarks/decode_tables.py"


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
