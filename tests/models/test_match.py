"""Checkpoint names that differ from the model's, tied weights that are not, and conversions left to transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from tests.models.conftest import FAMILIES, SaveFamily, example_inputs, random_model
from whit.errors import ModelError
from whit.models.resolve import resolve_model
from whit.models.skeleton import load_dense


def rename(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    save_file({change(name): tensor for name, tensor in load_file(path).items()}, path)


def check(folder: Path, family: str) -> list[str]:
    reference = resolve_model(folder)
    with torch.no_grad():
        found = load_dense(reference, torch.float32, "cpu")(**example_inputs(family))[0]
        expected = FAMILIES[family][0].from_pretrained(folder).eval()(**example_inputs(family))[0]
    assert torch.equal(found, expected)
    return reference.notes


@pytest.mark.parametrize(("family", "prefix"), [("gpt2", "transformer."), ("opt", "model.")])
def test_base_model_prefix_may_be_absent(family: str, prefix: str, save_family: SaveFamily):
    folder = save_family(family)
    rename(folder, lambda name: name.removeprefix(prefix))
    assert check(folder, family) == []


def test_base_model_prefix_may_be_extra(save_family: SaveFamily):
    folder = save_family("bert")
    rename(folder, lambda name: f"bert.{name}")
    assert check(folder, "bert") == []


def test_legacy_layer_norm_names(save_family: SaveFamily):
    folder = save_family("bert")
    legacy = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def change(name: str) -> str:
        for new, old in legacy.items():
            name = name.replace(new, old)
        return name

    rename(folder, change)
    assert any(name.endswith("gamma") for name in load_file(folder / "model.safetensors"))
    assert check(folder, "bert") == []


def test_tied_in_the_config_but_different_in_the_file_stays_untied(save_family: SaveFamily):
    folder = save_family("llama")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"tie_word_embeddings": True}))
    notes = check(folder, "llama")
    assert any("kept apart" in note for note in notes)
    model = load_dense(resolve_model(folder), torch.float32, "cpu")
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_tied_and_stored_twice_is_tied(save_family: SaveFamily):
    folder = save_family("llama-tied")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    assert check(folder, "llama-tied") == []
    reference = resolve_model(folder)
    model = load_dense(reference, torch.float32, "cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert reference.dense_bytes == sum(parameter.numel() for parameter in model.parameters()) * 4


def test_tied_weight_stored_only_under_the_head(save_family: SaveFamily):
    folder = save_family("llama-tied")
    rename(folder, lambda name: name.replace("model.embed_tokens", "lm_head"))
    assert check(folder, "llama-tied") == []


def test_experts_stored_one_by_one_are_converted_by_transformers(tmp_path: Path):
    config = tf.MixtralConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=64,
    )
    torch.manual_seed(1)
    model = tf.MixtralForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    reference = resolve_model(tmp_path)
    assert any("converted by transformers" in note for note in reference.notes)
    with torch.no_grad():
        found = load_dense(reference, torch.float32, "cpu")(**example_inputs("llama"))[0]
        assert torch.equal(found, model(**example_inputs("llama"))[0])


def test_names_of_another_family_are_refused(save_family: SaveFamily):
    folder = save_family("llama")
    rename(folder, lambda name: f"other.{name}")
    with pytest.raises(ModelError, match="does not fit LlamaForCausalLM"):
        resolve_model(folder)


def test_no_architecture_in_the_config_takes_the_causal_model(save_family: SaveFamily):
    folder = save_family("llama")
    fields = json.loads((folder / "config.json").read_text())
    del fields["architectures"]
    (folder / "config.json").write_text(json.dumps(fields))
    assert resolve_model(folder).model_class is tf.LlamaForCausalLM


def test_identity_follows_weights_and_config_not_the_place(save_family: SaveFamily, tmp_path: Path):
    folder = save_family("llama")
    first = resolve_model(folder).identity
    folder.rename(tmp_path / "moved")
    assert resolve_model(tmp_path / "moved").identity == first
    fields = json.loads((tmp_path / "moved" / "config.json").read_text())
    (tmp_path / "moved" / "config.json").write_text(json.dumps(fields | {"rms_norm_eps": 1e-3}))
    assert resolve_model(tmp_path / "moved").identity != first
    (tmp_path / "moved" / "config.json").write_text(json.dumps(fields))
    tensors = load_file(tmp_path / "moved" / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, tmp_path / "moved" / "model.safetensors")
    assert resolve_model(tmp_path / "moved").identity != first


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtype_is_that_of_the_checkpoint(dtype: torch.dtype, save_family: SaveFamily):
    folder = save_family("llama", dtype=dtype)
    assert resolve_model(folder).dtype is dtype
    fields = json.loads((folder / "config.json").read_text())
    fields.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(fields))
    assert resolve_model(folder).dtype is dtype


def test_generation_config_is_kept(save_family: SaveFamily):
    folder = save_family("llama")
    model = random_model("llama")
    model.generation_config.max_new_tokens = 17
    model.generation_config.save_pretrained(folder)
    assert resolve_model(folder).generation_config.max_new_tokens == 17
    assert resolve_model(save_family("bert")).generation_config is None
