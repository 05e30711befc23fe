"""Small models, and compressed directories made of any layout without running a method."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from safetensors.torch import save_file
from torch import Tensor, nn

import whit
from tests.tiny import save_inputs
from whit.formats.base import Packed
from whit.models.integration import WhitConfig

Pack = Callable[[str, Tensor], Packed]
IDS = torch.arange(3, 40)[None]
_SHAPE = {
    "vocab_size": 97,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (tf.LlamaForCausalLM, tf.LlamaConfig, {}),
    "llama-tied": (tf.LlamaForCausalLM, tf.LlamaConfig, {"tie_word_embeddings": True}),
    "llama-bias": (tf.LlamaForCausalLM, tf.LlamaConfig, {"attention_bias": True}),
    "qwen2": (tf.Qwen2ForCausalLM, tf.Qwen2Config, {}),
    "qwen3": (tf.Qwen3ForCausalLM, tf.Qwen3Config, {"head_dim": 128}),
    "gemma3": (
        tf.Gemma3ForCausalLM,
        tf.Gemma3TextConfig,
        {"head_dim": 256, "query_pre_attn_scalar": 256, "num_attention_heads": 1, "num_key_value_heads": 1}
        | {"sliding_window": 8},
    ),
}


def model(family: str, dtype: torch.dtype = torch.float32, **extra: Any) -> Any:
    """A random model whose norms and biases are not the trivial ones."""
    model_class, config_class, own = _FAMILIES[family]
    torch.manual_seed(0)
    out = model_class(config_class(**_SHAPE | own | extra))
    with torch.no_grad():
        for parameter in out.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return out.to(dtype).eval()


def compress(source: Path, output: Path, method: str = "rtn", **knobs: Any) -> Path:
    """Compress without measuring; the calibration is a file of random ids beside the output."""
    inputs = save_inputs("llama", output.with_name(f"{output.name}.safetensors"))
    skip = knobs.pop("skip", ())
    embedding_bits = knobs.pop("embedding_bits", 8)
    options = whit.RunOptions(
        calibration=str(inputs),
        samples=2,
        sequence_length=24,
        evaluate=False,
        skip=skip,
        embedding_bits=embedding_bits,
        device="cpu",
    )
    whit.compress(source, method, output, options=options, **knobs)
    return output


def save_packed(original: Any, directory: Path, pack: Pack, embedding: Pack | None = None) -> Path:
    """A compressed directory in which every linear layer in the blocks is what `pack` makes of it.

    With `embedding`, so is the embedding, which the head must share.
    """
    packed = {
        name: pack(name, module.weight.detach().float())
        for name, module in original.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }
    tied = {}
    if embedding is not None:
        name = "model.embed_tokens"
        packed[name], tied = embedding(name, original.get_submodule(name).weight.detach().float()), {"lm_head": name}
    formats = [item.format.to_json() for item in packed.values()]
    config = copy.deepcopy(original.config)
    config.architectures = [type(original).__name__]
    config.dtype = original.dtype
    config.quantization_config = WhitConfig(formats, {name: index for index, name in enumerate(packed)}, tied)
    gone = {*packed, *tied}
    state = {name: value for name, value in original.state_dict().items() if name.removesuffix(".weight") not in gone}
    for name, item in packed.items():
        state |= {f"{name}.{key}": tensor.contiguous() for key, tensor in item.tensors.items()}
    directory.mkdir(parents=True)
    save_file(state, directory / "model.safetensors", {"format": "pt"})
    config.save_pretrained(directory)
    return directory


def logits(network: Any) -> Tensor:
    """Answer to `IDS`, float32."""
    with torch.no_grad():
        out: Tensor = network(IDS).logits.float()
    return out
