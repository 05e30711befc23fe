"""Tables and plots of the frontier reports: quantisers by stored bits, 8 bits, pruning in the order of the literature.

Each method stands beside the best *dull baseline* (round to nearest or GPTQ on plain integer grids) that needs no more
bytes, because a method that loses to that is not worth its trouble.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from configurations import CONFIGURATIONS

COLUMNS = {
    "perplexity": "perplexity",
    "kl_divergence": "KL (nats)",
    "top1_agreement": "same top-1",
    "output_error": "output error",
    "cosine_similarity": "cosine",
}
DULL = ("RTN", "GPTQ")
COLOURS = {
    "RTN": "#888888",
    "GPTQ": "#1f77b4",
    "k-means": "#2ca02c",
    "BiLLM": "#d62728",
    "STBLLM": "#9467bd",
    "codebook": "#ff7f0e",
    "flexible": "#17becf",
    "recipe": "#8c564b",
}
EIGHT_BITS = 7.5
SLACK = 0.005  # bits: a baseline may be so much larger and still count as equal
PATTERNS = ("50 %", "4:8", "2:4")

Report = dict[str, Any]
Row = dict[str, Any]


def number(value: float) -> str:
    """Three to four significant digits, never in exponents below a million."""
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 1e6:
        return f"{value:.1e}"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.3g}" if abs(value) < 0.1 else f"{value:.3f}"


def family(name: str) -> str:
    """The family of a configuration."""
    return CONFIGURATIONS[name].family


def quantisers(report: Report) -> dict[str, Row]:
    """Rows below 8 bits that do not prune."""
    rows = report["rows"].items()
    return {k: row for k, row in rows if family(k) != "pruning" and row["stored_bits_layers"] < EIGHT_BITS}


def eight_bits(report: Report) -> dict[str, Row]:
    """Rows of about 8 bits that do not prune."""
    rows = report["rows"].items()
    return {k: row for k, row in rows if family(k) != "pruning" and row["stored_bits_layers"] >= EIGHT_BITS}


def judged_by(report: Report) -> str:
    """The metric that decides between two rows."""
    found = (key for key in COLUMNS if any(key in row["metrics"] for row in report["rows"].values()))
    return next(found)


def dull_rival(report: Report, name: str) -> str | None:
    """The best dull baseline that needs no more bytes than a configuration; None if none is that small."""
    key, row = judged_by(report), report["rows"][name]
    rivals = {
        other: values["metrics"][key]["value"]
        for other, values in report["rows"].items()
        if family(other) in DULL and other != name
        if values["stored_bits_layers"] <= row["stored_bits_layers"] + SLACK
    }
    return min(rivals, key=lambda other: rivals[other]) if rivals else None


def losers(report: Report, rows: dict[str, Row]) -> list[str]:
    """Configurations that lose to a dull baseline of no more bytes."""
    key = judged_by(report)
    out = []
    for name, row in rows.items():
        rival = dull_rival(report, name)
        if rival is None or family(name) in DULL:
            continue
        if report["rows"][rival]["metrics"][key]["value"] < row["metrics"][key]["value"]:
            out.append(name)
    return out


def table(report: Report, rows: dict[str, Row], *, short: bool = False) -> str:
    """A Markdown table by falling stored bits, the original first."""
    shown = [key for key in COLUMNS if any(key in row["metrics"] for row in report["rows"].values())]
    shown = shown[:2] if short else shown
    head = ["method", "stored bits, layers", "stored bits, file", *(COLUMNS[key] for key in shown)]
    head += [] if short else ["mean layer error", "against the best dull baseline of no more bytes"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    original = [number(report["original"][key]["value"]) if key in report["original"] else "" for key in shown]
    if shown[0] in report["original"]:
        cells = ["original", "", "", interval(report["original"], shown[0]), *original[1:]]
        lines.append("| " + " | ".join(cells + ([] if short else ["", ""])) + " |")
    for name, row in sorted(rows.items(), key=lambda item: (-round(item[1]["stored_bits_layers"], 3), item[0])):
        cells = [name, f"{row['stored_bits_layers']:.3f}", f"{row['stored_bits_file']:.3f}"]
        cells += [
            interval(row["metrics"], key) if index == 0 else _value(row["metrics"], key)
            for index, key in enumerate(shown)
        ]
        if not short:
            cells += [number(row["mean_layer_error"]), _rival_cell(report, name)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _rival_cell(report: Report, name: str) -> str:
    rival, key = dull_rival(report, name), judged_by(report)
    if family(name) in DULL:
        return ""
    if rival is None:
        return "none is that small"
    value = report["rows"][rival]["metrics"][key]["value"]
    verdict = "**loses** to" if value < report["rows"][name]["metrics"][key]["value"] else "beats"
    return f"{verdict} {rival}: {number(value)}"


def pruning_table(report: Report) -> str:
    """Methods by patterns, as the literature prints them, and the bytes that this costs."""
    key = judged_by(report)
    rows = {name: row for name, row in report["rows"].items() if family(name) == "pruning"}
    methods = list(dict.fromkeys(_without_pattern(name) for name in rows))
    lines = ["| method | " + " | ".join(PATTERNS) + " |", "|---|" + "---|" * len(PATTERNS)]
    lines.append(f"| original ({COLUMNS[key]}) |" + f" {_original(report, key)} |" * len(PATTERNS))
    for method in methods:
        cells = []
        for pattern in PATTERNS:
            row = rows.get(f"{method} {pattern}") or rows.get(method.replace("{}", pattern))
            cells.append("" if row is None else interval(row["metrics"], key))
        lines.append(f"| {method.replace('{}', '').strip()} | " + " | ".join(cells) + " |")
    bits = [
        next((row["stored_bits_layers"] for name, row in rows.items() if pattern in name), None) for pattern in PATTERNS
    ]
    lines.append("| *stored bits* | " + " | ".join("" if item is None else f"{item:.3f}" for item in bits) + " |")
    return "\n".join(lines) + "\n"


def _without_pattern(name: str) -> str:
    """`Wanda 4:8` -> `Wanda`; where the pattern does not come last it leaves `{}`."""
    pattern = next(pattern for pattern in PATTERNS if pattern in name)
    return name.removesuffix(f" {pattern}") if name.endswith(pattern) else name.replace(pattern, "{}")


def _original(report: Report, key: str) -> str:
    return number(report["original"][key]["value"]) if key in report["original"] else "0"


def interval(metrics: dict[str, Any], key: str) -> str:
    """A value with its interval."""
    if key not in metrics:
        return ""
    item = metrics[key]
    return f"{number(item['value'])} [{number(item['low'])}, {number(item['high'])}]"


def _value(metrics: dict[str, Any], key: str) -> str:
    return number(metrics[key]["value"]) if key in metrics else ""


def sections(report: Report) -> dict[str, str]:
    """Content of the generated files of one model, by the first part of their names."""
    out = {"frontier": table(report, quantisers(report)), "eight-bit": table(report, eight_bits(report))}
    if any(family(name) == "pruning" for name in report["rows"]):
        out["pruning"] = pruning_table(report)
    return out


def plot(model: str, report: Report, path: Path) -> None:
    """Stored bits of the layers against perplexity (or KL divergence, or output error), log scale."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {"svg.hashsalt": "whit", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    )
    import matplotlib.pyplot as plt

    key = judged_by(report)
    figure, axes = plt.subplots(figsize=(8.5, 5.4))
    labels: list[tuple[float, float, str, str]] = []
    for name_of_family, colour in COLOURS.items():
        points = sorted(
            (row["stored_bits_layers"], row["metrics"][key]["value"], name)
            for name, row in quantisers(report).items()
            if family(name) == name_of_family and row["stored_bits_layers"] < 5 and "damping" not in name
        )
        if not points:
            continue
        axes.plot([p[0] for p in points], [p[1] for p in points], "o", color=colour, label=name_of_family, markersize=6)
        labels += [(bits, value, name.removeprefix(name_of_family).strip(), colour) for bits, value, name in points]
    if key in report.get("original", {}):
        axes.axhline(report["original"][key]["value"], color="black", linewidth=0.8, linestyle="--", label="original")
    axes.set_yscale("log")
    axes.set_xlim(0.6, 5)
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
