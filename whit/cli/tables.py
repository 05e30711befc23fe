"""What the commands print, as rich renderables made from records; no table decides anything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from whit.cli.options import flag, knob_range
from whit.kernels.tuning import TunedProduct
from whit.methods.base import Method, knobs
from whit.pipeline.events import Plan
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
    method_line,
    metric_label,
    metric_rows,
    model_label,
    recipe_lines,
    remarks,
    size_rows,
)
from whit.report.record import EvaluationRecord, ExportRecord, Result

NAMES_SHOWN = 3


def plan_view(plan: Plan) -> RenderableType:
    """The plan: what is treated, what is left alone and why, and what it will cost."""
    grid = _facts()
    grid.add_row("model", f"{plan.model} ({plan.architecture}, {plan.parameters:,} parameters)")
    for text in _planned_groups(plan):
        grid.add_row("compress", text)
    for reason in group_reasons(plan.untouched):
        names = ", ".join(reason.names[:NAMES_SHOWN]) + (", ..." if len(reason.names) > NAMES_SHOWN else "")
        grid.add_row(
            "leave alone", f"{len(reason.names)} {_plural('weight', len(reason.names))}: {reason.text} ({names})"
        )
    if plan.calibration:
        grid.add_row("calibration", _provenance(plan.calibration))
    counted = "the layers in blocks" if any(layer.block for layer in plan.layers) else "embedding and head"
    grid.add_row("stored bits", f"{plan.compressed_bits:.3f} per weight of {counted}")
    file_bits = plan.file_bytes * 8 / max(plan.parameters, 1)
    grid.add_row(
        "size on disk",
        f"{format_bytes(plan.file_bytes)} ({file_bits:.3f} bits per parameter); "
        f"dense weights {format_bytes(plan.original_dense_bytes)}, file given {format_bytes(plan.original_file_bytes)}",
    )
    if plan.working_bytes:
        grid.add_row("working files", f"{format_bytes(plan.working_bytes)} of gradients, until the run is complete")
    device = f", {format_bytes(plan.device_bytes)} on the device" if plan.device_bytes else ""
    grid.add_row("peak memory", f"{format_bytes(plan.host_bytes)} on the host{device}")
    grid.add_row("time", f"about {format_seconds(plan.minutes * 60)}")
    if plan.blocks_done:
        grid.add_row("continue", f"{plan.blocks_done} of {plan.blocks} blocks were finished by an earlier run")
    for note in plan.notes:
        grid.add_row("note", note)
    return Group(Text("Plan", style="bold"), Padding(grid, (0, 0, 1, 2)))


def result_view(result: Result) -> RenderableType:
    """The table before/after, the sample of both models and the remarks."""
    table = Table()
    table.add_column("")
    table.add_column("original", justify="right")
    table.add_column("compressed", justify="right", style="bold")
    for rows in (size_rows(result), metric_rows(result), cost_rows(result)):
        _add_rows(table, rows)
    parts: list[RenderableType] = [*_title(result), table]
    for name, record in (("original", result.original), ("compressed", result.compressed)):
        if record is not None and record.sample:
            parts.append(_sample(f"sample, {name}", record))
    parts += [Text(f"note: {text}", style="yellow") for text in remarks(result)]
    return Group(*parts)


def evaluation_view(record: EvaluationRecord) -> RenderableType:
    """Metrics with intervals and protocol, the data they were measured on, and a sample."""
    table = Table("metric", "value [95 % interval]", "better", "protocol")
    for metric in record.metrics:
        table.add_row(
            metric_label(metric.name), format_metric(metric), metric.better, Text(metric.protocol, overflow="fold")
        )
    parts: list[RenderableType] = [table, Text(f"data: {_provenance(record.data)}; {format_seconds(record.seconds)}")]
    if record.sample:
        parts.append(_sample("sample", record))
    if record.leak:
        parts.append(Text("note: the calibration text is part of the evaluation text", style="yellow"))
    return Group(*parts)


def export_view(record: ExportRecord) -> RenderableType:
    """Where the model was written, how its packed weights are stored there, bytes before and after, remarks."""
    grid = _facts()
    grid.add_row("written", f"{record.path} ({record.target})")
    stored = ", ".join(f"{count} {_plural('weight', count)} as {kind}" for kind, count in record.stored.items())
    grid.add_row("packed", stored)
    grid.add_row("size", f"{format_bytes(record.bytes_before)} -> {format_bytes(record.bytes_after)}")
    for note in record.notes:
        grid.add_row("note", Text(note))
    return grid


def layers_view(result: Result, kernels: Mapping[str, str]) -> RenderableType:
    """What each layer became.

    Args:
        result: of the run.
        kernels: layer name -> implementation that computes its product.
    """
    table = Table()
    for name in ("layer", "format"):
        table.add_column(name, overflow="fold")
    for name in ("shape", "bits", "error", "kernel"):
        table.add_column(name, justify="left" if name == "kernel" else "right", no_wrap=True)
    for layer in result.layers:
        table.add_row(
            Text(layer.name),
            Text(describe_fields(layer.format, "format")),
            f"{layer.rows}x{layer.columns}",
            f"{layer.stored_bits:.3f}",
            format_number(layer.error),
            Text(kernels[layer.name]),
        )
    size = result.size
    counted = "those in blocks" if any(layer.block for layer in result.layers) else "all"
    totals = (
        f"{len(result.layers)} layers; {counted} {size.compressed_bits:.3f} stored bits per weight, "
        f"whole model {size.file_bits:.3f} per parameter, {format_bytes(size.file_bytes)} on disk"
    )
    left = [
        Text(f"left alone: {len(reason.names)} {_plural('weight', len(reason.names))}: {reason.text}")
        for reason in group_reasons(result.untouched)
    ]
    return Group(*_title(result), table, Text(totals), *left)


def tuned_view(product: TunedProduct) -> RenderableType:
    """One line: what was tuned, and what it gained."""
    times = " -> ".join(f"{seconds * 1e6:.1f}" for seconds in (product.seconds_before, product.seconds))
    kernels = " -> ".join(dict.fromkeys((product.kernel_before, product.kernel)))
    rows = "+".join(str(count) for count in product.parts or (product.rows,))
    return Text(
        f"{rows}x{product.columns} {describe_fields(product.format, 'format')}, "
        f"{product.vectors} {_plural('vector', product.vectors)}: {times} µs of {product.tried} tried, {kernels}"
    )


def _title(result: Result) -> list[RenderableType]:
    steps = [Text(f"  {index}. {step}") for index, step in enumerate(recipe_lines(result), 1)]
    return [Text(f"{model_label(result)}: {method_line(result)}", style="bold"), *steps]


def methods_view(methods: Mapping[str, type[Method]]) -> RenderableType:
    """Every method on one line."""
    grid = _facts()
    for name, cls in methods.items():
        grid.add_row(name, cls.summary)
    return Group(grid, Text("\nwhit methods NAME shows the knobs of one method"))


def method_view(cls: type[Method]) -> RenderableType:
    """The knobs of one method with type, default and range."""
    table = Table("option", "type", "default", "range", "meaning")
    for item in knobs(cls):
        default = "" if item.default is None else str(item.default)
        table.add_row(flag(item.name), item.type.__name__, default, knob_range(item), Text(item.help))
    return Group(Text(f"{cls.name}: {cls.summary}", style="bold"), table)


def _planned_groups(plan: Plan) -> list[str]:
    """`210 linear layers in 30 blocks -> billm, binary-residual(...), 43.1 MB`, one line per method and format."""
    groups: dict[tuple[str, str, bool], list[int]] = {}
    blocks: dict[tuple[str, str, bool], Counter[str]] = {}
    for layer in plan.layers:
        key = (layer.method, layer.format, bool(layer.block))
        groups.setdefault(key, []).append(layer.stored_bytes)
        blocks.setdefault(key, Counter())[layer.block] += 1
    lines = []
    for key, sizes in groups.items():
        method, layout, inside = key
        count = len(sizes)
        where = f"in {len(blocks[key])} {_plural('block', len(blocks[key]))}" if inside else "outside the blocks"
        lines.append(f"{count} {_plural('layer', count)} {where} -> {method}: {layout}, {format_bytes(sum(sizes))}")
    return lines


def _provenance(data: Mapping[str, object]) -> str:
    return ", ".join(f"{key} {value}" for key, value in facts(data).items())


def _facts() -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="cyan", no_wrap=True)
    grid.add_column(overflow="fold")
    return grid


def _add_rows(table: Table, rows: Sequence[SummaryRow]) -> None:
    for row in rows:
        table.add_row(Text(row.label), Text(row.before), Text(row.after))
    table.add_section()


def _sample(title: str, record: EvaluationRecord) -> RenderableType:
    grid = _facts()
    for key, text in record.sample.items():
        grid.add_row(key, Text(text.strip()))
    return Group(Text(title, style="bold"), Padding(grid, (0, 0, 0, 2)))


def _plural(word: str, count: int) -> str:
    return word if count == 1 else word + "s"
