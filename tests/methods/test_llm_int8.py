"""LLM.int8() as a method: which columns are listed, in which dtype, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from whit.errors import KnobError, ModelError
from whit.formats.outlier_int8 import OutlierInt8
from whit.methods import LayerStatistics, Statistic, make_method
from whit.methods.base import Compressed
from whit.methods.llm_int8 import LLMInt8, outlier_columns


def weight(rows: int = 12, columns: int = 200) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def statistics(columns: int = 200, **loud: float) -> LayerStatistics:
    """Ranges of one everywhere but in the columns `c3=7.5`."""
    largest = torch.ones(columns)
    for name, value in loud.items():
        largest[int(name[1:])] = value
    return LayerStatistics(columns, 50, absolute_maximum=largest)


def compress(values: Tensor, known: LayerStatistics, **knobs: object) -> Compressed:
    before = values.clone()
    result = make_method("llm-int8", knobs).compress(values, known)
    assert torch.equal(values, before)
    return result


@pytest.mark.parametrize("threshold", [0.0, -6.0, float("nan"), float("inf")])
def test_a_threshold_that_is_none_is_refused(threshold: float) -> None:
    with pytest.raises(KnobError, match=rf"'threshold' .* positive and finite, got {threshold!r}: .* outliers=none"):
        make_method("llm-int8", {"threshold": threshold})


@pytest.mark.parametrize("knobs", [{}, {"outliers": "static", "outlier_weights": "int8"}])
def test_compat_is_only_what_bitsandbytes_does(knobs: dict[str, str]) -> None:
    with pytest.raises(KnobError, match="use outliers=dynamic and outlier_weights=int8"):
        make_method("llm-int8", {"compat": True, **knobs})


def test_calibration_is_asked_for_only_where_columns_are_listed() -> None:
    ranges = frozenset({Statistic.RANGE})
    assert LLMInt8().required() == ranges
    assert LLMInt8(outliers="static", outlier_weights="int8").required() == ranges
    assert LLMInt8(outlier_weights="int8").required() == frozenset()
    assert LLMInt8(outliers="none").required() == frozenset()


def test_columns_of_largest_range_are_taken_first_and_listed_in_order() -> None:
    largest = torch.tensor([6.0, 1.0, 9.0, 5.9, 9.0, 7.0])
    assert outlier_columns(largest, 6.0, 6).tolist() == [0, 2, 4, 5]
    assert outlier_columns(largest, 6.0, 3).tolist() == [2, 4, 5]
    assert outlier_columns(largest, 6.0, 1).tolist() == [2]
    assert outlier_columns(largest, 6.0, 0).tolist() == []
    assert outlier_columns(largest, 10.0, 6).tolist() == []


@pytest.mark.parametrize("outliers", ["dynamic", "static"])
def test_listed_columns_keep_16_bit_weights(outliers: str) -> None:
    values = weight()
    packed = compress(values, statistics(c3=7.5, c150=6.0, c9=5.9), outliers=outliers).packed
    assert packed.tensors["outlier_index"].tolist() == [3, 150]
    assert torch.equal(packed.unpack()[:, [3, 150]], values[:, [3, 150]].half().float())
    assert bool((packed.tensors["codes"][:, [3, 150]] == 0).all()) == (outliers == "static")


def test_static_columns_do_not_count_in_the_constants_of_the_others() -> None:
    values = weight()
    values[:, 3] *= 100
    static = compress(values, statistics(c3=7.5), outliers="static").packed
    assert torch.equal(static.tensors["absmax"], values.index_fill(1, torch.tensor([3]), 0).abs().amax(1))
    dynamic = compress(values, statistics(c3=7.5)).packed
    assert torch.equal(dynamic.tensors["absmax"], values.abs().amax(1))


def test_static_columns_can_be_int8_as_well() -> None:
    packed = compress(weight(), statistics(c3=7.5), outliers="static", outlier_weights="int8").packed
    assert set(packed.tensors) == {"codes", "absmax", "outlier_index"}
    inputs = torch.ones(1, 200).index_fill(1, torch.tensor([3]), 7.5)
    exact = inputs.double() @ packed.unpack().double().T
    torch.testing.assert_close(packed.linear(inputs).double(), exact, rtol=1e-6, atol=1e-6)


def test_weights_of_a_bfloat16_model_are_kept_exactly() -> None:
    values = weight().bfloat16().float()
    values[0, 3] = 2.0**-30  # float16 has no such number
    packed = compress(values, statistics(c3=7.5)).packed
    assert packed.tensors["outlier_weight"].dtype == torch.bfloat16
    assert torch.equal(packed.unpack()[:, 3], values[:, 3])
    values[1, 3] = 1e5 + 0.25
    assert compress(values, statistics(c3=7.5)).packed.tensors["outlier_weight"].dtype == torch.bfloat16


def test_the_cap_keeps_the_result_within_the_plan() -> None:
    loud = {f"c{column}": 6.0 + column for column in range(10, 40)}
    for outliers in ("dynamic", "static"):
        method = LLMInt8(outliers=outliers)
        result = method.compress(weight(), statistics(**loud))
        assert result.packed.tensors["outlier_index"].tolist() == [38, 39]
        assert result.packed.stored_bytes() == method.format(12, 200).bytes(12, 200)
        assert "inputs that reach 6 in calibration: 30 of 200 (15.00%)" in result.notes[0]
        assert "max_outlier_share 0.01" in result.notes[0]
    quiet = LLMInt8().compress(weight(), statistics())
    assert quiet.packed.stored_bytes() == 12 * 200 + 12 * 4 < LLMInt8().format(12, 200).bytes(12, 200)
    assert quiet.notes == ("no input reaches 6 in calibration",)


def test_the_plan_says_that_it_is_a_bound() -> None:
    assert "max_outlier_share=0.01" in (LLMInt8().plan_note() or "")
    assert LLMInt8(outliers="none").plan_note() is None
    assert LLMInt8(outlier_weights="int8").plan_note() is None
    assert LLMInt8(max_outlier_share=0).plan_note() is None


def test_static_reports_what_is_done_in_16_bit() -> None:
    notes = compress(weight(), statistics(c3=7.5), outliers="static").notes
    assert notes == (
        "inputs that reach 6 in calibration: 1 of 200 (0.50%); "
        "outlier columns: 1, 0.50% of the multiply-adds in 16 bit",
    )


@pytest.mark.parametrize("known", [LayerStatistics(200), LayerStatistics(200, 0, absolute_maximum=torch.ones(200))])
def test_without_calibration_static_becomes_dynamic(known: LayerStatistics) -> None:
    result = compress(weight(), known, outliers="static")
    assert result.packed.format == OutlierInt8(6.0, "dynamic")
    assert result.notes == ("no calibration inputs: outlier columns are found in every call",)
    assert compress(weight(), known).notes == ()
    assert compress(weight(), known, outliers="none").packed.format == OutlierInt8(0.0, "none")


def test_compat_refuses_weights_beyond_float16() -> None:
    values = weight()
    values[0, 0] = 1e5
    with pytest.raises(ModelError, match="beyond float16"):
        compress(values, statistics(), outlier_weights="int8", compat=True)


def test_it_cannot_follow_pruning() -> None:
    with pytest.raises(KnobError, match="cannot follow a pruning step"):
        LLMInt8().compress_kept(weight(), torch.ones(12, 200, dtype=torch.bool), statistics())
