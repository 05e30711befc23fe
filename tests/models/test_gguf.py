"""GGUF files written here from random models, with the layout conventions of llama.cpp spelled out independently."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.models.conftest import example_inputs, random_model
from whit.errors import ModelError
from whit.models.gguf import GGUFSource, open_gguf
from whit.models.gguf_architectures import ARCHITECTURES, permute_rotary, unpermute_rotary
from whit.models.resolve import resolve_model
from whit.models.skeleton import load_dense

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
GEMMA_NAMES = NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def interleave(weight: Tensor, heads: int) -> Tensor:
    """Half-split to interleaved rotary rows, one row at a time."""
    size = weight.shape[0] // heads
    rows = []
    for head in range(heads):
        for pair in range(size // 2):
            rows += [weight[head * size + pair], weight[head * size + size // 2 + pair]]
    return torch.stack(rows)


def write(model: Any, path: Path, architecture: str, quantization: str = "F32", **extra: Any) -> Path:
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if architecture == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    for key, value in extra.items():
        writer.add_string(f"{architecture}.{key}", value)
    kind = gguf.GGMLQuantizationType[quantization]
    for name, tensor in model.state_dict().items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        base, _, ending = name.rpartition(".")
        if architecture == "llama" and base.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if base.endswith("q_proj") else config.num_key_value_heads
            tensor = interleave(tensor, heads)
        if architecture == "gemma3" and "norm" in base:
            tensor = tensor + 1
        names = GEMMA_NAMES if architecture == "gemma3" else NAMES
        prefix = ""
        if base.startswith("model.layers."):
            _, _, index, base = base.split(".", 3)
            prefix = f"blk.{index}."
        values = tensor.numpy()
        if kind != gguf.GGMLQuantizationType.F32 and values.ndim == 2:
            writer.add_tensor(f"{prefix}{names[base]}.{ending}", gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{prefix}{names[base]}.{ending}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_qwen3() -> Any:
    import transformers as tf

    torch.manual_seed(5)
    config = tf.Qwen3Config(
        vocab_size=96,
        hidden_size=40,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        rope_theta=5000.0,
    )
    return tf.Qwen3ForCausalLM(config).eval()


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3"])
def test_written_model_is_read_back_exactly(architecture: str, tmp_path: Path):
    model = random_qwen3() if architecture == "qwen3" else random_model(architecture)
    if architecture == "gemma3":
        model.config.layer_types = None
        model = type(model)(type(model.config)(**{**_plain(model.config), "query_pre_attn_scalar": 16})).eval()
    reference = resolve_model(write(model, tmp_path / "model.gguf", architecture))
    found = load_dense(reference, torch.float32, "cpu")
    assert type(found) is type(model)
    for name, tensor in model.state_dict().items():
        # 1 + w is stored in float32, so w comes back with the rounding of that sum.
        tolerance = 1e-6 if architecture == "gemma3" and "norm" in name else 0
        torch.testing.assert_close(found.state_dict()[name], tensor, rtol=0, atol=tolerance)
    with torch.no_grad():
        ids = example_inputs("llama")
        torch.testing.assert_close(found(**ids).logits, model(**ids).logits, rtol=0, atol=1e-5)
    assert reference.dtype is ARCHITECTURES[architecture].dtype
    assert reference.directory is None


def _plain(config: Any) -> dict[str, Any]:
    keys = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "head_dim",
        "sliding_window",
    )
    return {key: getattr(config, key) for key in keys}


@pytest.mark.parametrize("quantization", ["F16", "BF16", "Q8_0", "Q4_1", "Q5_0"])
def test_quantised_tensors_are_dequantised(quantization: str, tmp_path: Path):
    import transformers as tf

    torch.manual_seed(2)
    config = tf.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    model = tf.LlamaForCausalLM(config)
    opened = open_gguf(write(model, tmp_path / "model.gguf", "llama", quantization))
    kind = gguf.GGMLQuantizationType[quantization]
    source = opened.source
    assert isinstance(source, GGUFSource)
    name = "model.layers.0.mlp.down_proj.weight"
    assert source.quantization(name) == quantization
    assert source.quantization("model.norm.weight") == "F32"
    expected = gguf.dequantize(gguf.quantize(model.state_dict()[name].numpy(), kind), kind)
    loaded = source.load(name)
    assert loaded.dtype is torch.float32
    assert np.array_equal(loaded.numpy(), expected)
    assert any(quantization in note for note in opened.notes) == quantization.startswith("Q")


def test_unpermute_inverts_the_interleaving():
    weight = torch.arange(24 * 3.0).reshape(24, 3)
    assert torch.equal(unpermute_rotary(interleave(weight, 3), 3), weight)
    assert torch.equal(unpermute_rotary(interleave(weight[:, 0], 2), 2), weight[:, 0])
    assert torch.equal(permute_rotary(weight, 3), interleave(weight, 3))


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_names_of_the_model_lead_back_to_names_of_the_file(architecture: str):
    known = ARCHITECTURES[architecture]
    stored = [f"blk.11.{part}.{kind}" for part in known.block for kind in ("weight", "bias")]
    for name in [*stored, "token_embd.weight", "output_norm.weight", "output.weight"]:
        model_name = known.name(name)
        assert model_name is not None
        assert known.stored_name(model_name) == name
    assert known.stored_name("model.layers.0.self_attn.rotary_emb.inv_freq") is None
    assert known.stored_name("model.layers.x.self_attn.q_proj.weight") is None


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(random_model("llama-tied"), tmp_path / "tiny.gguf", "llama")


def refused(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        resolve_model(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_tied_head_is_tied(file: Path):
    model = load_dense(resolve_model(file), torch.float32, "cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_truncated_anywhere(file: Path):
    content = file.read_bytes()
    for length in (3, 4, 8, 20, 24, 60, 200, 700, 1500, len(content) // 2, len(content) - 64):
        file.write_bytes(content[:length])
        message = refused(file)
        assert "tiny.gguf" in message
        assert "incomplete" in message or "not a GGUF file" in message


def test_not_gguf(file: Path):
    file.write_bytes(b"PK\x03\x04 something else")
    assert "not a GGUF file" in refused(file)


@pytest.mark.parametrize("content", [b"", b"GGUF"])
def test_nearly_empty(file: Path, content: bytes):
    file.write_bytes(content)
    assert "tiny.gguf" in refused(file)


def test_gguf_is_recognised_without_its_ending(file: Path):
    assert resolve_model(file.rename(file.with_name("blob"))).label == "blob"


@pytest.mark.parametrize("version", [1, 4, 3 << 24])
def test_unknown_version(file: Path, version: int):
    content = bytearray(file.read_bytes())
    content[4:8] = struct.pack("<I", version)
    file.write_bytes(content)
    assert "version" in refused(file)


@pytest.mark.parametrize("position", [8, 16])
def test_counts_that_lie(file: Path, position: int):
    content = bytearray(file.read_bytes())
    content[position : position + 8] = struct.pack("<Q", 1 << 60)
    file.write_bytes(content)
    assert "damaged" in refused(file)


def test_unknown_architecture_lists_the_known(tmp_path: Path):
    message = refused(write(random_model("llama"), tmp_path / "x.gguf", "lama"))
    assert "'lama'" in message
    assert "did you mean 'llama'" in message
    assert all(name in message for name in ARCHITECTURES)


def test_scaled_rotary_positions_are_refused(tmp_path: Path):
    path = write(random_model("llama"), tmp_path / "x.gguf", "llama", **{"rope.scaling.type": "yarn"})
    assert "'yarn'" in refused(path)


def test_tensors_of_another_shape(tmp_path: Path):
    model = random_model("llama")
    model.config.intermediate_size = 80
    assert "(72, 40) in the file, (80, 40) in the model" in refused(write(model, tmp_path / "x.gguf", "llama"))


def test_unknown_tensor(tmp_path: Path):
    model = random_model("llama")
    path = write(model, tmp_path / "x.gguf", "llama")
    path.write_bytes(path.read_bytes().replace(b"blk.0.ffn_up", b"blk.0.ffn_xx"))
    assert "'blk.0.ffn_xx.weight'" in refused(path)
