"""The numbers of docs/cpu.md are those of the committed measurements."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_generated_cpu_tables_are_up_to_date():
    spec = importlib.util.spec_from_file_location("cpu_tables", ROOT / "benchmarks" / "cpu_tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    assert len(tables.contents()) == 4
    for name, text in tables.contents().items():
        written = (ROOT / "docs" / "generated" / name).read_text(encoding="utf-8")
        assert written == text, f"{name}: run python benchmarks/cpu_tables.py"
