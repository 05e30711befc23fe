"""Blocks that the calibration inputs never reach: compressed without data, and said so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Cache, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import whit
from tests import tiny
from tests.pipeline.conftest import Recorder
from tests.pipeline.needy import Budgeted, Sensitive
from whit.methods.pruner_zero import BLIND
from whit.models.stacks import find_stacks
from whit.pipeline.block import UNREACHED
from whit.pipeline.catch import CallCatcher
from whit.pipeline.recipe import Recipe, Step


@pytest.fixture(scope="module")
def vision_language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that sees, to be calibrated on text alone."""
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=96))
    folder = tmp_path_factory.mktemp("llava")
    model.save_pretrained(folder / "model")
    ids = tiny.inputs("llama")["input_ids"].clamp(max=95)
    save_file({"input_ids": ids}, folder / "calibration.safetensors")
    return folder


def test_calls_hold_no_key_value_cache(vision_language: Path) -> None:
    """This model does not let its caller switch the cache off by a parameter of its own."""
    model = LlavaForConditionalGeneration.from_pretrained(vision_language / "model")
    vision, text = find_stacks(model)
    batch = {"input_ids": torch.arange(9)[None]}
    caught = CallCatcher(model, text.blocks, as_tuple=False, later=vision.blocks).catch(batch, 0)
    values = [value for call in caught.calls for value in (*call.arguments, *call.keywords.values())]
    assert not [value for value in values if isinstance(value, Cache)]
    hidden = caught.hidden
    with torch.no_grad():
        for call in caught.calls:
            call.run(model.get_submodule(call.block), hidden)  # once more, as statistics and propagation do
            hidden = call.run(model.get_submodule(call.block), hidden)
        expected = model(**batch, output_hidden_states=True).hidden_states[-1]
        norm = model.model.language_model.norm
    torch.testing.assert_close(norm(hidden), expected)


def test_layers_without_inputs_have_no_gradient(vision_language: Path, tmp_path: Path) -> None:
    options = whit.RunOptions(
        calibration=str(vision_language / "calibration.safetensors"), evaluate=False, device="cpu"
    )
    recipe = Recipe((Step(Sensitive(), exclude=("*fc1", "*o_proj")), Step(Budgeted(), ("*fc1", "*o_proj"))))
    listener = Recorder()
    result = whit.compress(vision_language / "model", recipe, tmp_path / "out", options=options, listener=listener)
    assert isinstance(result, whit.Result)
    backward = [step for step in listener.steps if step.startswith("backward")]
    assert len(backward) == 2  # streamed, although the model has two stacks
    blind = [layer for layer in result.layers if "vision" in layer.block and layer.method["method"] == "sensitive"]
    assert blind
    assert all(UNREACHED in layer.notes for layer in blind)
    assert not [layer for layer in result.layers if "language" in layer.block and UNREACHED in layer.notes]
    (entry,) = result.run["allocation"]
    assert len(entry["blocks"]) == 2
    assert not [block for block in entry["blocks"] if "vision" in block]


def test_pruner_zero_goes_by_magnitude_where_there_is_no_gradient(vision_language: Path, tmp_path: Path) -> None:
    options = whit.RunOptions(
        calibration=str(vision_language / "calibration.safetensors"), evaluate=False, device="cpu"
    )
    results = {}
    for method in ("pruner-zero", "magnitude"):
        out = tmp_path / method
        result = whit.compress(vision_language / "model", method, out, options=options, comparison="row")
        assert isinstance(result, whit.Result)
        results[method] = result
    tensors = {name: load_file(tmp_path / name / "model.safetensors") for name in results}
    for layer in (layer for layer in results["pruner-zero"].layers if layer.block):
        blind = "vision" in layer.block
        assert (BLIND in layer.notes) == blind
        mask = next(key for key in tensors["magnitude"] if key.startswith(layer.name) and key.endswith("mask"))
        assert torch.equal(tensors["pruner-zero"][mask], tensors["magnitude"][mask]) == blind, layer.name


def test_a_stack_that_text_never_reaches(vision_language: Path, tmp_path: Path) -> None:
    options = whit.RunOptions(
        calibration=str(vision_language / "calibration.safetensors"), evaluate=False, device="cpu"
    )
    listener = Recorder()
    result = whit.compress(vision_language / "model", "gptq", tmp_path / "out", options=options, listener=listener)
    assert isinstance(result, whit.Result)
    unreached = {layer.block for layer in result.layers if UNREACHED in layer.notes}
    reached = {layer.block for layer in result.layers if layer.block} - unreached
    assert len(unreached) == len(reached) == 2
    assert all("vision" in block for block in unreached)
    assert not any("vision" in block for block in reached)
    assert [note for note in listener.notes if "never reach" in note and "vision" in note]
    assert len(listener.blocks) == 4
    model = whit.load(tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llava"
