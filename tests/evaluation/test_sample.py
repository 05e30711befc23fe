"""Samples: greedy, repeatable, and never a reason to lose an evaluation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests import tiny
from tests.data.tokenizers_for_tests import byte_tokenizer
from whit.data.inputs import ModelInputs
from whit.errors import ModelError
from whit.evaluation.sample import sample_record, sample_text, transcribe


class Letters:
    """A tokenizer for ids below the tiny models' vocabulary: id n is the character n + 32."""

    def __call__(self, text: str, return_tensors: str) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[ord(letter) - 32 for letter in text]])}

    def decode(self, ids: torch.Tensor, skip_special_tokens: bool) -> str:
        return "".join(chr(int(item) + 32) for item in ids)


def data(family: str) -> ModelInputs:
    inputs = tiny.inputs(family, sequences=1)
    return ModelInputs([inputs], 24, {"name": "speech.safetensors"}, "labels" in inputs)


def model(family: str) -> Any:
    torch.manual_seed(0)
    return tiny.FAMILIES[family]().eval()


def test_continuation_is_greedy_whatever_the_checkpoint_prefers() -> None:
    llama = model("llama")
    llama.generation_config.do_sample = True
    llama.generation_config.temperature = 5.0
    llama.generation_config.eos_token_id = None
    first, second = (sample_text(llama, Letters(), "abc", 6) for _ in range(2))
    ids = Letters()("abc", "pt")["input_ids"]
    with torch.no_grad():
        for _ in range(6):
            ids = torch.cat([ids, llama(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert first == second == Letters().decode(ids[0, 3:], True)


class Words(Letters):
    """A tokenizer that drops the space before the first token it decodes, as many do."""

    def decode(self, ids: torch.Tensor, skip_special_tokens: bool) -> str:
        return "".join(f" {letter}" for letter in super().decode(ids, skip_special_tokens)).removeprefix(" ")


def test_the_space_after_the_prompt_is_kept() -> None:
    text, letters = sample_text(model("llama"), Words(), "abc", 4), sample_text(model("llama"), Letters(), "abc", 4)
    assert text == "".join(f" {letter}" for letter in letters)


def test_continuation_stops_at_the_end_token() -> None:
    llama = model("llama")
    full = sample_text(llama, Letters(), "abc", 6)
    llama.generation_config.eos_token_id = [ord(full[2]) - 32]
    assert sample_text(llama, Letters(), "abc", 6) == full[: full.index(full[2]) + 1]


def test_record_of_a_causal_model() -> None:
    record = sample_record(model("gpt2"), Letters(), "abc", data("gpt2"), new_tokens=4)
    assert record["prompt"] == "abc" and 0 < len(record["text"]) <= 4


def test_transcription_starts_where_the_labels_start_to_count() -> None:
    whisper = model("whisper")
    whisper.generation_config.eos_token_id = whisper.config.eos_token_id = None
    batch = tiny.inputs("whisper", sequences=1)
    batch["labels"][:, :2] = -100
    ids = batch["decoder_input_ids"][:, :3]
    with torch.no_grad():
        for _ in range(5):
            logits = whisper(input_features=batch["input_features"], decoder_input_ids=ids).logits
            ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert transcribe(whisper, Letters(), batch, 5) == Letters().decode(ids[0, 3:], True).strip()


def test_transcription_without_decoder_inputs_uses_the_models_start() -> None:
    batch = tiny.inputs("whisper", sequences=1)
    features = {"input_features": batch["input_features"]}
    start = {"decoder_input_ids": torch.tensor([[1]])}
    whisper = model("whisper")
    assert transcribe(whisper, Letters(), features, 4) == transcribe(whisper, Letters(), features | start, 4)


def test_record_of_an_encoder_decoder_holds_the_reference() -> None:
    record = sample_record(model("whisper"), Letters(), "abc", data("whisper"), new_tokens=4)
    assert record["prompt"] == "first sample of speech.safetensors"
    assert record["reference"] == Letters().decode(data("whisper").batches[0]["labels"][0], True).strip()
    assert "note" not in record


@pytest.mark.parametrize("family", ["bert", "albert"])
def test_encoders_have_no_sample(family: str) -> None:
    assert sample_record(model(family), Letters(), "abc", data(family)) == {}
    with pytest.raises(ModelError, match="cannot generate text"):
        sample_text(model(family), Letters(), "abc", 3)


def test_failure_is_a_note() -> None:
    record = sample_record(model("llama"), byte_tokenizer(), "\u00ff" * 3, data("llama"))
    assert record["text"] == "" and record["note"].startswith("no sample: ")
    assert sample_record(model("llama"), None, "abc", data("llama")) == {}
