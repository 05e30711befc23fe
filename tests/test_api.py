"""The public functions on a small real model: damaged directories, and comparisons that would mean nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import whit
from whit.errors import DataError, ModelError

STORIES = Path(__file__).parent / "assets" / "stories260k"
QUICK = whit.RunOptions(evaluation_windows=1, window=32)


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("api") / "out"
    whit.compress(STORIES, "rtn", output, options=whit.RunOptions(samples=1, sequence_length=16, evaluate=False))
    return output


@pytest.fixture
def copy(compressed: Path, tmp_path: Path) -> Path:
    """A compressed directory that the test may damage."""
    return Path(shutil.copytree(compressed, tmp_path / "copy"))


def test_a_missing_tensor_is_refused_and_not_filled_with_what_lies_in_memory(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.scales"]
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 tensors .*'model.layers.1.mlp.up_proj.scales'"):
        whit.load(copy)


def test_a_damaged_tokenizer_is_not_taken_for_an_absent_one(copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer of .* cannot be read"):
        whit.generate(copy, "Once", new_tokens=1, device="cpu")
    for path in copy.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(DataError, match="holds no tokenizer"):
        whit.generate(copy, "Once", new_tokens=1, device="cpu")


def test_models_of_different_vocabularies_are_not_compared(compressed: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(STORIES, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    name = "model.embed_tokens.weight"
    tensors[name] = torch.cat([tensors[name], tensors[name][:8]])
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": 520}))
    with pytest.raises(ModelError, match=r"one vocabulary"):
        whit.evaluate(compressed, against=other, options=QUICK)


def test_a_record_that_another_tool_left_beside_a_model_says_nothing(tmp_path: Path) -> None:
    model = Path(shutil.copytree(STORIES, tmp_path / "model"))
    (model / "result.json").write_text('{"accuracy": 1}')
    assert whit.evaluate(model, options=QUICK).metric("perplexity") is not None


def test_without_its_record_a_leak_cannot_be_ruled_out(copy: Path) -> None:
    (copy / "result.json").write_text("{")
    with pytest.raises(DataError, match="calibration text is unknown"):
        whit.evaluate(copy, options=QUICK)
    allowed = whit.RunOptions(evaluation_windows=1, window=32, allow_leak=True)
    assert whit.evaluate(copy, options=allowed).metric("perplexity") is not None


def test_windows_of_two_tokens_are_enough_for_a_perplexity(compressed: Path) -> None:
    record = whit.evaluate(compressed, options=whit.RunOptions(evaluation_windows=2, window=2))
    assert [metric.name for metric in record.metrics] == ["perplexity"]
    with pytest.raises(DataError, match="--window 1"):
        whit.evaluate(compressed, options=whit.RunOptions(evaluation_windows=2, window=1))


@pytest.mark.parametrize(("seed", "words"), [(-1, "at least 0"), (2**63, "less than")])
def test_seeds_that_no_generator_takes_are_refused(seed: int, words: str) -> None:
    with pytest.raises(whit.WhitError, match=words):
        whit.RunOptions(seed=seed)


def test_the_meta_device_cannot_compute(compressed: Path) -> None:
    with pytest.raises(whit.WhitError, match="--device 'meta'"):
        whit.generate(compressed, "Once", device="meta")
