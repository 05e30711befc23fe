"""What must hold on a CUDA device: packed weights mean the same there, and a run on it gives a model as good."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import whit
from tests import tiny
from whit.methods import LayerStatistics, make_method

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
METHODS = [
    ("rtn", {"bits": 3, "group_size": 16}),
    ("gptq", {"bits": 2, "group_size": 16}),
    ("kmeans", {}),
    ("flexible", {}),
    ("flexible", {"formats": "int8,e4m3fn", "limited": True, "input_scale": "tensor"}),
    ("billm", {}),
    ("billm", {"variant": "paper"}),
    ("billm", {"variant": "official"}),
    ("stbllm", {}),
    ("stbllm", {"variant": "released"}),
    ("codebook", {"codes": 16, "width": 8}),
    ("codebook", {"codes": 16, "patterns": "ternary"}),
    ("magnitude", {}),
    ("ria", {"sparsity": 0.6, "update": True}),
    ("sparsegpt", {"pattern": "4:8"}),
    ("llm-int8", {}),
    ("llm-int8", {"outliers": "static"}),
]


@pytest.mark.parametrize(("name", "knobs"), METHODS)
def test_unpacks_bit_for_bit_as_on_the_cpu(name: str, knobs: dict[str, object]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 72, generator=generator)
    inputs = torch.randn(300, 72, generator=generator)
    statistics = LayerStatistics(72, 300, (inputs.T @ inputs / 150).cuda())
    packed = make_method(name, knobs).compress(weight.cuda(), statistics).packed
    assert torch.equal(packed.unpack().cpu(), packed.to("cpu").unpack())


@pytest.mark.parametrize(
    ("name", "knobs"),
    [*METHODS, ("pruner-zero", {"pattern": "2:4"}), ("wanda", {"allocation": "owl", "owl_multiple": 3.0})],
)
def test_a_run_on_the_device_is_as_good_as_on_the_cpu(name: str, knobs: dict[str, object], tmp_path: Path) -> None:
    model = tiny.save_model("llama", tmp_path / "model")
    data = tiny.save_inputs("llama", tmp_path / "calibration.safetensors", sequences=8)
    errors = {}
    for device in ("cpu", "cuda"):
        options = whit.RunOptions(calibration=str(data), evaluate=False, device=device, dtype="float32")
        result = whit.compress(model, name, tmp_path / device, options=options, **knobs)
        assert isinstance(result, whit.Result)
        errors[device] = sum(layer.error for layer in result.layers)
    assert errors["cuda"] == pytest.approx(errors["cpu"], rel=0.05)
    ids = tiny.inputs("llama")["input_ids"].cuda()
    loaded = whit.load(tmp_path / "cuda", device="cuda")
    with torch.no_grad():
        assert bool(torch.isfinite(loaded(input_ids=ids).logits).all())
