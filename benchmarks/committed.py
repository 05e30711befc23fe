"""The committed measurements and what is made of them: where they lie, and the pieces that all tables share."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
GENERATED = ROOT / "docs" / "generated"

Report = dict[str, Any]


def load(name: str) -> Report:
    """One committed report, by file name."""
    report: Report = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return report


def load_all(prefix: str) -> dict[str, Report]:
    """Every committed report whose name begins so, by the rest of its name."""
    return {path.stem.removeprefix(prefix): load(path.name) for path in sorted(RESULTS.glob(f"{prefix}*.json"))}


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """The lines of a Markdown table."""
    names = list(header)
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return lines + ["| " + " | ".join(cells) + " |" for cells in rows]


def numbered_steps(history: Report, introduction: str) -> str:
    """Steps of work on kernels, as Markdown: change, prediction and outcome, then the times of the cases they moved."""
    lines = [introduction, ""]
    for step in history["steps"]:
        lines += [f"{step['name']}. {step['change']}. *Predicted*: {step['predicted']}. *Found*: {step['found']}.", ""]
    rows = []
    for step in history["steps"]:
        times = [f"{step['seconds'][case] * 1e6:.1f}" if case in step["seconds"] else "" for case in history["cases"]]
        if any(times):
            rows.append([step["name"], *times])
    return "\n".join(lines + markdown(["step", *history["cases"]], rows)) + "\n"


def with_part(text: str, begin: str, end: str, content: str) -> str:
    """A text with the part between two markers replaced."""
    before, rest = text.split(begin)
    return before + begin + "\n" + content + rest[rest.index(end) :]


def write(contents: dict[str, str]) -> None:
    """Write generated files: file name -> text."""
    GENERATED.mkdir(parents=True, exist_ok=True)
    for name, text in contents.items():
        (GENERATED / name).write_text(text, encoding="utf-8")
