"""Which launch is kept for a step of decoding: the search on times that are made up, without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kernels.test_cuda_kernels import random_packed
from whit.formats.base import Format, Packed
from whit.formats.binary_residual import BinaryResidual
from whit.formats.grouped_integer import GroupedInteger
from whit.formats.level_table import LevelTable
from whit.kernels import step_tuning
from whit.kernels.cuda_layout import Layout, layout_of
from whit.kernels.cuda_shapes import Outside, Shape, step_sizes, step_timings
from whit.kernels.cuda_step import place_step, step_key
from whit.kernels.cuda_tuned import Tuned, keep_tuned, tuned_shapes
from whit.kernels.step_tuning import LEAST_GAIN, Times, no_gated_launch, tune_in_step

H200 = (132, 232448)
ROWS, COLUMNS = (1024, 1024), 4096


LAYOUT = LevelTable(2, 0)


class Device:
    """A device that is not there; what is found for it lies in a folder of the test's own."""

    name = "No Such GPU"

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        answers: dict[str, Callable[..., Any]] = {
            "usable": lambda x, packed: layout_of(packed.format, packed.columns),
            "starts_early": lambda index: True,
            "counts_bits": lambda index: True,
            "device_limits": lambda index: (self.name, *H200),
            "call_source": lambda call, launch: (call, launch),
            "compile_together": lambda sources, index: None,
        }
        for name, answer in answers.items():
            monkeypatch.setattr(step_tuning, name, answer)

    @property
    def shapes(self) -> dict[str, Tuned]:
        return tuned_shapes(self.name)

    @property
    def kept(self) -> dict[str, Tuned]:
        """What another process finds."""
        tuned_shapes.cache_clear()
        return dict(self.shapes)


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    monkeypatch.setenv("WHIT_CACHE", str(tmp_path))
    tuned_shapes.cache_clear()
    yield Device(monkeypatch)
    tuned_shapes.cache_clear()


def described(layout: Format) -> Layout:
    found = layout_of(layout, COLUMNS)
    assert found is not None
    return found


def key_of(layout: Format, gated: bool) -> str:
    return step_key(described(layout), (64, 64), COLUMNS, gated)


def two_weights(layout: Format) -> list[Packed]:
    return [random_packed(layout, 64, COLUMNS) for _ in ROWS]


def tuned(
    device: Device, layout: Format, gated: bool, seconds: Callable[[Tuned | None], float]
) -> tuple[str, Shape | None, Times]:
    key = key_of(layout, gated)
    x = torch.zeros(1, COLUMNS, dtype=torch.bfloat16)
    time = lambda: seconds(device.shapes.get(key))  # noqa: E731
    best, times = tune_in_step(x, two_weights(layout), time, makes=True, gated=gated)
    return key, best, times


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("layout", [BinaryResidual(128, True), LAYOUT, GroupedInteger(1, 128, True)], ids=str)
def test_the_fastest_is_found_and_kept(layout: Format, gated: bool, device: Device) -> None:
    def seconds(shape: Tuned | None) -> float:
        if not isinstance(shape, Shape):
            return 2.0
        return 1.0 + abs(shape.threads - 384) / 512 + 0.1 * shape.bulk + 0.01 * shape.late + 0.001 * shape.depth

    key, best, times = tuned(device, layout, gated, seconds)
    assert best is not None and (best.threads, best.bulk, best.late, best.depth) == (384, False, False, 2)
    assert device.shapes == {key: best} == device.kept
    assert times[None] == 2.0 and times[best] == min(times.values())


@pytest.mark.parametrize("gated", [False, True])
def test_a_launch_that_is_hardly_faster_is_switched_off_for_good(gated: bool, device: Device) -> None:
    earlier, before = step_timings(step_sizes(described(LAYOUT))[0])[4], LEAST_GAIN**-0.5
    keep_tuned(device.name, {key_of(LAYOUT, gated): earlier})
    key, best, times = tuned(device, LAYOUT, gated, lambda shape: 1.0 if isinstance(shape, Shape) else before)
    assert best is None and len(times) > 8
    assert device.shapes == {key: Outside()} == device.kept
    found = place_step(described(LAYOUT), (64, 64), COLUMNS, *H200, device.shapes[key], gated=gated)
    assert found is None
    keep_tuned(device.name, {"another": earlier})
    assert device.shapes == {key: Outside(), "another": earlier} == device.kept
    _, best, _ = tuned(device, LAYOUT, gated, lambda shape: 1.0 if isinstance(shape, Shape) else 2.0)
    assert best is not None and device.kept[key] == best


@pytest.mark.parametrize("gated", [False, True])
def test_what_was_found_before_is_tried_again(gated: bool, device: Device) -> None:
    """Also where its size is not the fastest of those that are tried first."""
    earlier = step_timings(step_sizes(described(LAYOUT))[-1])[-1]
    keep_tuned(device.name, {key_of(LAYOUT, gated): earlier})

    def seconds(shape: Tuned | None) -> float:
        return 1.0 if shape == earlier else 1.5 if isinstance(shape, Shape) and shape.threads == 256 else 2.0

    key, best, _ = tuned(device, LAYOUT, gated, seconds)
    assert best == earlier and device.kept == {key: earlier}


@pytest.mark.parametrize("gated", [False, True])
def test_a_search_that_ends_early_leaves_what_was_found_before(gated: bool, device: Device) -> None:
    key, earlier = key_of(LAYOUT, gated), step_sizes(described(LAYOUT))[0]
    device.shapes[key] = earlier

    def seconds(shape: Tuned | None) -> float:
        if isinstance(shape, Shape) and shape.threads == 512:
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        tuned(device, LAYOUT, gated, seconds)
    assert device.shapes == {key: earlier} and not device.kept


def test_nothing_is_kept_where_no_shape_can_be_launched(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_tuning, "place_step", lambda *given, **options: None)
    key, best, times = tuned(device, LAYOUT, True, lambda shape: 1.0)
    assert (best, times) == (None, {None: 1.0})
    assert key not in device.shapes and not device.kept


@pytest.mark.parametrize("ends", [False, True])
def test_two_products_are_timed_without_the_launch_that_multiplies_them_with_each_other(
    ends: bool, device: Device
) -> None:
    """That launch is taken first: with it every shape of the two would take the same time."""
    gated_key, gated_shape = key_of(LAYOUT, True), step_sizes(described(LAYOUT))[1]
    keep_tuned(device.name, {gated_key: gated_shape})
    taken: list[bool] = []

    def seconds(shape: Tuned | None) -> float:
        taken.append(gated_key in device.shapes)
        if ends and len(taken) > 3:
            raise KeyboardInterrupt
        return 1.0 if isinstance(shape, Shape) and shape.threads == 384 else 2.0

    x = torch.zeros(1, COLUMNS, dtype=torch.bfloat16)
    with pytest.raises(KeyboardInterrupt) if ends else nullcontext(), no_gated_launch(x, two_weights(LAYOUT)):
        tuned(device, LAYOUT, False, seconds)
    assert len(taken) > 3 and not any(taken)
    assert device.shapes[gated_key] == gated_shape == device.kept[gated_key]
    assert (key_of(LAYOUT, False) in device.kept) is not ends


def test_where_there_is_no_such_launch_nothing_is_put_aside(device: Device) -> None:
    x = torch.zeros(1, COLUMNS, dtype=torch.bfloat16)
    keep_tuned(device.name, {"another": Outside()})
    for weights in ([], two_weights(LAYOUT)):
        with no_gated_launch(x, weights):
            assert device.shapes == {"another": Outside()}
        assert device.shapes == {"another": Outside()}


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
