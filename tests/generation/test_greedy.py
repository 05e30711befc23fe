"""Every way of greedy decoding gives the tokens of transformers' own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests import tiny
from whit.errors import DataError, KnobError
from whit.formats.base import Packed
from whit.formats.level_table import LevelTable
from whit.generation import continue_greedily
from whit.generation.blocks import gated_decoder
from whit.kernels import linear
from whit.kernels.linear import Preparation
from whit.models.packed import PackedLinear, replace_module

NEW = 20
NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]


def model_on(device: str, make: Callable[[], PreTrainedModel] = tiny.llama) -> PreTrainedModel:
    torch.manual_seed(3)
    return make().eval().to(device)


def prompts(device: str) -> tuple[Tensor, Tensor]:
    """Two prompts, the second three tokens shorter."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, tiny.VOCABULARY, (2, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return ids.to(device), mask.to(device)


def pack(model: PreTrainedModel, block_size: int = 16) -> None:
    """Every linear layer of the blocks as a table of four levels per block."""
    layout = LevelTable(bits=2, block_size=block_size)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            rows, columns = module.weight.shape
            packed = PackedLinear(layout, rows, columns, None)
            codes = torch.randint(0, 4, (rows, columns))
            packed.set_packed(layout.pack(codes, torch.randn(rows, layout.blocks(columns), 4) / 8))
            replace_module(model, name, packed.to(module.weight.device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", ["fused", "static"])
@pytest.mark.parametrize("join", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_same_tokens_as_transformers(device: str, way: str, packed: bool, padded: bool, join: bool) -> None:
    model = model_on(device)
    if packed:
        pack(model)
    ids, mask = prompts(device)
    given = mask if padded else None
    wanted = continue_greedily(model, ids, given, new_tokens=NEW, way="library")
    found = continue_greedily(model, ids, given, new_tokens=NEW, way=way, join=join)
    assert torch.equal(found.tokens, wanted.tokens)
    assert (found.way, found.graph, found.reasons) == (way, device == "cuda", ())
    assert len(wanted.tokens[0, 7:].unique()) > 2  # a model that repeats one token would prove little


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("make", [tiny.gpt2, tiny.opt, tiny.neox, tiny.gemma3])
def test_other_models_are_left_to_the_library(device: str, make: Callable[[], PreTrainedModel]) -> None:
    model = model_on(device, make)
    ids, _ = prompts(device)
    wanted = continue_greedily(model, ids, new_tokens=NEW, way="library")
    found = continue_greedily(model, ids, new_tokens=NEW)
    assert torch.equal(found.tokens, wanted.tokens)
    assert found.way == "library"
    assert device == "cpu" or found.reasons[0].startswith("not fused: ")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", ["fused", "static"])
def test_end_of_sequence(device: str, way: str) -> None:
    model = model_on(device)
    ids, mask = prompts(device)
    free = continue_greedily(model, ids, mask, new_tokens=NEW, way="library").tokens
    for stops in ([int(free[0, 9])], [int(free[0, 7]), int(free[1, 11])], [int(free[0, 8]), int(free[1, 8])]):
        wanted = continue_greedily(
            model, ids, mask, new_tokens=NEW, way="library", stop_tokens=stops, pad_token=1
        ).tokens
        found = continue_greedily(model, ids, mask, new_tokens=NEW, way=way, stop_tokens=stops, pad_token=1).tokens
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("way", ["fused", "static", "library"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_tokens(way: str, count: int) -> None:
    model = model_on("cpu")
    ids, _ = prompts("cpu")
    whole = continue_greedily(model, ids, new_tokens=NEW, way="library").tokens
    assert torch.equal(continue_greedily(model, ids, new_tokens=count, way=way).tokens, whole[:, : 7 + count])


def test_a_cpu_leaves_few_tokens_to_the_library() -> None:
    model = model_on("cpu")
    found = continue_greedily(model, prompts("cpu")[0][:1], new_tokens=3)
    assert (found.way, found.graph, found.reasons) == ("library", False, ())
    assert found.explain() == "library"


def test_too_long() -> None:
    model = model_on("cpu")  # 64 positions
    with pytest.raises(DataError, match="70 tokens, but the model has 64 positions"):
        continue_greedily(model, torch.zeros(1, 70, dtype=torch.int64), new_tokens=1)
    with pytest.raises(DataError, match="at most 4 new tokens"):
        continue_greedily(model, torch.zeros(1, 60, dtype=torch.int64), new_tokens=5)
    with pytest.raises(DataError, match="no token"):
        continue_greedily(model, torch.zeros(1, 0, dtype=torch.int64), new_tokens=5)
    assert continue_greedily(model, torch.zeros(1, 60, dtype=torch.int64), new_tokens=4).tokens.shape == (1, 64)


def test_impossible_ways_say_why() -> None:
    ids, _ = prompts("cpu")
    with pytest.raises(KnobError, match="not static: Gemma3ForCausalLM keeps another kind of cache"):
        continue_greedily(model_on("cpu", tiny.gemma3), ids, new_tokens=2, way="static")
    with pytest.raises(KnobError, match="not fused: its decoder is made of"):
        continue_greedily(model_on("cpu", tiny.gpt2), ids, new_tokens=2, way="fused")
    with pytest.raises(KnobError, match="way must be one of"):
        continue_greedily(model_on("cpu"), ids, new_tokens=2, way="quick")
    with pytest.raises(KnobError, match="at least 1"):
        continue_greedily(model_on("cpu"), ids, new_tokens=0)


def test_padding_after_the_text_is_left_to_the_library() -> None:
    ids, mask = prompts("cpu")
    for way in ("fused", "static"):
        with pytest.raises(KnobError, match="padding stands elsewhere"):
            continue_greedily(model_on("cpu"), ids, mask.flip(-1), new_tokens=2, way=way)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float32])
@pytest.mark.parametrize("way", ["fused", "static"])
def test_masks_of_any_type_mean_the_same(way: str, dtype: torch.dtype) -> None:
    model = model_on("cpu")
    ids, mask = prompts("cpu")
    wanted = continue_greedily(model, ids, mask, new_tokens=5, way="library").tokens
    assert torch.equal(continue_greedily(model, ids, mask.to(dtype), new_tokens=5, way=way).tokens, wanted)
    with pytest.raises(KnobError, match="padding stands elsewhere"):
        continue_greedily(model, ids, mask.flip(-1).to(dtype), new_tokens=5, way=way)


def test_prompts_of_no_shape_are_refused() -> None:
    model = model_on("cpu")
    ids, mask = prompts("cpu")
    for wrong in (ids[0], ids[None], ids[:0]):
        with pytest.raises(DataError, match=r"\(sequences, tokens\) with at least one sequence, got \("):
            continue_greedily(model, wrong, new_tokens=2)
    for wrong in (mask[:, :5], mask[:1], mask[0]):
        with pytest.raises(DataError, match=r"mask has the shape \(.*\), the prompts have \(2, 7\)"):
            continue_greedily(model, ids, wrong, new_tokens=2)


@pytest.mark.parametrize("packed", [False, True])
def test_a_model_made_in_inference_mode_is_decoded_too(packed: bool) -> None:
    ids, mask = prompts("cpu")
    with torch.inference_mode():
        model = model_on("cpu")
        if packed:
            pack(model)
        wanted = continue_greedily(model, ids, mask, new_tokens=NEW, way="library").tokens
        assert torch.equal(continue_greedily(model, ids, mask, new_tokens=NEW, way="fused", join=True).tokens, wanted)


@pytest.mark.parametrize(
    "setting",
    [
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": [33, 59]},
        {"bad_words_ids": [[33]]},
        {"forced_eos_token_id": 5},
        {"encoder_repetition_penalty": 5.0},
        {"guidance_scale": 2.0},
        {"do_sample": True, "temperature": 9.0},
        {"return_dict_in_generate": True},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_settings_of_a_checkpoint_do_not_change_what_is_most_probable(setting: dict[str, object]) -> None:
    model = model_on("cpu")
    ids, mask = prompts("cpu")
    wanted = continue_greedily(model, ids, mask, new_tokens=NEW, way="fused").tokens
    own = model.generation_config
    own.update(**setting)
    assert torch.equal(continue_greedily(model, ids, mask, new_tokens=NEW, way="library").tokens, wanted)
    assert model.generation_config is own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_form_of_the_weights_is_asked_for_by_the_type_of_the_model(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[torch.dtype] = []

    def supports(packed: Packed, dtype: torch.dtype) -> bool:
        asked.append(dtype)
        return False

    monkeypatch.setitem(linear._PREPARATIONS, "level-table", Preparation("other", supports, list, lambda packed: 1.0))
    model = model_on("cpu").to(dtype)
    pack(model)
    gated_decoder(model)
    assert len(asked) >= 4 and set(asked) == {dtype}
