"""The numbers of docs/kernels-int8.md are those of the committed measurements."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_generated_tables_of_8_bit_layers_are_up_to_date():
    spec = importlib.util.spec_from_file_location("int8_tables", ROOT / "benchmarks" / "int8_tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    assert tables.int8_reports()
    for name, text in tables.contents().items():
        written = (ROOT / "docs" / "generated" / name).read_text(encoding="utf-8")
        assert written == text, f"{name}: run python benchmarks/int8_tables.py"
