"""Tables and plots of the frontier reports: quantisers by stored bits, 8 bits, pruning in the order of the literature.

Each method stands beside the best *dull baseline* (round to nearest or GPTQ on plain integer grids) that needs no more
bytes, because a method that loses to that is not worth its trouble.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
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
    """Stored bits of the layers against perplexity (or KL divergence, or output error), log scale, and their front."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {"svg.hashsalt": "whit", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    )
    import matplotlib.pyplot as plt

    key = judged_by(report)
    figure, axes = plt.subplots(figsize=(8.5, 5.8))
    points = [
        Point(row["stored_bits_layers"], row["metrics"][key]["value"], name, family(name))
        for name, row in quantisers(report).items()
        if row["stored_bits_layers"] < 5 and "damping" not in name and family(name) in COLOURS
    ]
    front = pareto_front(points)
    axes.step([p.bits for p in front], [p.value for p in front], where="post", color="0.75", linewidth=1, zorder=1)
    for name_of_family, colour in COLOURS.items():
        own = [p for p in points if p.family == name_of_family]
        if own:
            axes.plot(
                [p.bits for p in own], [p.value for p in own], "o", color=colour, label=name_of_family, markersize=6
            )
    if key in report.get("original", {}):
        axes.axhline(report["original"][key]["value"], color="black", linewidth=0.8, linestyle="--", label="original")
    axes.set_yscale("log")
    axes.set_xlim(0.6, 5)
    axes.set_xlabel("stored bits per weight of the compressed layers (everything counted)")
    axes.set_ylabel(COLUMNS[key])
    axes.set_title(f"{model}; the line: best so far for no more bits", loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=8, loc="upper right")
    axes.grid(True, which="major", axis="y", linewidth=0.3)
    figure.tight_layout()
    _write_labels(axes, front + [p for p in points if p not in front], points)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


@dataclass(frozen=True)
class Point:
    """One row in the plot."""

    bits: float
    value: float
    name: str
    family: str

    @property
    def label(self) -> str:
        """Its name without that of its family, which the colour tells."""
        return self.name.removeprefix(self.family).strip()


def pareto_front(points: list[Point]) -> list[Point]:
    """The points that no other of no more bits equals, by rising bits."""
    front: list[Point] = []
    for point in sorted(points, key=lambda item: (item.bits, item.value)):
        if not front or point.value < front[-1].value:
            front.append(point)
    return front


def _write_labels(axes: Any, wanted: list[Point], points: list[Point]) -> None:
    """Labels beside their points, where one fits without covering a point or a label; the first wanted go first."""
    pixels = axes.figure.dpi / 72
    taken = [(x - 4, y - 4, x + 4, y + 4) for p in points for x, y in [axes.transData.transform((p.bits, p.value))]]
    for point in wanted:
        x, y = axes.transData.transform((point.bits, point.value))
        width, height = 3.9 * pixels * len(point.label), 7.5 * pixels
        for left, bottom in (
            (x + 4, y + 4),
            (x + 7, y - height / 2),
            (x - 7 - width, y - height / 2),
            (x + 5, y - 6 - height),
            (x - 5 - width, y + 6),
            (x - 5 - width, y - 6 - height),
        ):
            box = (left, bottom, left + width, bottom + height)
            inside = axes.bbox.x0 < left and box[2] < axes.bbox.x1 and axes.bbox.y0 < bottom
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                shift = ((left - x) / pixels, (bottom - y) / pixels + 1)
                axes.annotate(
                    point.label,
                    (point.bits, point.value),
                    xytext=shift,
                    textcoords="offset points",
                    fontsize=7,
                    color=COLOURS[point.family],
                )
                break


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
