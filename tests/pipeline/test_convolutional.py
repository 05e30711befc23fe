"""Convolutional networks through the streaming pipeline: stages are blocks, whose hidden states change their shape."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
)

import whit
from whit.errors import ExportError
from whit.models.layers import layer_kind
from whit.models.packed import PackedConv2d, packed_modules
from whit.report.record import Result


def resnet() -> PreTrainedModel:
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 2]}
    return ResNetForImageClassification(ResNetConfig(layer_type="basic", num_labels=5, **sizes))


def convnext() -> PreTrainedModel:
    return ConvNextForImageClassification(
        ConvNextConfig(hidden_sizes=[16, 32, 48, 64], depths=[1, 2, 1, 1], num_labels=5)
    )


FAMILIES = {"resnet": (resnet, 9), "convnext": (convnext, 13)}


def run(family: str, folder: Path, method: str, **knobs: object) -> tuple[PreTrainedModel, Result]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FAMILIES[family][0]().eval()
    model.save_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(1)
    for name, size in (("calibration", 6), ("evaluation", 2)):
        pixels = torch.randn(size, 3, 32, 32, generator=generator)
        labels = torch.randint(0, 5, (size,), generator=generator)
        save_file({"pixel_values": pixels, "labels": labels}, folder / f"{name}.safetensors")
    data = {name: str(folder / f"{name}.safetensors") for name in ("calibration", "evaluation")}
    options = whit.RunOptions(device="cpu", true_sequential=True, **data)
    result = whit.compress(folder / "model", method, folder / method, options=options, **knobs)
    assert isinstance(result, Result)
    return model, result


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_stages_are_compressed_saved_and_loaded(family: str, tmp_path: Path) -> None:
    model, fed_back = run(family, tmp_path, "gptq", bits=8, group_size=0)
    assert len(fed_back.layers) == FAMILIES[family][1]
    loaded = whit.load(tmp_path / "gptq")
    packed = packed_modules(loaded)
    assert set(packed) == {layer.name for layer in fed_back.layers}
    assert any(isinstance(module, PackedConv2d) for module in packed.values())
    assert sum(module.packed.stored_bytes() for module in packed.values()) == fed_back.size.compressed_bytes
    again = type(model).from_pretrained(tmp_path / "gptq")
    with pytest.raises(ExportError, match=r"cannot hold layer .*not convolution"):
        whit.export(tmp_path / "gptq", "compressed-tensors", tmp_path / "exported")
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.equal(again(pixels).logits, loaded(pixels).logits)
        exact = model(pixels).logits
        assert (loaded(pixels).logits - exact).norm() < 0.05 * exact.norm()


def test_feedback_beats_rounding_on_convolutions(tmp_path: Path) -> None:
    _, rounded = run("resnet", tmp_path, "rtn", bits=3, group_size=0)
    _, fed_back = run("resnet", tmp_path, "gptq", bits=3, group_size=0)
    assert rounded.size.compressed_bytes == fed_back.size.compressed_bytes
    errors = [result.compressed.metric("output_error").value for result in (rounded, fed_back)]  # type: ignore[union-attr]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_gradients_streamed_and_of_the_module_in_memory_choose_alike(family: str, tmp_path: Path) -> None:
    model, streamed = run(family, tmp_path, "pruner-zero")
    inside = {layer.name for layer in streamed.layers}
    names = {name for name, module in model.named_modules() if layer_kind(module) is not None}
    held = whit.compress(
        model,
        "pruner-zero",
        calibration=[load_file(tmp_path / "calibration.safetensors")],
        loss=lambda output, _: output.loss,
        skip=sorted(names - inside),
        true_sequential=True,
    )
    loaded = packed_modules(whit.load(tmp_path / "pruner-zero"))
    assert set(packed_modules(held.module)) == set(loaded) == inside
    for name, module in packed_modules(held.module).items():
        same = (module.weight != 0) == (loaded[name].weight != 0)
        assert float(same.float().mean()) > 0.999  # sums of squares in another order: ties may fall otherwise
