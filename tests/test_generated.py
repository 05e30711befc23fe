"""The tables of README and documentation are those that the committed measurements make, and nothing else."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {
    "tables": {"frontier-smollm2-135m.md", "billm-layers.md", "random-llama-7b.md"},
    "kernel_tables": {"kernels-h200.md", "machine-h200.md", "history-of-kernels.md"},
    "int8_tables": {"int8-kernels-h200.md", "history-of-int8-kernels.md"},
    "speed_tables": {"speed-runs.md", "history-of-compression.md"},
    "decode_tables": {"decode-7b.md", "history-of-decoding.md"},
    "prompt_tables": {"prompts-7b.md", "history-of-prompts.md"},
    "cpu_tables": {"cpu-layers.md", "history-of-cpu-decoding.md"},
}
"""Script under benchmarks/ and some of the files it makes."""


@pytest.fixture(autouse=True)
def benchmarks_are_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_generated_tables_are_up_to_date(script: str) -> None:
    found = importlib.import_module(script).contents()
    assert set(found) >= SCRIPTS[script]
    for name, text in found.items():
        written = (ROOT / "docs" / "generated" / name).read_text(encoding="utf-8")
        assert written == text, f"{name}: run python benchmarks/{script}.py"


@pytest.mark.parametrize("script", ["tables", "decode_tables"])
def test_readme_shows_the_committed_numbers(script: str) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert importlib.import_module(script).readme_with(readme) == readme, f"run python benchmarks/{script}.py"


def test_every_generated_table_is_shown() -> None:
    shown = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").rglob("*.md"))
    for path in (ROOT / "docs" / "generated").glob("*.md"):
        assert f'--8<-- "docs/generated/{path.name}"' in shown, path.name
