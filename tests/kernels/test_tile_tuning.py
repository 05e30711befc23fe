"""Tuning of 8-bit layers: a shape is filed where the launch looks for it, and what cannot be launched is left out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.kernels.test_cuda_kernels import needs_gpu
from whit.formats.base import Format, Packed
from whit.formats.outlier_int8 import OutlierInt8
from whit.formats.quantised_inputs import QuantisedInputs
from whit.formats.scaled_codes import ScaledCodes
from whit.kernels import launching, packed_linear, tile_tuning
from whit.kernels.launching import Tile, choose_tile, copies_boxes, tile_key, tuned_tiles
from whit.kernels.nvrtc import CompilationError, DeviceError
from whit.kernels.tile_tuning import candidates, kind_of, tune_tiles
from whit.kernels.tuning import tuner_of

INT8, FP8, FP4 = (ScaledCodes(system, 0) for system in ("int8", "e4m3fn", "e2m1fn"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("WHIT_CACHE", str(tmp_path))
    tuned_tiles.cache_clear()
    yield
    tuned_tiles.cache_clear()


@pytest.mark.parametrize(
    ("layout", "tokens", "kind"),
    [
        (OutlierInt8(6.0, "dynamic"), 1, "outlier-int8"),
        (OutlierInt8(6.0, "dynamic"), 512, "outlier-int8"),
        (QuantisedInputs(INT8, "int8", False), 16, "eight-bit"),
        (QuantisedInputs(FP8, "e4m3fn", False), 1, "one-8"),
        (QuantisedInputs(FP8, "e4m3fn", False), 512, ""),
        (FP8, 16, "weight-only"),
        (FP8, 512, ""),
        (FP4, 1, "one-4"),
        (FP4, 16, ""),
    ],
)
def test_kinds_of_products(layout: Format, tokens: int, kind: str) -> None:
    assert kind_of(layout, tokens) == kind
    for boxes in (False, True):
        shapes = candidates(kind, tokens, 4096, boxes)
        assert not kind or len(shapes) == len(set(shapes)) > 1


@pytest.mark.parametrize(("width", "boxes"), [(4096, True), (4104, False)])
def test_only_shapes_that_a_launch_can_take_are_tried(width: int, boxes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy engine takes rows of a multiple of 16 bytes alone: for others each would time the same default."""
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(launching, "capability", lambda device: (9, 0))
    monkeypatch.setattr(launching, "device_name", lambda device: "No Such GPU")
    monkeypatch.setattr(launching, "processors", lambda device: 132)
    monkeypatch.setattr(launching, "shared_memory", lambda device: 227 << 10)
    assert copies_boxes(width, gpu) is boxes
    key, taken = tile_key("outlier-int8", 512, 256, width), set()
    for tile in candidates("outlier-int8", 512, width, boxes):
        launching.use_tile("No Such GPU", key, tile)
        taken.add(choose_tile("outlier-int8", 512, 256, width, gpu))
    assert len(taken) == len(candidates("outlier-int8", 512, width, boxes))
    assert {tile.descriptor for tile in taken} == {boxes}


def small() -> Packed:
    layout = OutlierInt8(6.0, "dynamic")
    tensors = {name: torch.ones(spec.shape, dtype=spec.dtype) for name, spec in layout.specs(8, 64).items()}
    return Packed(layout, 8, 64, tensors)


def test_the_fastest_that_can_be_launched_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    tried: list[Tile] = []
    key = tile_key("outlier-int8", 1, 8, 64)

    def seconds() -> float:
        tried.append(tuned_tiles("interpreter")[key])
        if len(tried) == 1:
            raise RuntimeError("out of shared memory")
        return 1.0 / len(tried)

    times = tune_tiles(torch.ones(1, 64), small(), seconds)
    assert len(tried) > 2
    assert set(times) == set(tried[1:])
    tuned_tiles.cache_clear()
    assert tuned_tiles("interpreter")[key] == tried[-1]


@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError])
def test_what_was_used_before_is_used_if_nothing_works(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    key, before = tile_key("outlier-int8", 1, 8, 64), candidates("outlier-int8", 1, 64, False)[0]
    launching.use_tile("interpreter", key, before)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def seconds() -> float:
        raise error("no")

    with pytest.raises(CompilationError if error is RuntimeError else error):
        tune_tiles(torch.ones(1, 64), small(), seconds)
    assert tuned_tiles("interpreter")[key] == before


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, DeviceError, RuntimeError])
def test_a_search_that_ends_early_keeps_nothing(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """The best so far need not be the best: what was in use is."""
    key, before = tile_key("outlier-int8", 1, 8, 64), candidates("outlier-int8", 1, 64, False)[0]
    launching.use_tile("interpreter", key, before)
    tried: list[Tile] = []

    def dead() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", dead)

    def seconds() -> float:
        tried.append(tuned_tiles("interpreter")[key])
        if len(tried) == 3:
            raise error("no")
        return 1.0 / len(tried)

    with pytest.raises(error):
        tune_tiles(torch.ones(1, 64), small(), seconds)
    assert len(tried) == 3
    assert tuned_tiles("interpreter")[key] == before
    tuned_tiles.cache_clear()
    assert key not in tuned_tiles("interpreter")


def test_without_the_kernel_there_is_no_tuner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile_tuning, "explain", lambda x, packed: "plain")
    assert tuner_of(torch.ones(1, 64), small()) is None
    monkeypatch.setattr(tile_tuning, "explain", lambda x, packed: "fused int8 (Triton)")
    assert tuner_of(torch.ones(1, 64), small()) is not None


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 16, 200])
def test_launches_look_where_shapes_are_filed(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    original = launching.tile_key

    def watch(*arguments: object) -> str:
        asked.append(original(*arguments))
        return asked[-1]

    monkeypatch.setattr(launching, "tile_key", watch)
    generator = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn(256, 520, device="cuda", generator=generator)
    eight = {
        layout.system: layout.pack(weight, weight.abs().amax(1, keepdim=True) / layout.numbers.maximum)
        for layout in (INT8, FP8, FP4)
    }
    outlier = OutlierInt8(6.0, "dynamic")
    codes = torch.randint(-127, 128, (256, 520), dtype=torch.int8, device="cuda", generator=generator)
    layers = [
        Packed(outlier, 256, 520, {"codes": codes, "absmax": torch.ones(256, device="cuda")}),
        QuantisedInputs(INT8, "int8", False).pack(eight["int8"]),
        eight["e4m3fn"],
        eight["e2m1fn"],
    ]
    x = torch.randn(tokens, 520, device="cuda", generator=generator).bfloat16()
    for packed in layers:
        tuner = tuner_of(x, packed)
        if tuner is not None:
            asked.clear()
            packed_linear(x, packed)
            width = packed.tensors.get("codes", packed.tensors.get("weight_codes")).shape[1]
            assert original(kind_of(packed.format, tokens), tokens, 256, width) in asked
