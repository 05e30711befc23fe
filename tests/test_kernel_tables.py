"""The numbers of docs/kernels.md are those of the committed measurements."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_generated_kernel_tables_are_up_to_date():
    spec = importlib.util.spec_from_file_location("kernel_tables", ROOT / "benchmarks" / "kernel_tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    assert tables.kernel_reports()
    for name, text in tables.contents().items():
        written = (ROOT / "docs" / "generated" / name).read_text(encoding="utf-8")
        assert written == text, f"{name}: run python benchmarks/kernel_tables.py"
