"""Numbers as people read them, and the before/after rows that the terminal, the card and the page all show."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from whit.report.record import EvaluationRecord, LayerRecord, MetricRecord, Result

LONGEST_FACT = 200
NUMBER = re.compile(r"\d+(\.\d+)?(e[+-]?\d+)?")
_METRIC_LABELS = {"kl_divergence": "KL divergence to the original (nats/token)"}


@dataclass(frozen=True)
class SummaryRow:
    """One line of the before/after table; an empty cell means that the number does not exist on that side."""

    label: str
    before: str
    after: str


@dataclass(frozen=True)
class Reason:
    """Why some weights were left alone, and which."""

    text: str
    names: tuple[str, ...]


def format_bytes(count: float) -> str:
    """Bytes in decimal units (1 MB = 10^6 bytes), three significant digits: `45.1 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" else f"{_three_digits(count)} {unit}"
        count /= 1000
    return f"{_three_digits(count)} TB"


def format_seconds(seconds: float) -> str:
    """A duration as `8.2 s`, `3 min 05 s` or `2 h 07 min`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def format_number(value: float) -> str:
    """Four significant digits, without an exponent in the everyday range."""
    if not math.isfinite(value):
        return str(value)
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}"
    return f"{value:.{max(0, 3 - math.floor(math.log10(abs(value))))}f}" if value else "0"


def format_metric(metric: MetricRecord) -> str:
    """Value with its 95 % interval, or the value alone when nothing could be resampled."""
    if metric.low == metric.high:
        return format_number(metric.value)
    return f"{format_number(metric.value)} [{format_number(metric.low)}, {format_number(metric.high)}]"


def metric_label(name: str) -> str:
    """A metric's name for people: `top1_agreement` -> `top1 agreement`."""
    return _METRIC_LABELS.get(name, name.replace("_", " "))


def describe_fields(fields: Mapping[str, Any], key: str) -> str:
    """JSON of a format or method as one line: `grouped-integer (bits=4, group_size=64)`, nested ones likewise."""
    given = {name: value for name, value in fields.items() if name != key and value is not None and value != ""}
    shown = {
        name: describe_fields(value, key) if isinstance(value, Mapping) else value for name, value in given.items()
    }
    rest = ", ".join(f"{name}={value}" for name, value in shown.items())
    return f"{fields.get(key, 'unknown')} ({rest})" if rest else str(fields.get(key, "unknown"))


def method_name(result: Result) -> str:
    """Name of the method of a run, with its variant: "billm, variant whit" is not the published method."""
    method = _method_json(result)
    if _steps(method):
        return "a recipe of " + ", ".join(method_names(result))
    variant = f", variant {method['variant']}" if method.get("variant") else ""
    return f"{method.get('method', 'unknown')}{variant}"


def method_names(result: Result) -> list[str]:
    """Names of the methods of a run, each once."""
    method = _method_json(result)
    return _unique(str(step.get("method", "unknown")) for step in _steps(method) or [method])


def method_line(result: Result) -> str:
    """The method with its knobs on one line; for a recipe how many steps it has, which `recipe_lines` tells."""
    method = _method_json(result)
    steps = _steps(method)
    return f"a recipe of {len(steps)} steps" if steps else describe_fields(method, "method")


def recipe_lines(result: Result) -> list[str]:
    """Each step of a recipe on one line, `@blocks but @first: wanda (pattern=2:4)`; none for a method given alone."""
    return [_step_line(step) for step in _steps(_method_json(result))]


def _step_line(step: Mapping[str, Any]) -> str:
    layers = ", ".join(map(str, step.get("layers", ["@blocks"])))
    without = ", ".join(map(str, step.get("exclude", [])))
    knobs = {name: value for name, value in step.items() if name not in ("layers", "exclude")}
    return f"{layers}{f' but {without}' if without else ''}: {describe_fields(knobs, 'method')}"


def _steps(method: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    steps = method.get("step")
    return list(steps) if isinstance(steps, list) else []


def _method_json(result: Result) -> Mapping[str, Any]:
    method = result.run.get("method")
    return method if isinstance(method, Mapping) else {"method": method}


def model_label(result: Result) -> str:
    """What the user calls the model."""
    return str(result.model.get("label", "model"))


def layer_kind(layer: LayerRecord) -> str:
    """The layer's name inside its block, numbers blanked so that the experts of a mixture count as one kind."""
    local = layer.name.removeprefix(layer.block + ".") if layer.block else layer.name
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", local)


def stack_of(layer: LayerRecord) -> str:
    """The list of blocks that the layer's block belongs to: `model.layers.3` -> `model.layers`."""
    return layer.block.rpartition(".")[0] or layer.block


def group_reasons(untouched: Mapping[str, str]) -> list[Reason]:
    """Weights left alone by reason, the most frequent first."""
    names: dict[str, list[str]] = {}
    for name, reason in untouched.items():
        names.setdefault(reason, []).append(name)
    return [Reason(text, tuple(found)) for text, found in sorted(names.items(), key=lambda item: -len(item[1]))]


def metric_pairs(result: Result) -> list[tuple[str, MetricRecord | None, MetricRecord | None]]:
    """(name, original, compressed) of every metric, in the order in which they were measured."""
    found = dict.fromkeys(metric.name for metric in _metrics(result.original) + _metrics(result.compressed))
    return [(name, _metric(result.original, name), _metric(result.compressed, name)) for name in found]


def size_rows(result: Result) -> list[SummaryRow]:
    """Bytes and honest bits: what is on disk x 8 / parameters."""
    size = result.size
    dense_bits = size.original_dense_bytes * 8 / max(size.parameters, 1)
    counted = "layers in blocks" if any(layer.block for layer in result.layers) else "embedding and head"
    rows = [SummaryRow("weights as save_pretrained writes them", format_bytes(size.original_dense_bytes), "")]
    if size.original_file_bytes != size.original_dense_bytes:
        rows = [SummaryRow("file given", format_bytes(size.original_file_bytes), ""), *rows]
    return [
        *rows,
        SummaryRow("size on disk", "", format_bytes(size.file_bytes)),
        SummaryRow(f"stored bits per weight, {counted}", f"{dense_bits:.2f}", f"{size.compressed_bits:.3f}"),
        SummaryRow("stored bits per parameter, whole model", f"{dense_bits:.2f}", f"{size.file_bits:.3f}"),
    ]


def metric_rows(result: Result) -> list[SummaryRow]:
    """Every measured metric with its interval."""
    return [
        SummaryRow(metric_label(name), _metric_text(before), _metric_text(after))
        for name, before, after in metric_pairs(result)
    ]


def cost_rows(result: Result) -> list[SummaryRow]:
    """Seconds by phase, the total last, and peak memory."""
    phases = sorted(result.timings.items(), key=lambda item: item[0] == "total")
    rows = [SummaryRow(f"time, {phase}", "", format_seconds(value)) for phase, value in phases]
    if result.peak_host_bytes is not None:
        rows.append(SummaryRow("peak host memory", "", format_bytes(result.peak_host_bytes)))
    if result.peak_device_bytes is not None:
        rows.append(SummaryRow("peak device memory", "", format_bytes(result.peak_device_bytes)))
    return rows


def facts(data: Mapping[str, Any]) -> dict[str, str]:
    """The entries of a provenance that people read: no empty ones, no nested ones, no fingerprints of many lines."""
    shown = {key: str(value) for key, value in data.items() if isinstance(value, str | int | float)}
    return {key: text for key, text in shown.items() if text and len(text) <= LONGEST_FACT}


def protocols(result: Result) -> list[str]:
    """Protocol ids of the metrics, each once."""
    return _unique(metric.protocol for metric in _metrics(result.original) + _metrics(result.compressed))


def remarks(result: Result) -> list[str]:
    """What a reader must know before quoting the numbers: leaks, notes on the source, notes of the method.

    Notes of layers that differ in their numbers alone are one remark: the first of them, and how many more there are.
    """
    found: list[str] = []
    if any(record is not None and record.leak for record in (result.original, result.compressed)):
        found.append("The calibration text is part of the evaluation text (--allow-leak): the quality is overstated.")
    found += [str(note) for note in result.model.get("notes", [])]
    found += [str(note) for note in result.run.get("notes", [])]
    alike: dict[str, dict[str, list[str]]] = {}
    for layer in result.layers:
        for note in layer.notes:
            alike.setdefault(NUMBER.sub("#", note), {}).setdefault(note, []).append(layer.name)
    for by_note in alike.values():
        note, names = next(iter(by_note.items()))
        where = names[0] if len(names) == 1 else f"{len(names)} layers, first {names[0]}"
        others = sum(len(names) for names in by_note.values()) - len(names)
        more = f"; other numbers in {others} more, listed with the layers in report.html" if others else ""
        found.append(f"{note} ({where}{more})")
    return _unique(found)


def _metric_text(metric: MetricRecord | None) -> str:
    return "" if metric is None else format_metric(metric)


def _metrics(record: EvaluationRecord | None) -> list[MetricRecord]:
    return record.metrics if record is not None else []


def _metric(record: EvaluationRecord | None, name: str) -> MetricRecord | None:
    return record.metric(name) if record is not None else None


def _unique(items: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(items))


def _three_digits(value: float) -> str:
    return f"{value:.{max(0, 2 - math.floor(math.log10(max(abs(value), 1))))}f}"
