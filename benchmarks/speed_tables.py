"""Turn the committed measurements of compression time into the tables of docs/speed.md.

    python benchmarks/speed_tables.py     # rewrites docs/generated/speed-*.md and history-of-compression.md

`compression_h200.json` holds reports of `random_llama.py` (keys `runs_...`) and of `compression_gpu.py` (key `steps`),
those that were measured; a test compares the tables with what this script makes of the files.
"""

from __future__ import annotations

import statistics
from typing import Any

from committed import load, markdown, write


def run_table(reports: list[dict[str, Any]]) -> str:
    """Runs of `random_llama.py`: one line each, as Markdown."""
    header = ["shape", "blocks made", "GPUs", "method", "wall time", "per block", "in the method", "whole model"]
    lines = []
    for report in reports:
        for row in report["rows"]:
            made, every = report["blocks_made"], report["blocks_of_shape"]
            block = statistics.median(row["seconds_per_block"][:-1] or row["seconds_per_block"])
            whole = row.get("extrapolated_seconds")
            method = row["method"]["method"] + (f" {row['method']['variant']}" if "variant" in row["method"] else "")
            cells = [
                report["shape"].upper() + (f" ({report['note']})" if "note" in report else ""),
                f"{made} of {every}",
                str(report["processes"]),
                method,
                f"{row['seconds']:.1f} s",
                f"{block:.2f} s",
                "" if row["method_seconds"] is None else f"{row['method_seconds']:.1f} s",
                "measured" if made == every else f"{whole:.0f} s, extrapolated",
                "" if row["peak_device_bytes"] is None else f"{row['peak_device_bytes'] / 1e9:.1f} GB",
            ]
            lines.append(cells)
    return "\n".join(markdown([*header, "device memory"], lines)) + "\n"


def step_table(report: dict[str, Any]) -> str:
    """Steps of `compression_gpu.py` beside the plain way, as Markdown."""
    times = report["milliseconds"]
    lines = ["| step | size | plain | here |", "|---|---|---|---|"]
    for item in times["columns"]:
        size = f"128 columns, {item['rows']} rows"
        plain = f"{item['plain']:.1f} ms " if "plain" in item else ""
        lines.append(f"| rounding with feedback | {size} | {plain}| {item['feedback'] * 1e3:.0f} µs |")
        lines.append(f"| coordinate descent | {size} | | {item['descent'] * 1e3:.0f} µs |")
    for item in times["products"]:
        size = f"{item['columns']} x {item['columns']} x {item['rows']}"
        error = f"{item['halves_error']:.1e} against {item['float32_error']:.1e}"
        lines.append(
            f"| H times a matrix, error {error} | {size} | {item['float32']:.2f} ms | {item['halves']:.2f} ms |"
        )
        pair = f"{item['update_float32']:.2f} ms | {item['update_halves']:.2f} ms"
        lines.append(f"| passing on 128 columns | {item['columns']} x 128 x {item['rows']} | {pair} |")
    for item in times["factors"]:
        pair = f"{item['by_inverse']:.1f} ms | {item['by_triangle']:.1f} ms"
        lines.append(f"| U, difference {item['difference']:.1e} | {item['columns']} columns | {pair} |")
    for item in times["moments"]:
        pair = f"{item['float32']:.2f} ms (whole, 16 bit: {item['whole']:.2f}) | {item['panels']:.2f} ms"
        lines.append(f"| second moments | 8 x 2048 x {item['columns']} | {pair} |")
    return "\n".join(lines) + "\n"


def layer_table(report: dict[str, Any]) -> str:
    """Whole layers of `compression_gpu.py`, as Markdown."""
    rows = []
    for item in report["layers"]:
        extra = [str(item[key]) for key in ("variant", "bits") if key in item]
        cells = [
            " ".join([item["method"], *extra]),
            f"{item['rows']} x {item['columns']}",
            f"{item['factor_seconds'] * 1e3:.0f} ms",
            f"{item['seconds'] * 1e3:.0f} ms",
        ]
        rows.append(cells)
    return "\n".join(markdown(["method", "rows x columns", "factor of H", "everything else"], rows)) + "\n"


def history_table(history: dict[str, Any]) -> str:
    """What was tried: change, prediction, outcome, as Markdown."""
    lines = [f"{history['hardware']}; {history['work']}.", ""]
    for step in history["steps"]:
        predicted = f" *Predicted*: {step['predicted']}." if step["predicted"] else ""
        lines.append(f"- **{step['name']}**: {step['change']}.{predicted} *Found*: {step['found']}.")
    lines += ["", "| step | seconds per block | in the method |", "|---|---|---|"]
    for step in history["steps"]:
        if step["block_seconds"] is not None:
            method = "" if step["method_seconds"] is None else f"{step['method_seconds']:.2f}"
            lines.append(f"| {step['name']} | {step['block_seconds']:.2f} | {method} |")
    return "\n".join(lines) + "\n"


def contents() -> dict[str, str]:
    """Generated file name -> its text."""
    measured = load("compression_h200.json")
    runs = [value for key, value in measured.items() if key.startswith("runs_")]
    runs.append(load("random_llama_7b.json"))
    steps = measured.get("steps")
    return {
        "speed-runs.md": run_table(runs),
        "speed-steps.md": step_table(steps) if steps else "Not measured yet.\n",
        "speed-layers.md": layer_table(steps) if steps else "Not measured yet.\n",
        "history-of-compression.md": history_table(load("history-of-compression.json")),
    }


if __name__ == "__main__":
    write(contents())
