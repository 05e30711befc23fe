"""Which launch is kept for a step of decoding: the search on times that are made up, without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.kernels.test_cuda_kernels import random_packed
from whit.formats.base import Format
from whit.formats.binary_residual import BinaryResidual
from whit.formats.grouped_integer import GroupedInteger
from whit.formats.level_table import LevelTable
from whit.kernels import step_tuning
from whit.kernels.cuda_layout import layout_of
from whit.kernels.cuda_shapes import Shape, step_sizes, step_timings
from whit.kernels.cuda_step import place_step, step_key
from whit.kernels.cuda_tuned import Tuned
from whit.kernels.step_tuning import LEAST_GAIN, Times, tune_in_step

H200 = (132, 232448)
ROWS, COLUMNS = (1024, 1024), 4096


class Device:
    """Found shapes of a device that is not there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shapes: dict[str, Tuned] = {}
        self.kept: dict[str, Tuned] = {}
        answers: dict[str, Callable[..., Any]] = {
            "usable": lambda x, packed: layout_of(packed.format, packed.columns),
            "starts_early": lambda index: True,
            "counts_bits": lambda index: True,
            "device_limits": lambda index: ("a device", *H200),
            "tuned_shapes": lambda device: self.shapes,
            "use_shape": self.use,
            "keep_tuned": lambda device, found: self.kept.update(found),
            "call_source": lambda call, launch: (call, launch),
            "compile_together": lambda sources, index: None,
        }
        for name, answer in answers.items():
            monkeypatch.setattr(step_tuning, name, answer)

    def use(self, device: str, key: str, shape: Tuned | None) -> None:
        self.shapes.pop(key, None)
        if shape is not None:
            self.shapes[key] = shape


def tuned(device: Device, layout: Format, seconds: Callable[[Tuned | None], float]) -> tuple[str, Shape | None, Times]:
    weights = [random_packed(layout, 64, COLUMNS) for _ in ROWS]
    described = layout_of(layout, COLUMNS)
    assert described is not None
    key = step_key(described, (64, 64), COLUMNS)
    x = torch.zeros(1, COLUMNS, dtype=torch.bfloat16)
    best, times = tune_in_step(x, weights, lambda: seconds(device.shapes.get(key)), makes=True)
    return key, best, times


@pytest.mark.parametrize("layout", [BinaryResidual(128, True), LevelTable(2, 0), GroupedInteger(1, 128, True)], ids=str)
def test_the_fastest_is_found_and_kept(layout: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)

    def seconds(shape: Tuned | None) -> float:
        if not isinstance(shape, Shape):
            return 2.0
        return 1.0 + abs(shape.threads - 384) / 512 + 0.1 * shape.bulk + 0.01 * shape.late + 0.001 * shape.depth

    key, best, times = tuned(device, layout, seconds)
    assert best is not None and (best.threads, best.bulk, best.late, best.depth) == (384, False, False, 2)
    assert device.kept == device.shapes == {key: best}
    assert times[None] == 2.0 and times[best] == min(times.values())


def test_what_is_hardly_faster_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    before = LEAST_GAIN**-0.5
    _, best, times = tuned(device, LevelTable(2, 0), lambda shape: before if shape is None else 1.0)
    assert best is None and not device.kept and not device.shapes
    assert len(times) > 8


def test_a_search_that_ends_early_leaves_what_was_found_before(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    layout = layout_of(LevelTable(2, 0), COLUMNS)
    assert layout is not None
    key, earlier = step_key(layout, (64, 64), COLUMNS), step_sizes(layout)[0]
    device.shapes[key] = earlier

    def seconds(shape: Tuned | None) -> float:
        if isinstance(shape, Shape) and shape.threads == 512:
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        tuned(device, LevelTable(2, 0), seconds)
    assert device.shapes == {key: earlier} and not device.kept


@pytest.mark.parametrize("columns", [4096, 11008])
@pytest.mark.parametrize("layout", [BinaryResidual(128, True), LevelTable(2, 0), GroupedInteger(1, 128, True)], ids=str)
def test_a_block_holds_the_whole_input_and_is_alone(layout: Format, columns: int) -> None:
    described = layout_of(layout, columns)
    assert described is not None
    shapes = [shape for size in step_sizes(described) for shape in step_timings(size)]
    assert len(set(shapes)) == len(shapes)
    launches = [place_step(described, (11008, 11008), columns, *H200, shape) for shape in shapes]
    found = [launch for launch in launches if launch is not None]
    assert len(found) > len(shapes) // 3
    for launch in found:
        assert launch.grid == 132 and launch.chunk >= columns and launch.shared <= H200[1]
    assert place_step(described, (4096,), columns, *H200, Shape(512, 256, 4)) is None  # made for something else
    assert place_step(described, (4096,), columns, *H200, None) is None


def test_a_gated_launch_has_the_same_rows_of_both_weights_in_a_cluster() -> None:
    layout = layout_of(BinaryResidual(128, True), 4096)
    assert layout is not None
    for shape in step_timings(step_sizes(layout)[1]):
        plain = place_step(layout, (11008, 11008), 4096, *H200, shape)
        gated = place_step(layout, (11008, 11008), 4096, *H200, shape, gated=True)
        assert plain is not None and gated is not None
        assert gated.shared == plain.shared + 128 * plain.tiles <= H200[1] and gated.grid == plain.grid == 132
        assert gated.tiles * 66 * 16 >= 11008  # one round does
        assert place_step(layout, (11008, 4096), 4096, *H200, shape, gated=True) is None
        assert place_step(layout, (4096, 4096, 4096), 4096, *H200, shape, gated=True) is None
    keys = {step_key(layout, (11008, 11008), 4096, gated=gated) for gated in (False, True)}
    assert len(keys) == 2
