"""Turn the committed measurements of kernels into the tables of docs/kernels.md.

    python benchmarks/kernel_tables.py     # rewrites docs/generated/kernels-*.md and history-of-kernels.md

No number of those tables is typed by hand: a test runs this script's functions and compares.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
GENERATED = ROOT / "docs" / "generated"


def kernel_reports() -> dict[str, dict[str, Any]]:
    """Every committed measurement of kernels by device."""
    files = sorted(RESULTS.glob("kernels-*.json"))
    return {path.stem.removeprefix("kernels-"): json.loads(path.read_text(encoding="utf-8")) for path in files}


def kernel_table(report: dict[str, Any]) -> str:
    """Time, bytes, floor and bandwidth of the packed products of one device, as Markdown.

    The floor is the larger of bytes over bandwidth and operations over the measured float16 rate; the bandwidth is the
    highest that the copy or any record of the run reached.
    """
    limits = report["ceilings"]
    reached = max(limits["copy_bytes_per_second"], *(row["bytes_per_second"] for row in report["records"]))
    lines = [
        f"{report['hardware']}, torch {report['torch']}, CUDA {report['cuda']}, {report['dtype']} inputs, kernels of "
        f"step {report['step']} below. Highest bandwidth of the run {reached / 1e12:.2f} TB/s, 8192 x 8192 x 8192 "
        f"float16 product {limits['float16_operations_per_second'] / 1e12:.0f} TFLOP/s.",
        "",
        "| outputs x inputs | vectors | weight | bits | µs | floor µs | TB/s | times dense | kernel |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["records"]:
        bandwidth = row["bytes_moved"] / reached
        arithmetic = 2 * row["rows"] * row["columns"] * row["vectors"] / limits["float16_operations_per_second"]
        cells = [
            f"{row['rows']} x {row['columns']}",
            str(row["vectors"]),
            row["format"],
            f"{row['bits_per_weight']:.3f}",
            f"{row['seconds'] * 1e6:.1f}",
            f"{max(bandwidth, arithmetic) * 1e6:.1f}",
            f"{row['bytes_per_second'] / 1e12:.2f}",
            f"{row['times_dense']:.2f}",
            row["kernel"].removeprefix("cuda "),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def kernel_history() -> dict[str, Any]:
    """The committed steps of work on the kernels."""
    history: dict[str, Any] = json.loads((RESULTS / "history-of-kernels.json").read_text(encoding="utf-8"))
    return history


def kernel_history_table(history: dict[str, Any]) -> str:
    """What was tried on the kernels: change, prediction, and the times that followed, as Markdown."""
    cases = history["cases"]
    lines = [f"{history['hardware']}, float16.", ""]
    for step in history["steps"]:
        lines.append(f"{step['name']}. {step['change']}. *Predicted*: {step['predicted']}. *Found*: {step['found']}.")
    lines += ["", "| step | " + " | ".join(cases) + " |", "|---|" + "---|" * len(cases)]
    for step in history["steps"]:
        times = [f"{step['seconds'][case] * 1e6:.1f}" if case in step["seconds"] else "" for case in cases]
        if any(times):
            lines.append(f"| {step['name']} | " + " | ".join(times) + " |")
    return "\n".join(lines) + "\n"


def contents() -> dict[str, str]:
    """Generated file name -> its text."""
    tables = {f"kernels-{device}.md": kernel_table(report) for device, report in kernel_reports().items()}
    return tables | {"history-of-kernels.md": kernel_history_table(kernel_history())}


def main() -> None:
    """Write everything."""
    GENERATED.mkdir(parents=True, exist_ok=True)
    for name, text in contents().items():
        (GENERATED / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
