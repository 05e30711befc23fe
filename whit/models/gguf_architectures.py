"""What differs between GGUF and transformers, per architecture, as data: names, row orders, metadata keys.

- `llama` files store the rows of the query and key projections in interleaved rotary order (pairs 2i, 2i+1);
  transformers rotates halves (pairs i, i + d/2), so the rows of each head are reordered.
- `gemma3` files store the weights of norms as 1 + w, transformers stores w.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Transform:
    """How a tensor changes between GGUF and transformers.

    Attributes:
        read: (tensor of the file, config) -> tensor of the model. write: the inverse.
        moves_rows: only whole rows move, so that rows of quantised bytes may be moved likewise.
    """

    read: Callable[[Tensor, Any], Tensor]
    write: Callable[[Tensor, Any], Tensor]
    moves_rows: bool


def unpermute_rotary(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head from interleaved rotary order (pairs 2i, 2i+1) to half-split order (pairs i, i + d/2).

    Args:
        weight: (heads * d, ...), d even.
        heads: number of heads in the rows.

    Returns:
        The same rows reordered, contiguous.
    """
    pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape).contiguous()


def permute_rotary(weight: Tensor, heads: int) -> Tensor:
    """Inverse of `unpermute_rotary`: half-split to interleaved rotary order."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape).contiguous()


_QUERY = Transform(
    lambda weight, config: unpermute_rotary(weight, config.num_attention_heads),
    lambda weight, config: permute_rotary(weight, config.num_attention_heads),
    moves_rows=True,
)
_KEY = Transform(
    lambda weight, config: unpermute_rotary(weight, config.num_key_value_heads),
    lambda weight, config: permute_rotary(weight, config.num_key_value_heads),
    moves_rows=True,
)
_ONE_MORE = Transform(
    lambda weight, config: weight - 1.0, lambda weight, config: weight.float() + 1.0, moves_rows=False
)

_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_ATTENTION = {f"attn_{letter}": f"self_attn.{letter}_proj" for letter in "qkv"} | {"attn_output": "self_attn.o_proj"}
_GATED = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_SANDWICH_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}

#: Metadata keys (after the architecture's prefix) -> config fields.
CONFIG_KEYS = (
    ("context_length", "max_position_embeddings"),
    ("block_count", "num_hidden_layers"),
    ("embedding_length", "hidden_size"),
    ("feed_forward_length", "intermediate_size"),
    ("attention.head_count", "num_attention_heads"),
    ("attention.head_count_kv", "num_key_value_heads"),
    ("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
    ("attention.key_length", "head_dim"),
    ("rope.freq_base", "rope_theta"),
)
#: Metadata keys "tokenizer.ggml.<key>_token_id" -> config fields.
TOKEN_KEYS = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}


@dataclass(frozen=True)
class GGUFArchitecture:
    """How one GGUF architecture becomes a transformers model, and back.

    Attributes:
        model_type, model_class: of transformers.
        dtype: in which the architecture is known to compute well and untouched tensors are saved.
        block: "blk.N." parts -> "model.layers.N." parts (weights and biases alike).
        transforms: name part (in a block or outside) -> how the tensor changes.
        config: metadata keys beyond the common ones -> config fields.
        defaults: config fields that the metadata does not state.
    """

    model_type: str
    model_class: str
    dtype: torch.dtype
    block: Mapping[str, str]
    transforms: Mapping[str, Transform] = field(default_factory=dict)
    config: tuple[tuple[str, str], ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def name(self, stored: str) -> str | None:
        """Model name of a stored tensor, or None if the architecture has no such tensor."""
        if stored in _OUTER:
            return _OUTER[stored]
        head, _, rest = stored.partition(".")
        index, _, rest = rest.partition(".")
        part, _, kind = rest.partition(".")
        if head != "blk" or not index.isdigit() or part not in self.block or kind not in ("weight", "bias"):
            return None
        return f"model.layers.{index}.{self.block[part]}.{kind}"

    def stored_name(self, name: str) -> str | None:
        """Inverse of `name`: the name in a file of a model's tensor, or None."""
        outer = {model: stored for stored, model in _OUTER.items()}
        if name in outer:
            return outer[name]
        index, _, rest = name.removeprefix("model.layers.").partition(".")
        middle, _, kind = rest.rpartition(".")
        part = {model: stored for stored, model in self.block.items()}.get(middle)
        if not name.startswith("model.layers.") or not index.isdigit() or part is None:
            return None
        return f"blk.{index}.{part}.{kind}" if kind in ("weight", "bias") else None

    def transform(self, stored: str) -> Transform | None:
        """The transform of a stored tensor, if it has one."""
        return self.transforms.get(stored.split(".")[-2])


# float16 keeps 11 significant bits of a scale (float16) times an integer; bfloat16 would keep 8. The families whose
# activations are known to overflow float16 are saved in bfloat16, which is what they were trained in.
ARCHITECTURES: dict[str, GGUFArchitecture] = {
    "llama": GGUFArchitecture(
        "llama",
        "LlamaForCausalLM",
        torch.float16,
        _NORMS | _ATTENTION | _GATED,
        {"attn_q": _QUERY, "attn_k": _KEY},
    ),
    "qwen2": GGUFArchitecture("qwen2", "Qwen2ForCausalLM", torch.bfloat16, _NORMS | _ATTENTION | _GATED),
    "qwen3": GGUFArchitecture("qwen3", "Qwen3ForCausalLM", torch.bfloat16, _NORMS | _HEAD_NORMS | _ATTENTION | _GATED),
    "gemma3": GGUFArchitecture(
        "gemma3_text",
        "Gemma3ForCausalLM",
        torch.bfloat16,
        _SANDWICH_NORMS | _HEAD_NORMS | _ATTENTION | _GATED,
        dict.fromkeys((*_SANDWICH_NORMS, *_HEAD_NORMS, "output_norm"), _ONE_MORE),
        (("attention.sliding_window", "sliding_window"), ("attention.key_length", "query_pre_attn_scalar")),
        {"rope_local_base_freq": 10000.0},
    ),
}
