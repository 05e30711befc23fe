"""The figures of the HTML page, as plain tables and boxes that need no plotting library and stretch to any screen."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from whit.report.figures import format_metric, format_number, layer_kind, metric_label, stack_of
from whit.report.markup import Html, element, join
from whit.report.record import LayerRecord, MetricRecord

LOG_AXIS_FROM = 4.0


@dataclass(frozen=True)
class Bar:
    """One horizontal bar: label, length, text at its end, and a style class (`original`, `compressed`, `rest`)."""

    label: str
    value: float
    text: str
    style: str = "compressed"


@dataclass(frozen=True)
class Scale:
    """Ends of a colour ramp, the words behind a value, and the style class of the ramp."""

    low: float
    high: float
    unit: str
    style: str


def bars(items: Sequence[Bar]) -> Html:
    """Horizontal bars on one common scale from zero to the longest."""
    longest = max((item.value for item in items), default=0) or 1
    rows = [
        element(
            "div",
            element("span", item.label, class_="bar-label"),
            element(
                "span",
                element("span", class_=f"bar {item.style}", style=f"width:{100 * item.value / longest:.2f}%"),
                class_="bar-track",
            ),
            element("span", item.text, class_="bar-value"),
            class_="bar-row",
        )
        for item in items
    ]
    return element("div", *rows, class_="bars")


def heat_maps(
    layers: Sequence[LayerRecord], value: Callable[[LayerRecord], float], unit: str, style: str, *, from_zero: bool
) -> list[tuple[str, Html]]:
    """One map per stack of blocks: a row per layer kind, a column per block; all maps share one scale of colour.

    Args:
        layers: compressed layers; those outside blocks are left out.
        value: what the colour shows; several layers of one kind in a block are averaged.
        unit: words behind the value in the read-out.
        style: class of the colour ramp (`error` or `bits`).
        from_zero: whether the colour starts at zero or at the smallest value.

    Returns:
        (stack name, map) pairs; an empty list when no layer lies in a block.
    """
    inside = [layer for layer in layers if layer.block]
    values = [value(layer) for layer in inside] or [0.0]
    scale = Scale(0.0 if from_zero else min(values), max(values), unit, style)
    stacks = dict.fromkeys(stack_of(layer) for layer in inside)
    maps = []
    for stack in stacks:
        own = [layer for layer in inside if stack_of(layer) == stack]
        maps.append((stack, _heat_map(own, value, scale)))
    return maps


def _heat_map(layers: Sequence[LayerRecord], value: Callable[[LayerRecord], float], scale: Scale) -> Html:
    blocks = list(dict.fromkeys(layer.block for layer in layers))
    kinds = list(dict.fromkeys(layer_kind(layer) for layer in layers))
    cells: dict[tuple[str, str], list[LayerRecord]] = {}
    for layer in layers:
        cells.setdefault((layer_kind(layer), layer.block), []).append(layer)
    rows = [
        element(
            "tr",
            element("th", kind, scope="row"),
            *(_heat_cell(cells.get((kind, block), []), value, scale) for block in blocks),
        )
        for kind in kinds
    ]
    every = max(1, math.ceil(len(blocks) / 8))
    numbers = [
        element("td", block.rpartition(".")[2] if index % every == 0 else "") for index, block in enumerate(blocks)
    ]
    rows.append(element("tr", element("th", "block", scope="row"), *numbers, class_="axis"))
    legend = element(
        "div",
        element("span", format_number(scale.low)),
        element("span", class_=f"ramp {scale.style}"),
        element("span", format_number(scale.high)),
        element("output", "point at a cell to read it", class_="readout"),
        class_="legend",
    )
    table = element("div", element("table", *rows, class_=f"heat {scale.style}"), class_="scroll", tabindex=0)
    return element("figure", table, legend, class_="heat-figure")


def _heat_cell(found: Sequence[LayerRecord], value: Callable[[LayerRecord], float], scale: Scale) -> Html:
    if not found:
        return element("td", class_="none")
    mean = sum(value(layer) for layer in found) / len(found)
    name = found[0].name if len(found) == 1 else f"{found[0].name} and {len(found) - 1} more (mean)"
    share = 100 * (mean - scale.low) / (scale.high - scale.low) if scale.high > scale.low else 50.0
    return element("td", class_="cell", style=f"--t:{share:.1f}%", title=f"{name}: {format_number(mean)} {scale.unit}")


def metric_chart(name: str, before: MetricRecord | None, after: MetricRecord | None) -> Html:
    """Dots with 95 % intervals on one axis; the axis is logarithmic when the two sides are far apart."""
    sides = [("original", before), ("compressed", after)]
    measured = [(style, metric) for style, metric in sides if metric is not None]
    ends = [end for _, metric in measured for end in (metric.low, metric.high, metric.value)]
    scale, ticks, logarithmic = _axis(ends)
    rows = []
    for style, metric in measured:
        low, high, middle = scale(metric.low), scale(metric.high), scale(metric.value)
        rows.append(
            element(
                "div",
                element("span", style, class_="bar-label"),
                element(
                    "span",
                    element(
                        "span", class_=f"whisker {style}", style=f"left:{low:.2f}%;width:{max(high - low, 0):.2f}%"
                    ),
                    element("span", class_=f"dot {style}", style=f"left:{middle:.2f}%"),
                    class_="dot-track",
                    title=f"{style}: {format_metric(metric)}",
                ),
                element("span", format_metric(metric), class_="bar-value"),
                class_="bar-row",
            )
        )
    marks = [element("span", f"{tick:g}", class_="tick", style=f"left:{scale(tick):.2f}%") for tick in ticks]
    axis = element(
        "div",
        element("span", "log scale" if logarithmic else "", class_="bar-label"),
        element("span", *marks, class_="axis-track"),
        element("span", class_="bar-value"),
        class_="bar-row axis-row",
    )
    better = (after or before or measured[0][1]).better
    heading = element("h3", metric_label(name), element("small", f"{better} is better"))
    return element("figure", heading, join(*rows), axis, class_="metric")


def _axis(values: Sequence[float]) -> tuple[Callable[[float], float], list[float], bool]:
    """Position of a value in percent of the width, tick values, and whether the axis is logarithmic."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    if low > 0 and high / low > LOG_AXIS_FROM:
        first, last = math.log10(low), math.log10(high)
        margin = 0.06 * (last - first)
        ticks = [
            10.0**exponent * step for exponent in range(math.floor(first), math.ceil(last) + 1) for step in (1, 2, 5)
        ]
        inside = [tick for tick in ticks if first - margin <= math.log10(tick) <= last + margin]
        return (
            _clamped(lambda value: math.log10(value) if value > 0 else first, first - margin, last + margin),
            inside,
            True,
        )
    margin = 0.06 * (high - low) or max(abs(high) * 0.1, 0.1)
    start, end = low - margin, high + margin
    step = _round_step((end - start) / 4)
    first_tick = math.ceil(start / step)
    ticks = [index * step for index in range(first_tick, math.floor(end / step) + 1)]
    return _clamped(lambda value: value, start, end), ticks, False


def _clamped(transform: Callable[[float], float], start: float, end: float) -> Callable[[float], float]:
    def position(value: float) -> float:
        if not math.isfinite(value):
            return 100.0
        return min(max(100 * (transform(value) - start) / (end - start), 0.0), 100.0)

    return position


def _round_step(step: float) -> float:
    """The nearest of 1, 2, 5 x 10^k that is not smaller."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * 0.999)
