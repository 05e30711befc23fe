"""Turn the committed measurements of 8-bit layers into the tables of docs/kernels-int8.md.

    python benchmarks/int8_tables.py     # rewrites docs/generated/int8-kernels-*.md and history-of-int8-kernels.md

No number of those tables is typed by hand: a test runs this script's functions and compares.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
GENERATED = ROOT / "docs" / "generated"
READ = 4.24e12
SIXTEEN_BIT = 780e12
NAMES = {
    "none": "LLM.int8(), no outliers",
    "dynamic": "LLM.int8(), dynamic",
    "static": "LLM.int8(), static",
    "cached": "LLM.int8(), dynamic, cached",
    "int8-w8a8": "INT8 W8A8",
    "fp8-w8a8": "FP8 W8A8",
    "fp8-w8a16": "FP8 W8A16",
    "int8-w8a16": "INT8 W8A16",
    "fp4-w4a16": "E2M1 W4A16",
}


def int8_reports() -> dict[str, dict[str, Any]]:
    """Every committed measurement of 8-bit layers by device."""
    files = sorted(RESULTS.glob("int8-kernels-*.json"))
    return {path.stem.removeprefix("int8-kernels-"): json.loads(path.read_text(encoding="utf-8")) for path in files}


def floor_seconds(row: dict[str, Any]) -> float:
    """The larger of bytes over bandwidth and operations over the rate of the units that do them."""
    narrow = row["case"] in ("none", "dynamic", "static", "cached") or "a8" in row["case"] or "alone" in row["case"]
    operations = 2 * row["rows"] * row["columns"] * row["tokens"]
    return float(max(row["bytes_moved"] / READ, operations / (SIXTEEN_BIT * (2 if narrow else 1))))


def int8_table(report: dict[str, Any]) -> str:
    """Time, floor, rates and the gain over the dense product of one device, as Markdown."""
    lines = [
        f"{report['hardware']}, torch {report['torch']}, CUDA {report['cuda']}, {report['dtype']} inputs.",
        "",
        "| tokens, inputs to outputs | layer | µs | floor µs | TB/s | TOP/s | times dense | runs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report["records"]:
        measured = "bytes_moved" in row
        cells = [
            f"{row['tokens']}, {row['columns']} to {row['rows']}",
            NAMES.get(row["case"], row["case"]),
            f"{row['seconds'] * 1e6:.1f}",
            f"{floor_seconds(row) * 1e6:.1f}" if measured else "",
            f"{row['bytes_per_second'] / 1e12:.2f}" if measured else "",
            f"{row['operations_per_second'] / 1e12:.0f}" if measured else "",
            f"{row['times_dense']:.2f}",
            row["kernel"],
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def int8_history() -> dict[str, Any]:
    """The committed steps of work on the kernels."""
    history: dict[str, Any] = json.loads((RESULTS / "history-of-int8-kernels.json").read_text(encoding="utf-8"))
    return history


def int8_history_table(history: dict[str, Any]) -> str:
    """What was tried: change, prediction, outcome, and the times that followed, as Markdown."""
    cases = history["cases"]
    lines = [f"{history['hardware']}, bfloat16; times in µs of LLM.int8().", ""]
    for step in history["steps"]:
        lines.append(f"{step['name']}. {step['change']}. *Predicted*: {step['predicted']}. *Found*: {step['found']}.")
        lines.append("")
    lines += ["| step | " + " | ".join(cases) + " |", "|---|" + "---|" * len(cases)]
    for step in history["steps"]:
        times = [f"{step['seconds'][case] * 1e6:.1f}" if case in step["seconds"] else "" for case in cases]
        if any(times):
            lines.append(f"| {step['name']} | " + " | ".join(times) + " |")
    return "\n".join(lines) + "\n"


def contents() -> dict[str, str]:
    """Generated file name -> its text."""
    tables = {f"int8-kernels-{device}.md": int8_table(report) for device, report in int8_reports().items()}
    return tables | {"history-of-int8-kernels.md": int8_history_table(int8_history())}


def main() -> None:
    """Write everything."""
    GENERATED.mkdir(parents=True, exist_ok=True)
    for name, text in contents().items():
        (GENERATED / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
