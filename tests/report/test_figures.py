"""Numbers as people read them."""

from __future__ import annotations

import math

import pytest

from tests.report.example import FORMAT, example_layers, example_result
from whit.report.charts import metric_chart
from whit.report.figures import (
    describe_fields,
    format_bytes,
    format_metric,
    format_number,
    format_seconds,
    group_reasons,
    layer_kind,
    remarks,
    size_rows,
    stack_of,
)
from whit.report.markup import element, join, raw
from whit.report.record import LayerRecord, MetricRecord


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (45_120_000, "45.1 MB"),
        (999_600_000, "1.00 GB"),
        (123_456_789, "123 MB"),
        (7.2e12, "7.20 TB"),
    ],
)
def test_bytes_have_three_digits(count: float, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.9, "59.9 s"), (59.97, "1 min 00 s"), (185, "3 min 05 s"), (7620, "2 h 07 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (22.5512, "22.55"),
        (0.04321, "0.04321"),
        (1234.5, "1234"),
        (2.1e-5, "2.1e-05"),
        (3.2e7, "3.2e+07"),
        (math.inf, "inf"),
    ],
)
def test_numbers_have_four_digits(value: float, text: str) -> None:
    assert format_number(value) == text


def test_a_metric_without_resampling_has_no_interval() -> None:
    assert format_metric(MetricRecord("x", 1.5, 1.5, 1.5, "p")) == "1.500"
    assert format_metric(MetricRecord("x", 1.5, 1.0, 2.0, "p")) == "1.500 [1.000, 2.000]"


def test_reasons_are_grouped_with_the_most_frequent_first() -> None:
    groups = group_reasons({"a": "rare", "b": "common", "c": "common"})
    assert [(group.text, group.names) for group in groups] == [("common", ("b", "c")), ("rare", ("a",))]


def test_layers_are_named_by_kind_and_stack() -> None:
    layer = example_layers(1)[0]
    assert (layer_kind(layer), stack_of(layer)) == ("self_attn.q_proj", "model.layers")
    expert = LayerRecord("m.layers.3.experts.12.up", "m.layers.3", 1, 1, {}, FORMAT, 1, 0.0, 0.0, 0.0)
    assert layer_kind(expert) == "experts.*.up"


def test_fields_are_described_on_one_line() -> None:
    assert describe_fields({"format": "f", "bits": 4, "group_size": 64}, "format") == "f (bits=4, group_size=64)"
    assert describe_fields({"format": "f"}, "format") == "f"


def test_notes_of_many_layers_are_one_remark() -> None:
    result = example_result(30)
    assert remarks(result) == [
        "The source file is quantised (Q4_1): the baseline is the dequantised model.",
        "damping raised from 0.01 to 0.1 (model.layers.3.mlp.down_proj)",
    ]


def test_notes_that_differ_in_numbers_alone_are_one_remark() -> None:
    result = example_result(4)
    result.model["notes"] = []
    notes = ["6 of 64 inputs", "6 of 64 inputs", "1.5e-3 of 64 inputs", "no input"]
    names = [layer.name for layer in result.layers]
    for layer, note in zip(result.layers, [*notes, *[""] * len(names)], strict=False):
        layer.notes[:] = [note] if note else []
    assert remarks(result) == [
        f"6 of 64 inputs (2 layers, first {names[0]}; other numbers in 1 more, listed with the layers in report.html)",
        f"no input ({names[3]})",
    ]


def test_bits_in_the_table_are_stored_bytes_times_eight_over_weights() -> None:
    result = example_result(30)
    rows = {row.label: row.after for row in size_rows(result)}
    stored = sum(layer.stored_bytes for layer in result.layers if layer.block)
    weights = sum(layer.parameters for layer in result.layers if layer.block)
    assert rows["stored bits per weight, layers in blocks"] == f"{stored * 8 / weights:.3f}"


def test_far_values_get_a_logarithmic_axis_and_near_ones_do_not() -> None:
    near = MetricRecord("perplexity", 20.0, 19.0, 21.0, "p")
    far = MetricRecord("perplexity", 2000.0, 1900.0, 2100.0, "p")
    infinite = MetricRecord("perplexity", math.inf, math.inf, math.inf, "p")
    assert "log scale" in metric_chart("perplexity", near, far)
    assert "log scale" not in metric_chart("perplexity", near, near)
    assert "left:100.00%" in metric_chart("perplexity", near, infinite)


def test_markup_escapes_text_and_attributes_but_not_markup() -> None:
    inner = element("b", "<&>", title='"x"')
    assert inner == '<b title="&quot;x&quot;">&lt;&amp;&gt;</b>'
    assert join(inner, "<") == inner + "&lt;"
    assert element("p", raw("<i></i>"), None, hidden=True, id=None) == "<p hidden><i></i></p>"
    assert element("meta", http_equiv="x") == '<meta http-equiv="x">'
