"""Tiny random models of many families, saved as transformers folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

TEXT = {"vocab_size": 96, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _llama_like(config: type, **extra: Any) -> Any:
    return config(
        **TEXT,
        hidden_size=40,
        intermediate_size=72,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        **extra,
    )


FAMILIES: dict[str, tuple[type, Callable[[], Any]]] = {
    "llama": (tf.LlamaForCausalLM, lambda: _llama_like(tf.LlamaConfig)),
    "llama-tied": (tf.LlamaForCausalLM, lambda: _llama_like(tf.LlamaConfig, tie_word_embeddings=True)),
    "qwen2": (tf.Qwen2ForCausalLM, lambda: _llama_like(tf.Qwen2Config)),
    "gemma3": (
        tf.Gemma3ForCausalLM,
        lambda: _llama_like(
            tf.Gemma3TextConfig,
            head_dim=16,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
    ),
    "gpt2": (
        tf.GPT2LMHeadModel,
        lambda: tf.GPT2Config(
            vocab_size=96, n_positions=64, n_embd=48, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=2
        ),
    ),
    "opt": (
        tf.OPTForCausalLM,
        lambda: tf.OPTConfig(
            **TEXT,
            hidden_size=48,
            word_embed_proj_dim=24,
            ffn_dim=80,
            num_hidden_layers=3,
            num_attention_heads=4,
            do_layer_norm_before=False,
        ),
    ),
    "gpt-neox": (
        tf.GPTNeoXForCausalLM,
        lambda: tf.GPTNeoXConfig(
            **TEXT, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4
        ),
    ),
    "bert": (
        tf.BertModel,
        lambda: tf.BertConfig(
            vocab_size=96, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96
        ),
    ),
    "albert": (
        tf.AlbertForMaskedLM,
        lambda: tf.AlbertConfig(
            vocab_size=96,
            embedding_size=24,
            hidden_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=96,
        ),
    ),
    "whisper": (
        tf.WhisperForConditionalGeneration,
        lambda: tf.WhisperConfig(
            vocab_size=96,
            num_mel_bins=16,
            d_model=32,
            encoder_layers=2,
            decoder_layers=3,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_source_positions=32,
            max_target_positions=24,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            suppress_tokens=[],
            begin_suppress_tokens=[],
        ),
    ),
    "vit": (
        tf.ViTModel,
        lambda: tf.ViTConfig(
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=64,
            image_size=16,
            patch_size=8,
        ),
    ),
    "t5": (
        tf.T5ForConditionalGeneration,
        lambda: tf.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4),
    ),
}

SaveFamily = Callable[..., Path]


def random_model(family: str) -> Any:
    """A random model of a family whose norms and biases are not the trivial ones."""
    model_class, make = FAMILIES[family]
    torch.manual_seed(7)
    model = model_class(make()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def example_inputs(family: str) -> dict[str, torch.Tensor]:
    """Inputs of the forward pass."""
    ids = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(3))
    if family == "whisper":
        features = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(3))
        return {"input_features": features, "decoder_input_ids": ids}
    if family == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))}
    if family == "t5":
        return {"input_ids": ids, "decoder_input_ids": ids[:, :5]}
    return {"input_ids": ids}


@pytest.fixture
def save_family(tmp_path: Path) -> SaveFamily:
    """Save a random model of a family and return its folder."""

    def save(family: str, **options: Any) -> Path:
        folder = tmp_path / family
        model = random_model(family)
        model.to(options.pop("dtype", torch.float32)).save_pretrained(folder, **options)
        return folder

    return save
