"""Turn committed benchmark JSON into the tables and plots that README and documentation show.

    python benchmarks/tables.py     # rewrites docs/generated/*.md, docs/images/frontier-*.svg, the README table

No number in the documentation is typed by hand: a test runs this script's functions and compares.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
GENERATED = ROOT / "docs" / "generated"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
README_MODEL = "smollm2-135m"
README_ROWS = (
    "RTN 4 (g64)",
    "GPTQ 4 (g64)",
    "GPTQ 3 (g64)",
    "GPTQ 2 (g64)",
    "GPTQ 2 (g64, order, clip)",
    "k-means 2 (128)",
    "BiLLM official",
    "BiLLM paper",
    "BiLLM whit",
    "k-means 2 (row, order)",
    "GPTQ 1 (g64, signs)",
)
COLUMNS = {
    "perplexity": "perplexity",
    "kl_divergence": "KL (nats)",
    "top1_agreement": "same top-1",
    "output_error": "output error",
    "cosine_similarity": "cosine",
}


def frontiers() -> dict[str, dict[str, Any]]:
    """Every committed frontier by model name."""
    files = sorted(RESULTS.glob("frontier-*.json"))
    return {path.stem.removeprefix("frontier-"): json.loads(path.read_text(encoding="utf-8")) for path in files}


def number(value: float) -> str:
    """Three to four significant digits, never in exponents below a million."""
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 1e6:
        return f"{value:.1e}"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.3g}" if abs(value) < 0.1 else f"{value:.3f}"


def table(report: dict[str, Any], names: tuple[str, ...] | None = None, *, short: bool = False) -> str:
    """A Markdown table, best stored bits last; the original first."""
    shown = [key for key in COLUMNS if any(key in row["metrics"] for row in report["rows"].values())]
    if short:
        shown = shown[:2]
    head = ["method", "stored bits, layers", "stored bits, file", *(COLUMNS[key] for key in shown)]
    if not short:
        head.append("mean layer error")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    original = [number(report["original"][key]["value"]) if key in report["original"] else "" for key in shown]
    if shown[0] in report["original"]:
        cells = ["original", "", "", _interval(report["original"], shown[0]), *original[1:]]
        lines.append("| " + " | ".join(cells + ([""] if not short else [])) + " |")
    rows = {name: row for name, row in report["rows"].items() if names is None or name in names}
    for name, row in sorted(rows.items(), key=lambda item: -item[1]["stored_bits_layers"]):
        cells = [name, f"{row['stored_bits_layers']:.3f}", f"{row['stored_bits_file']:.3f}"]
        cells += [
            _interval(row["metrics"], key) if index == 0 else _value(row["metrics"], key)
            for index, key in enumerate(shown)
        ]
        if not short:
            cells.append(number(row["mean_layer_error"]))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _interval(metrics: dict[str, Any], key: str) -> str:
    if key not in metrics:
        return ""
    item = metrics[key]
    return f"{number(item['value'])} [{number(item['low'])}, {number(item['high'])}]"


def _value(metrics: dict[str, Any], key: str) -> str:
    return number(metrics[key]["value"]) if key in metrics else ""


def int8_layer_table(report: dict[str, Any]) -> str:
    """Errors of the ways to treat outliers on the synthetic layer of `llm_int8.py`, as Markdown: mean of the seeds."""
    lines = [
        "| inputs and weights in INT8 | stored bits | output error | of the other columns' output |",
        "|---|---|---|---|",
    ]
    for label, row in report["layer"].items():
        means = [sum(row[key]) / len(row[key]) for key in ("errors", "quiet_errors")]
        lines.append(f"| {label} | {row['stored_bits']:.3f} | {number(means[0])} | {number(means[1])} |")
    return "\n".join(lines) + "\n"


def int8_planted_table(report: dict[str, Any]) -> str:
    """Perplexity and KL divergence of the planted models of `llm_int8.py`, as Markdown."""
    lines = ["| loudness | inputs and weights in INT8 | perplexity | KL (nats) |", "|---|---|---|---|"]
    seen = set()
    for row in report["planted"]:
        if row["factor"] not in seen:
            seen.add(row["factor"])
            lines.append(f"| {row['factor']} | original | {row['original']:.2f} | |")
        metrics = row["metrics"]
        lines.append(f"| | {row['row']} | {metrics['perplexity'][0]:.2f} | {number(metrics['kl_divergence'][0])} |")
    return "\n".join(lines) + "\n"


def run_table(report: dict[str, Any]) -> str:
    """Time, memory and bytes of `random_llama.py` runs, as Markdown."""
    lines = [
        "| method | wall time | in the method | peak device memory | peak host | file | bits, layers | bits, file |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        name = row["method"]["method"] + (f" {row['method']['variant']}" if "variant" in row["method"] else "")
        cells = [
            name,
            f"{row['seconds'] / 60:.1f} min",
            f"{row['method_seconds'] / 60:.1f} min",
            f"{row['peak_device_bytes'] / 1e9:.1f} GB",
            f"{row['peak_host_bytes'] / 1e9:.1f} GB",
            f"{row['file_bytes'] / 1e9:.2f} GB (was {row['original_file_bytes'] / 1e9:.2f})",
            f"{row['stored_bits_compressed']:.3f}",
            f"{row['stored_bits_file']:.3f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(model: str, report: dict[str, Any], path: Path) -> None:
    """Stored bits of the layers against perplexity (or KL divergence, or output error), log scale."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {"svg.hashsalt": "whit", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    )
    import matplotlib.pyplot as plt

    key = next(
        key
        for key in ("perplexity", "kl_divergence", "output_error")
        if any(key in r["metrics"] for r in report["rows"].values())
    )
    families = {"RTN": "#888888", "GPTQ": "#1f77b4", "k-means": "#2ca02c", "BiLLM": "#d62728"}
    figure, axes = plt.subplots(figsize=(7.5, 4.6))
    labels: list[tuple[float, float, str, str]] = []
    for family, colour in families.items():
        points = sorted(
            (row["stored_bits_layers"], row["metrics"][key]["value"], name)
            for name, row in report["rows"].items()
            if name.startswith(family) and row["stored_bits_layers"] < 5 and "damping" not in name
        )
        axes.plot([p[0] for p in points], [p[1] for p in points], "o", color=colour, label=family, markersize=6)
        labels += [(bits, value, name.removeprefix(family).strip(), colour) for bits, value, name in points]
    if key in report.get("original", {}):
        axes.axhline(report["original"][key]["value"], color="black", linewidth=0.8, linestyle="--", label="original")
    axes.set_yscale("log")
    axes.set_xlim(1, 5)
    axes.set_xlabel("stored bits per weight of the compressed layers (everything counted)")
    axes.set_ylabel(COLUMNS[key])
    axes.set_title(model, loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=8)
    axes.grid(True, which="major", axis="y", linewidth=0.3)
    figure.tight_layout()
    _write_labels(axes, labels)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _write_labels(axes: Any, labels: list[tuple[float, float, str, str]]) -> None:
    """Labels right of their points, pushed upwards where they would cover one another."""
    placed: list[tuple[float, float, float]] = []  # left and right end, height; pixels
    for bits, value, text, colour in sorted(labels, key=lambda item: item[1]):
        x, y = axes.transData.transform((bits, value))
        right, target = x + 12 + 5.2 * len(text), y
        while any(x < end and start < right and abs(target - height) < 10 for start, end, height in placed):
            target += 2
        placed.append((x, right, target))
        shift = (7, (target - y) * 72 / axes.figure.dpi - 3)
        axes.annotate(text, (bits, value), xytext=shift, textcoords="offset points", fontsize=7, color=colour)


def readme_with(text: str, content: str) -> str:
    """README text with the part between the markers replaced."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + "\n" + content + rest[rest.index(END) :]


def main() -> None:
    """Write everything."""
    GENERATED.mkdir(parents=True, exist_ok=True)
    run = json.loads((RESULTS / "random_llama_7b.json").read_text(encoding="utf-8"))
    (GENERATED / "random-llama-7b.md").write_text(run_table(run), encoding="utf-8")
    int8 = json.loads((RESULTS / "llm_int8.json").read_text(encoding="utf-8"))
    (GENERATED / "llm-int8-layer.md").write_text(int8_layer_table(int8), encoding="utf-8")
    (GENERATED / "llm-int8-planted.md").write_text(int8_planted_table(int8), encoding="utf-8")
    for model, report in frontiers().items():
        (GENERATED / f"frontier-{model}.md").write_text(table(report), encoding="utf-8")
        plot(model, report, ROOT / "docs" / "images" / f"frontier-{model}.svg")
        if model == README_MODEL:
            readme = ROOT / "README.md"
            readme.write_text(
                readme_with(readme.read_text(encoding="utf-8"), table(report, README_ROWS, short=True)),
                encoding="utf-8",
            )


if __name__ == "__main__":
    main()
