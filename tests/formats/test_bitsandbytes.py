"""INT8 state dicts in the layout of bitsandbytes, there and back."""

from __future__ import annotations

import pytest
import torch

from whit.errors import ModelError
from whit.formats import Packed
from whit.formats.bitsandbytes import from_bitsandbytes, to_bitsandbytes
from whit.methods import LayerStatistics, make_method

WEIGHT = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))


def pack(**knobs: object) -> Packed:
    loud = torch.ones(20).index_fill(0, torch.tensor([4]), 9.0)
    return make_method("llm-int8", knobs).compress(WEIGHT, LayerStatistics(20, 9, absolute_maximum=loud)).packed


def test_a_weight_comes_back_bit_for_bit() -> None:
    packed = pack(outlier_weights="int8")
    stored = to_bitsandbytes(packed)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()} == {
        "weight": (torch.int8, (6, 20)),
        "SCB": (torch.float32, (6,)),
        "weight_format": (torch.uint8, ()),
    }
    assert int(stored["weight_format"]) == 0
    back = from_bitsandbytes(stored)
    assert back.format == packed.format
    assert torch.equal(back.unpack(), packed.unpack())
    inputs = 4 * torch.randn(5, 20, generator=torch.Generator().manual_seed(1))
    assert torch.equal(back.linear(inputs), packed.linear(inputs))


def test_scales_are_those_of_bitsandbytes() -> None:
    stored = to_bitsandbytes(pack(outlier_weights="int8", compat=True))
    half = WEIGHT.half().float()
    assert torch.equal(stored["SCB"], half.abs().amax(1))
    assert torch.equal(stored["weight"].float(), (half * (127 / stored["SCB"].unsqueeze(1))).round())


def test_one_constant_for_the_whole_weight_is_written_for_every_row() -> None:
    packed = pack(outlier_weights="int8", granularity="row")
    assert torch.equal(from_bitsandbytes(to_bitsandbytes(packed)).unpack(), packed.unpack())


def test_threshold_zero_means_no_outliers() -> None:
    stored = to_bitsandbytes(pack(outliers="none"))
    assert from_bitsandbytes(stored, threshold=0).format == pack(outliers="none").format
    assert from_bitsandbytes(stored, threshold=5, compat=True).format.to_json()["compat"] is True


def test_what_bitsandbytes_cannot_hold_is_refused() -> None:
    with pytest.raises(
        ModelError, match="cannot hold 1 outlier columns in float16: compress with outlier_weights=int8"
    ):
        to_bitsandbytes(pack())
    rtn = make_method("rtn").compress(WEIGHT, LayerStatistics(20)).packed
    with pytest.raises(ModelError, match="cannot hold format 'grouped-integer', only 'outlier-int8'"):
        to_bitsandbytes(rtn)


def test_damaged_state_dicts_are_refused() -> None:
    stored = to_bitsandbytes(pack(outliers="none"))
    with pytest.raises(ModelError, match=r"lacks 'SCB', it holds \['weight'\]"):
        from_bitsandbytes({"weight": stored["weight"]})
    with pytest.raises(ModelError, match=r"'weight' must be int8 .*, got torch.float32 \(6, 20\)"):
        from_bitsandbytes({**stored, "weight": WEIGHT})
    with pytest.raises(ModelError, match="codes from -127"):
        from_bitsandbytes({**stored, "weight": torch.full((6, 20), -128, dtype=torch.int8)})
    with pytest.raises(ModelError, match="'weight_format' is 2, not 0"):
        from_bitsandbytes({**stored, "weight_format": torch.tensor(2)})
    with pytest.raises(ModelError, match=r"'absmax' .* must be \(6,\)"):
        from_bitsandbytes({**stored, "SCB": stored["SCB"][:5]})
