"""`report.html`: one self-contained page (no network, no libraries) made from a `Result`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from whit.report.charts import Bar, bars, heat_maps, metric_chart
from whit.report.command import command_line
from whit.report.figures import (
    SummaryRow,
    cost_rows,
    describe_fields,
    facts,
    format_bytes,
    format_metric,
    format_number,
    format_seconds,
    group_reasons,
    layer_kind,
    method_line,
    method_name,
    metric_label,
    metric_pairs,
    metric_rows,
    model_label,
    protocols,
    recipe_lines,
    remarks,
    size_rows,
)
from whit.report.markup import Html, element, join, raw
from whit.report.record import LayerRecord, Result

HEADLINE_METRICS = 3
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def report_page(result: Result) -> str:
    """The whole page as text; every string of the result is escaped, nothing is loaded from anywhere."""
    title = f"{model_label(result)} by {method_name(result)}"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"whit: {title}"),
        element("style", raw(_asset("report.css"))),
    )
    sections = [
        _header(result),
        _remarks(result),
        _quality(result),
        _size(result),
        _layer_maps(result),
        _samples(result),
        _layer_table(result.layers),
        _left_alone(result),
        _provenance(result),
    ]
    body = element("body", element("main", *sections), element("script", raw(_asset("report.js"))))
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _asset(name: str) -> str:
    return (files("whit.report") / "assets" / name).read_text(encoding="utf-8")


def _section(title: str, *children: str | None, hint: str = "") -> Html:
    return element("section", element("h2", title), element("p", hint, class_="hint") if hint else None, *children)


def _header(result: Result) -> Html:
    size = result.size
    counted = "layers in blocks" if any(layer.block for layer in result.layers) else "embedding and head"
    ratio = size.original_dense_bytes / max(size.file_bytes, 1)
    before_size = f"from {format_bytes(size.original_dense_bytes)}, {ratio:.1f}× smaller"
    tiles = [
        _tile("size on disk", format_bytes(size.file_bytes), before_size),
        _tile("bits per weight", f"{size.compressed_bits:.2f}", f"stored, {counted}"),
        _tile("bits per parameter", f"{size.file_bits:.2f}", "stored, whole model"),
    ]
    measured = [(name, before, after) for name, before, after in metric_pairs(result) if after is not None]
    for name, before, after in measured[:HEADLINE_METRICS]:
        beside = f"from {format_number(before.value)}" if before else after.better + " is better"
        tiles.append(_tile(metric_label(name).partition(" to ")[0], format_number(after.value), beside))
    subtitle = f"{result.model.get('architecture', '')} · {size.parameters:,} parameters · {method_line(result)}"
    steps = recipe_lines(result)
    return element(
        "header",
        element("p", element("span", "whit", class_="mark"), " compression report", class_="eyebrow"),
        element("h1", model_label(result)),
        element("p", subtitle, class_="subtitle"),
        element("ol", *(element("li", step) for step in steps), class_="subtitle") if steps else None,
        element("div", *tiles, class_="tiles"),
    )


def _tile(label: str, value: str, beside: str) -> Html:
    return element(
        "div",
        element("span", label, class_="tile-label"),
        element("strong", value),
        element("span", beside, class_="tile-beside"),
        class_="tile",
    )


def _remarks(result: Result) -> Html | None:
    found = remarks(result)
    if not found:
        return None
    return element("aside", element("h2", "Read this first"), element("ul", *(element("li", text) for text in found)))


def _quality(result: Result) -> Html:
    pairs = metric_pairs(result)
    if not pairs:
        return _section("Quality", element("p", "Not measured in this run (--no-evaluate)."))
    charts = [metric_chart(name, before, after) for name, before, after in pairs if before and after]
    alone = [row for row, (_, before, after) in zip(metric_rows(result), pairs, strict=True) if not (before and after)]
    ids = element("ul", *(element("li", identity) for identity in protocols(result)), class_="names")
    protocol = element("details", element("summary", "Protocol: equal ids mean comparable numbers"), ids)
    hint = "Dots are estimates, bars are 95 % bootstrap intervals."
    return _section("Quality", *charts, _before_after(alone) if alone else None, protocol, hint=hint)


def _before_after(rows: Sequence[SummaryRow]) -> Html:
    head = element("tr", element("th", ""), element("th", "original"), element("th", "compressed"))
    body = [
        element(
            "tr",
            element("th", row.label, scope="row"),
            element("td", row.before or "–"),
            element("td", row.after or "–"),
        )
        for row in rows
    ]
    return element("div", element("table", element("thead", head), element("tbody", *body)), class_="scroll")


def _size(result: Result) -> Html:
    size = result.size
    scale = [Bar("original, dense", size.original_dense_bytes, format_bytes(size.original_dense_bytes), "original")]
    if size.original_file_bytes != size.original_dense_bytes:
        given = format_bytes(size.original_file_bytes)
        scale.append(Bar("original, file given", size.original_file_bytes, given, "original"))
    scale.append(Bar("compressed", size.file_bytes, format_bytes(size.file_bytes)))
    by_kind: dict[str, int] = {}
    for layer in result.layers:
        by_kind[layer_kind(layer)] = by_kind.get(layer_kind(layer), 0) + layer.stored_bytes
    parts = [
        Bar(kind, count, _share(count, size.file_bytes))
        for kind, count in sorted(by_kind.items(), key=lambda item: -item[1])
    ]
    rest = size.file_bytes - sum(by_kind.values())
    if rest > 0:
        parts.append(Bar("left alone, headers, config", rest, _share(rest, size.file_bytes), "rest"))
    return _section(
        "Size",
        bars(scale),
        element("h3", "Where the bytes of the compressed model are"),
        bars(parts),
        element("h3", "All figures"),
        _before_after([*size_rows(result), *cost_rows(result)]),
        hint="Bits are stored bytes x 8 / weights: scales, masks, indices and headers are counted.",
    )


def _share(count: int, whole: int) -> str:
    return f"{format_bytes(count)} · {100 * count / max(whole, 1):.1f} %"


def _layer_maps(result: Result) -> Html | None:
    errors = heat_maps(result.layers, lambda layer: layer.error, "relative output error", "error", from_zero=True)
    bits = heat_maps(result.layers, lambda layer: layer.stored_bits, "stored bits per weight", "bits", from_zero=False)
    if not errors:
        return None
    stored = {format_number(layer.stored_bits) for layer in result.layers if layer.block}
    maps: list[Html] = []
    for (stack, error_map), (_, bits_map) in zip(errors, bits, strict=True):
        suffix = f" in {stack}" if len(errors) > 1 else ""
        maps += [element("h3", f"Relative output error{suffix}"), error_map]
        if len(stored) > 1:
            maps += [element("h3", f"Stored bits per weight{suffix}"), bits_map]
    if len(stored) == 1:
        maps.append(element("p", f"Every layer in a block stores {stored.pop()} bits per weight.", class_="even"))
    hint = (
        "Each cell is one layer: a row per kind, a column per block. "
        "Error is ||(W - Q)X||² / ||WX||² on the calibration inputs."
    )
    return _section("Layer by layer", *maps, hint=hint)


def _samples(result: Result) -> Html | None:
    shown = [(name, record) for name, record in (("original", result.original), ("compressed", result.compressed))]
    cards = []
    for name, record in shown:
        if record is None or not record.sample:
            continue
        texts = [
            join(element("h4", metric_label(key)), element("blockquote", text.strip()))
            for key, text in record.sample.items()
        ]
        cards.append(element("div", element("h3", name), *texts, class_=f"sample {name}"))
    return _section("Sample", element("div", *cards, class_="samples")) if cards else None


def _layer_table(layers: Sequence[LayerRecord]) -> Html:
    columns = ("layer", "rows x columns", "format", "stored bits", "stored bytes", "output error", "weight error", "s")
    head = element("tr", *(element("th", element("button", name, type="button"), scope="col") for name in columns))
    body = [_layer_row(layer) for layer in layers]
    table = element("table", element("thead", head), element("tbody", *body), class_="layers sortable")
    return _section(f"All {len(layers)} layers", element("div", table, class_="scroll tall", tabindex=0))


def _layer_row(layer: LayerRecord) -> Html:
    numbers = [
        (layer.stored_bits, f"{layer.stored_bits:.3f}"),
        (layer.stored_bytes, f"{layer.stored_bytes:,}"),
        (layer.error, format_number(layer.error)),
        (layer.weight_error, format_number(layer.weight_error)),
        (layer.seconds, f"{layer.seconds:.2f}"),
    ]
    notes = "; ".join(layer.notes)
    return element(
        "tr",
        element("th", layer.name, element("small", notes) if notes else None, scope="row"),
        element("td", f"{layer.rows} x {layer.columns}", data_value=layer.parameters),
        element("td", describe_fields(layer.format, "format"), class_="text"),
        *(element("td", text, data_value=value) for value, text in numbers),
    )


def _left_alone(result: Result) -> Html | None:
    if not result.untouched:
        return None
    groups = [
        element(
            "details",
            element("summary", f"{len(reason.names)} left alone: {reason.text}"),
            element("p", ", ".join(reason.names), class_="names"),
        )
        for reason in group_reasons(result.untouched)
    ]
    return _section("Left alone", *groups)


def _provenance(result: Result) -> Html:
    entries: dict[str, Any] = {"command": command_line(result), "model": facts(result.model), **result.run}
    entries.pop("identity", None)  # repeats what the other entries say, for machines
    entries["calibration"] = facts(result.run.get("calibration", {}))
    for name, record in (("original", result.original), ("compressed", result.compressed)):
        if record is not None:
            entries[f"evaluation of the {name}"] = {
                **facts(record.data),
                "seconds": format_seconds(record.seconds),
                "metrics": {metric.name: f"{format_metric(metric)} ({metric.protocol})" for metric in record.metrics},
            }
    rows = [join(element("dt", key), element("dd", _value(value))) for key, value in entries.items()]
    return _section("How this was made", element("dl", *rows))


def _value(value: Any) -> Html:
    if isinstance(value, Mapping):
        inner = [join(element("dt", str(key)), element("dd", _value(item))) for key, item in value.items()]
        return element("dl", *inner)
    if isinstance(value, str):
        return join(value)
    return join(json.dumps(value, ensure_ascii=False, default=str))
