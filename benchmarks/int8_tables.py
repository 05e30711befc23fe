"""Turn the committed measurements of 8-bit layers into the tables of docs/kernels-int8.md.

    python benchmarks/int8_tables.py     # rewrites docs/generated/int8-kernels-*.md and history-of-int8-kernels.md

No number of those tables is typed by hand: a test runs this script's functions and compares.
"""

from __future__ import annotations

from typing import Any

from committed import load, load_all, markdown, numbered_steps, write

MACHINE = load("machine-h200.json")
READ = MACHINE["read_bytes_per_second"]
SIXTEEN_BIT = MACHINE["operations_per_second"]["bfloat16"]
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
    ]
    header = ["tokens, inputs to outputs", "layer", "µs", "floor µs", "TB/s", "TOP/s", "times dense", "runs"]
    rows = []
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
        rows.append(cells)
    return "\n".join(lines + markdown(header, rows)) + "\n"


def outliers_table(report: dict[str, Any]) -> str:
    """Time against the number of outlier columns, and the gain over the dense product, as Markdown."""
    shape = f"{report['columns']} inputs, {report['rows']} outputs"
    lines = [f"{report['hardware']}, torch {report['torch']}, bfloat16, {shape}; µs, and times dense.", ""]
    tokens = list(dict.fromkeys(row["tokens"] for row in report["records"]))
    found = {(row["tokens"], row["outliers"]): row["seconds"] for row in report["records"]}
    rows = []
    for outliers in dict.fromkeys(row["outliers"] for row in report["records"]):
        cells = [f"{found[count, outliers] * 1e6:.1f}" for count in tokens]
        if outliers is not None:
            gains = [f"{found[count, None] / found[count, outliers]:.2f}" for count in tokens]
            cells = [f"{cell} ({gain})" for cell, gain in zip(cells, gains, strict=True)]
        rows.append(["dense" if outliers is None else str(outliers), *cells])
    return "\n".join(lines + markdown(["outlier columns", *(f"{count} tokens" for count in tokens)], rows)) + "\n"


def contents() -> dict[str, str]:
    """Generated file name -> its text."""
    history = load("history-of-int8-kernels.json")
    introduction = f"{history['hardware']}, bfloat16; times in µs of LLM.int8()."
    tables = {f"int8-kernels-{device}.md": int8_table(report) for device, report in load_all("int8-kernels-").items()}
    tables |= {
        f"int8-outliers-{device}.md": outliers_table(item) for device, item in load_all("int8-outliers-").items()
    }
    return tables | {"history-of-int8-kernels.md": numbered_steps(history, introduction)}


if __name__ == "__main__":
    write(contents())
