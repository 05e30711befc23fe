"""A block is run in few launches only if it computes exactly what its parts suggest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tests import tiny
from whit.errors import DataError, KnobError
from whit.generation import blocks, continue_greedily
from whit.generation.blocks import agrees

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
IDS = torch.arange(5)[None]


def fused(model: Any) -> Tensor:
    return continue_greedily(model.eval(), IDS, new_tokens=8, way="fused").tokens


def library(model: Any) -> Tensor:
    return continue_greedily(model.eval(), IDS, new_tokens=8, way="library").tokens


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**SMALL | changes))


def loud(model: Any) -> Any:
    """Weights large enough that every part of a block matters."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize(
    "model",
    [
        lambda: llama(head_dim=16, attention_bias=True, mlp_bias=True),
        lambda: llama(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
        lambda: llama(tie_word_embeddings=True),
        lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=None)),
        lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL)),
    ],
)
def test_models_of_the_same_form(model: Any) -> None:
    made = loud(model())
    assert torch.equal(fused(made), library(made))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: llama(hidden_act="gelu"), "block 0 computes something else"),
        (tiny.gemma3, "attend to a part"),
        (lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=4)), "window only"),
        (lambda: llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), "depend on"),
        (tiny.opt, "its decoder is made of"),
    ],
)
def test_others_are_refused(model: Any, reason: str) -> None:
    with pytest.raises(KnobError, match=reason):
        fused(loud(model()))


def granite(**changes: float) -> Any:
    torch.manual_seed(1)
    neutral = {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 12**-0.5}
    return GraniteForCausalLM(GraniteConfig(**SMALL | neutral | {"logits_scaling": 1.0} | changes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_scaled_by_a_little_is_no_rounding(dtype: torch.dtype) -> None:
    """Where results have few bits a factor near one is smaller than the roundings of an element."""
    for model in (granite(), llama(tie_word_embeddings=True), llama(attention_bias=True, mlp_bias=True)):
        made = loud(model).to(dtype)
        assert torch.equal(fused(made), library(made))
    for changes, reason in (
        ({"residual_multiplier": 0.95}, "block 0 computes something else"),
        ({"residual_multiplier": 1.04}, "block 0 computes something else"),
        ({"logits_scaling": 1.04}, "after its output head"),
    ):
        with pytest.raises(KnobError, match=reason):
            fused(loud(granite(**changes)).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1.0, 30.0, 1000.0])
def test_agreement_is_not_scaled(dtype: torch.dtype, size: float) -> None:
    """Roundings within and after a block pass, also where few elements hold most of it; 5 % on all of it do not."""
    generator = torch.Generator().manual_seed(0)
    unit = torch.finfo(dtype).eps
    for _ in range(50):
        before, added = (torch.randn(16, 48, generator=generator) for _ in range(2))
        before = (size * before).to(dtype)
        added[0, :2] *= 1000
        rough = 1 + unit * torch.randn(16, 48, generator=generator)
        theirs = (before + added).to(dtype)
        assert agrees((before + added * rough).to(dtype), theirs, before)
        if size * unit < 0.2:  # else what is added drowns in the rounding of the sum
            assert not agrees((before + added * rough / 0.95).to(dtype), theirs, before)


def test_a_block_of_another_meaning_is_noticed() -> None:
    """The same parts, called in another way: what a subclass or a patch could do."""
    model = loud(llama())

    class Doubled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.weight, self.variance_epsilon = inner.weight, 1e-6

        def forward(self, states: Tensor) -> Tensor:
            return 2 * states * self.weight

    model.model.layers[2].post_attention_layernorm = Doubled(model.model.layers[2].post_attention_layernorm)
    with pytest.raises(KnobError, match="block 2 computes something else"):
        fused(model)


def test_something_after_the_head_is_noticed() -> None:
    model = loud(llama())
    model.lm_head.register_forward_hook(lambda *given: given[2] * 0.5)  # runs in the fused way, too
    assert torch.equal(fused(model), library(model))
    inner = model.forward

    def halved(*arguments: Any, **keywords: Any) -> Any:
        out = inner(*arguments, **keywords)
        out.logits = out.logits * 0.5
        return out

    model.forward = halved
    with pytest.raises(KnobError, match="after its output head"):
        fused(model)


def test_hooks_of_the_user_are_not_skipped() -> None:
    model = llama()
    model.model.layers[1].self_attn.register_forward_hook(lambda *given: None)
    with pytest.raises(KnobError, match="LlamaAttention carries hooks"):
        fused(model)


def test_agreement_allows_rounding_and_no_more() -> None:
    torch.manual_seed(0)
    before, added = 100 * torch.randn(4, 64), torch.randn(4, 64)
    wanted = (before + added).bfloat16()
    neighbour = (wanted.float() * (1 + 2.0**-8)).bfloat16()
    assert agrees(neighbour, wanted, before.bfloat16())
    assert not agrees((before + 3 * added).bfloat16(), wanted, before.bfloat16())
    assert not agrees(torch.full_like(wanted, torch.nan), wanted, before.bfloat16())
    close = before + 1.01 * added
    assert not agrees(close, before + added, before)
    assert agrees(close, before + added, before, coarse=True)
    assert not agrees(before + 1.1 * added, before + added, before, coarse=True)


def sees_and_reads(window: int | None = None) -> Any:
    """Of which the text model, and what its configuration says, lie inside."""
    torch.manual_seed(1)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = MistralConfig(**SMALL | {"max_position_embeddings": 128}, sliding_window=window)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=96))


def test_windows_of_a_text_model_within_another_are_refused() -> None:
    assert torch.equal(fused(loud(sees_and_reads())), library(loud(sees_and_reads())))
    with pytest.raises(KnobError, match="window only"):
        fused(sees_and_reads(window=45))  # more than the tokens of the trial


def test_positions_of_a_text_model_within_another_count() -> None:
    with pytest.raises(DataError, match="120 prompt tokens and 9 new ones are more than the model's 128 positions"):
        continue_greedily(sees_and_reads().eval(), torch.ones(1, 120, dtype=torch.int64), new_tokens=9)


def test_no_token_ends_a_text_unless_asked_for() -> None:
    model = sees_and_reads().eval()
    nn.init.zeros_(model.lm_head.weight)  # all tokens alike: the first is taken
    for way in ("library", "fused"):
        found = continue_greedily(model, IDS, new_tokens=4, way=way).tokens
        assert found[0].tolist() == [*range(5), 0, 0, 0, 0]


def test_blocks_with_heads_of_their_own_are_refused() -> None:
    model = loud(llama())
    attention = model.model.layers[1].self_attn
    attention.k_proj, attention.v_proj = (nn.Linear(48, 48, bias=False) for _ in range(2))
    attention.num_key_value_groups = 1
    assert library(model).shape == (1, 13)
    with pytest.raises(KnobError, match="heads of its blocks differ"):
        fused(model)


def test_autocast_is_left_to_the_library() -> None:
    model = loud(llama())
    with torch.autocast("cpu", torch.bfloat16):
        assert library(model).shape == (1, 13)
        with pytest.raises(KnobError, match="not fused: autocast"):
            fused(model)


def test_a_short_prompt_is_attended_to_without_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ids:
        is_cuda = True
        shape = (1, 99)

    ids: Any = Ids()
    monkeypatch.setattr(blocks, "PLANNED", 100)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with blocks.attention_of(ids):
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
    ids.shape = (1, 100)
    with blocks.attention_of(ids):
        assert torch.backends.cuda.cudnn_sdp_enabled() == before
    with blocks.attention_of(torch.zeros(1, 4, dtype=torch.int64)):
        assert torch.backends.cuda.cudnn_sdp_enabled() == before
