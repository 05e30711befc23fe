"""Convolutions as matrices over the windows of an image, for every geometry that torch has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import whit
from whit.formats.grouped_integer import GroupedInteger
from whit.methods import LayerStatistics, Statistic, make_method
from whit.models.convolution import Window
from whit.models.layers import layer_kind, why_not
from whit.models.packed import PackedConv2d
from whit.pipeline.gather import gathering

GEOMETRIES: list[dict[str, Any]] = [
    {"kernel_size": 1},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 1)},
    {"kernel_size": 3, "dilation": (2, 1), "padding": (2, 1), "stride": 2},
    {"kernel_size": (2, 4), "padding": "same", "dilation": (3, 1)},
    {"kernel_size": 3, "padding": "valid"},
    {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
    {"kernel_size": (3, 2), "padding": "same", "padding_mode": "replicate"},
    {"kernel_size": 3, "padding": (1, 2), "padding_mode": "circular", "bias": False},
]


def convolution(seed: int = 0, **geometry: Any) -> nn.Conv2d:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Conv2d(4, 6, **geometry)


def pictures(size: int = 3) -> Tensor:
    return torch.randn(size, 4, 9, 8, generator=torch.Generator().manual_seed(1))


def packed_of(module: nn.Conv2d, bits: int = 8, layout: type[GroupedInteger] | None = None) -> PackedConv2d:
    kind = layer_kind(module)
    assert kind is not None
    weight = kind.matrix(module.weight.detach())
    packed = (
        make_method("rtn", {"bits": bits, "group_size": 0}).compress(weight, LayerStatistics(weight.shape[1])).packed
    )
    if layout is not None:
        inner = packed.format
        assert isinstance(inner, GroupedInteger)
        packed = type(packed)(
            layout(inner.bits, inner.group_size, inner.symmetric), packed.rows, packed.columns, packed.tensors
        )
    replacement = kind.build(module, packed.format)
    assert isinstance(replacement, PackedConv2d)
    replacement.set_packed(packed)
    replacement.take_place_of(module)
    return replacement


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_the_matrix_times_the_windows_is_the_convolution(geometry: dict[str, Any]) -> None:
    module, images = convolution(**geometry), pictures()
    kind = layer_kind(module)
    assert kind is not None and kind.name == "convolution"
    matrix, windows = kind.matrix(module.weight.detach()), kind.inputs(module, images)
    assert matrix.shape == kind.shape(module) and windows.shape[-1] == matrix.shape[1] and windows.is_contiguous()
    assert torch.equal(kind.stored(matrix, module.weight.shape), module.weight)
    out = Window.of(module).fold(functional.linear(windows, matrix, module.bias), images)
    torch.testing.assert_close(out, module(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_the_packed_module_computes_the_convolution_of_the_unpacked_weight(geometry: dict[str, Any]) -> None:
    module, images = convolution(**geometry), pictures()
    replacement = packed_of(module)
    with torch.no_grad():
        module.weight.copy_(replacement.weight)
    assert torch.equal(replacement(images), module(images))
    assert torch.equal(replacement(images[0]), module(images[0]))  # a single image
    assert replacement.half()(images.half()).dtype == torch.float16


@dataclass(frozen=True)
class Coarse(GroupedInteger):
    """Rounds its inputs to quarters before the product."""

    name: ClassVar[str] = "coarse-for-tests"
    changes_inputs: ClassVar[bool] = True

    def linear(self, inputs: Tensor, tensors: Any, rows: int, columns: int, bias: Tensor | None = None) -> Tensor:
        return super().linear((4 * inputs).round() / 4, tensors, rows, columns, bias)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_a_format_that_changes_its_inputs_is_given_the_windows(geometry: dict[str, Any]) -> None:
    module, images = convolution(**geometry), pictures()
    replacement = packed_of(module, layout=Coarse)
    with torch.no_grad():
        module.weight.copy_(replacement.weight)
    torch.testing.assert_close(replacement(images), module((4 * images).round() / 4), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(replacement(images[0]), replacement(images)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("needs", list(Statistic)[:4])
def test_statistics_of_a_convolution_are_those_of_its_windows(needs: Statistic) -> None:
    module, images = convolution(kernel_size=3, stride=2), pictures()
    linear = nn.Linear(36, 6)
    with gathering([("c",), ("l",)], {"c": module, "l": linear}, frozenset({needs})) as found:
        module(images)
        linear(functional.unfold(images, 3, stride=2).transpose(1, 2).contiguous())
    for name in ("second_moment", "square_sums", "absolute_maximum", "sample"):
        first, second = (getattr(found[key,], name) for key in ("c", "l"))
        assert (first is None) == (second is None)
        assert first is None or torch.equal(first, second)


def test_many_windows_are_unfolded_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    module, images = convolution(kernel_size=3), pictures(7)
    everything = frozenset({Statistic.SECOND_MOMENT, Statistic.SQUARE_SUMS, Statistic.RANGE, Statistic.SAMPLE})

    def gathered() -> LayerStatistics:
        with gathering([("c",)], {"c": module}, everything) as found:
            module(images)
        return found["c",]

    whole = gathered()
    monkeypatch.setattr("whit.models.convolution.PART_VALUES", 2 * 7 * 6 * 36)
    assert [len(part) for part in Window.of(module).parts(images)] == [2, 2, 2, 1]
    parts = gathered()
    assert (parts.tokens, len(parts.sample)) == (whole.tokens, len(whole.sample))  # type: ignore[arg-type]
    for name in ("second_moment", "square_sums", "absolute_maximum"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["gptq", "billm", "kmeans"])
def test_a_convolution_of_one_pixel_is_a_linear_layer_bit_for_bit(method: str) -> None:
    module = convolution(kernel_size=1)
    linear = nn.Linear(4, 6)
    linear.load_state_dict({"weight": module.weight.detach().flatten(1), "bias": module.bias.detach()})
    images = [pictures(), pictures(1)]
    convolved = whit.compress(nn.Sequential(module), method, calibration=images)
    multiplied = whit.compress(nn.Sequential(linear), method, calibration=[item.flatten(2).mT for item in images])
    assert convolved.layers[0].error == multiplied.layers[0].error
    first, second = convolved.module[0].packed.tensors, multiplied.module[0].packed.tensors
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_groups_are_left_alone_and_say_so() -> None:
    module = nn.Conv2d(4, 8, 3, groups=2)
    assert layer_kind(module) is None
    assert "in 2 groups" in str(why_not(module))
    assert why_not(nn.Conv2d(4, 8, 3)) is None


def test_geometry_is_printed_and_no_float_copy_is_held() -> None:
    replacement = packed_of(convolution(kernel_size=3, padding=1))
    assert "padding=(1, 1)" in repr(replacement) and "stored bits" in repr(replacement)
    held = sum(value.nbytes for value in (*replacement.buffers(), *replacement.parameters()))
    assert held == replacement.packed.stored_bytes() + 6 * 4
    assert replacement.weight.shape == (6, 4, 3, 3)
