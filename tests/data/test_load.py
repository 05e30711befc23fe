"""Windows, draws and provenance of calibration and evaluation data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.data.tokenizers_for_tests import BEGIN, END, byte_tokenizer
from whit.data.inputs import ModelInputs
from whit.data.load import load_calibration, load_evaluation
from whit.errors import DataError


def text_file(folder: Path, text: str, name: str = "text.txt") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def calibrate(spec: Any, tokenizer: Any = None, **changes: Any) -> ModelInputs:
    options: dict[str, Any] = {
        "samples": 4, "sequence_length": 8, "seed": 0, "vocabulary_size": 258, "max_positions": 64
    }  # fmt: skip
    return load_calibration(spec, tokenizer, **(options | changes))


def evaluate(spec: Any, tokenizer: Any = None, **changes: Any) -> ModelInputs:
    options: dict[str, Any] = {"windows": 0, "window": 8, "vocabulary_size": 258, "max_positions": 64}
    return load_evaluation(spec, tokenizer, **(options | changes))


def ids_of(data: ModelInputs) -> list[list[int]]:
    return [batch["input_ids"][0].tolist() for batch in data.batches]


def test_evaluation_windows_are_consecutive_and_the_last_partial_one_is_dropped(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    text = "abcdefghijklmnopqrstuvwxyz"
    data = evaluate(text_file(tmp_path, text), tokenizer)
    assert [tokenizer.decode(window) for window in ids_of(data)] == ["abcdefgh", "ijklmnop", "qrstuvwx"]
    assert data.tokens == 24 and not data.has_labels
    assert data.provenance["protocol"]["window"] == data.provenance["protocol"]["stride"] == 8
    assert ids_of(evaluate(text_file(tmp_path, text), tokenizer, windows=2)) == ids_of(data)[:2]


def test_short_evaluation_text_is_used_whole_and_says_so(tmp_path: Path) -> None:
    data = evaluate(text_file(tmp_path, "abcde"), byte_tokenizer())
    assert [len(window) for window in ids_of(data)] == [5]
    assert data.provenance["protocol"]["window"] == 5
    assert "used whole" in data.provenance["notes"][0]


@pytest.mark.parametrize(
    ("begin", "end", "rule", "first", "stride"),
    [(False, False, "none", None, 8), (True, False, "once", BEGIN, 8), (True, True, "window", BEGIN, 6)],
)
def test_special_tokens_follow_the_tokenizer(
    tmp_path: Path, begin: bool, end: bool, rule: str, first: int | None, stride: int
) -> None:
    data = evaluate(text_file(tmp_path, "x" * 40), byte_tokenizer(begin=begin, end=end))
    windows = ids_of(data)
    assert data.provenance["protocol"]["bos"] == rule
    assert data.provenance["protocol"]["stride"] == stride
    assert {len(window) for window in windows} == {8}
    assert (windows[0][0] == BEGIN) == begin
    assert (windows[1][0] == BEGIN) == (rule == "window")
    assert all((window[-1] == END) == end for window in windows)


def test_calibration_draws_a_seeded_permutation_of_distinct_windows(tmp_path: Path) -> None:
    path = text_file(tmp_path, "".join(chr(97 + index // 8) for index in range(26 * 8)))
    tokenizer = byte_tokenizer()
    first, again, other = (ids_of(calibrate(path, tokenizer, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other
    letters = [tokenizer.decode(window) for window in first]
    assert len(set(letters)) == 4 and all(word == word[0] * 8 for word in letters)
    # Asking for more keeps what a smaller run drew.
    assert ids_of(calibrate(path, tokenizer, seed=1, samples=9))[:4] == first


def test_calibration_concatenates_documents_each_with_the_tokenizers_begin_token(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": word}) + "\n" for word in ("ab", "cd", "ef", "gh"))
    path = text_file(tmp_path, lines, "text.jsonl")
    data = calibrate(path, byte_tokenizer(begin=True), samples=9, sequence_length=5)
    assert len(data.batches) == 4 and data.provenance["sequences"] == 4
    assert all(window[0] == BEGIN and window.count(BEGIN) == 1 for window in ids_of(data))
    assert "9 were asked for" in data.provenance["notes"][0]


def test_default_lengths_are_the_usual_ones_within_the_models_maximum() -> None:
    tokenizer = byte_tokenizer()
    assert calibrate("mix", tokenizer, sequence_length=0, max_positions=None).provenance["sequence_length"] == 512
    assert calibrate("mix", tokenizer, sequence_length=0, max_positions=100).provenance["sequence_length"] == 100
    assert evaluate(None, tokenizer, window=0, windows=1, max_positions=8192).tokens == 2048
    assert evaluate(None, tokenizer, window=0, windows=1, max_positions=256).tokens == 256


def test_provenance_is_json_and_holds_no_folder(tmp_path: Path) -> None:
    path = text_file(tmp_path, "word " * 40, "my text.md")
    provenance = calibrate(path, byte_tokenizer()).provenance
    stored = json.dumps(provenance)
    assert provenance["path"] == "my text.md" and str(tmp_path) not in stored
    assert len(provenance["sha256"]) == 64 and provenance["seed"] == 0
    assert provenance["characters"] == 200 and provenance["characters_per_token"] == 1.0


def test_safetensors_of_any_modality(tmp_path: Path) -> None:
    path = tmp_path / "inputs.safetensors"
    labels = torch.arange(12).reshape(6, 2)
    save_file({"input_features": torch.randn(6, 3, 5), "decoder_input_ids": labels.clone(), "labels": labels}, path)
    data = evaluate(path, None, windows=2)
    assert [batch["labels"].tolist() for batch in data.batches] == [[[0, 1]], [[2, 3]]]
    assert data.batches[0]["input_features"].shape == (1, 3, 5)
    assert data.has_labels and data.tokens == 4
    drawn = calibrate(path, None, samples=6, seed=3)
    order = [int(batch["labels"][0, 0]) // 2 for batch in drawn.batches]
    assert sorted(order) == list(range(6)) and order != list(range(6))


def test_safetensors_of_ids_need_no_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "ids.safetensors"
    save_file({"input_ids": torch.arange(40).reshape(5, 8)}, path)
    data = calibrate(path, None, samples=50)
    assert len(data.batches) == 5 and "50 were asked for" in data.provenance["notes"][0]
    assert data.provenance["sequence_length"] == 8


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        ("short", {}, "has 5 tokens, one sequence needs 8: give more text or lower --sequence-length"),
        ("x" * 100, {"sequence_length": 65}, "--sequence-length 65 is more than the model's 64 positions"),
        ("xyz" * 40, {"vocabulary_size": 50}, "vocabulary has 50 entries"),
    ],
)
def test_calibration_text_that_does_not_fit(tmp_path: Path, text: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        calibrate(text_file(tmp_path, text), byte_tokenizer(), **changes)
    assert "\n" not in str(caught.value)


def test_evaluation_text_that_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 tokens, a perplexity needs at least 2"):
        evaluate(text_file(tmp_path, "x"), byte_tokenizer())
    with pytest.raises(DataError, match="--window 65 is more than the model's 64 positions"):
        evaluate(text_file(tmp_path, "x" * 99), byte_tokenizer(), window=65)
    with pytest.raises(DataError, match="no room for text"):
        evaluate(text_file(tmp_path, "x" * 99), byte_tokenizer(begin=True, end=True), window=2)


def test_text_without_tokenizer_names_the_remedy() -> None:
    for load in (calibrate, evaluate):
        with pytest.raises(DataError, match=r"no tokenizer.*\.safetensors file of input_ids"):
            load(None, None)


def test_token_ids_of_a_file_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "ids.safetensors"
    save_file({"input_ids": torch.full((2, 8), 258)}, path)
    with pytest.raises(DataError, match="token id 258, but the model's vocabulary has 258 entries"):
        calibrate(path, None)
    with pytest.raises(DataError, match="sequences of 8 tokens, the model takes 4"):
        calibrate(path, None, vocabulary_size=None, max_positions=4)
    save_file({"input_ids": torch.randn(2, 8)}, path)
    with pytest.raises(DataError, match="must be whole numbers"):
        evaluate(path, None)
