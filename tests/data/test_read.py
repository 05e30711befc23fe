"""Every way in which a data file can be bad gives one line that quotes it and says what to do."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from whit.data.corpora import bundled_corpora, corpus_with_hash, rows_of
from whit.data.read import MAXIMUM_BYTES, TensorSource, TextSource, read_source
from whit.errors import DataError


def refused(spec: str | Path) -> str:
    with pytest.raises(DataError) as caught:
        read_source(spec, "mix")
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_unknown_name_suggests_a_bundled_text() -> None:
    message = refused("wikitxt2")
    assert "'wikitxt2'; did you mean 'wikitext2'?" in message and "bundled: mix, wikitext2" in message


def test_missing_file_suggests_a_file_beside_it(tmp_path: Path) -> None:
    (tmp_path / "calibration.txt").write_text("x")
    assert f"did you mean {str(tmp_path / 'calibration.txt')!r}?" in refused(tmp_path / "calibraton.txt")


def test_folder(tmp_path: Path) -> None:
    assert "is not a file" in refused(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n\t\n", "is empty"),
        ("a.txt", b"abc\0def", "is binary (zero byte at offset 3)"),
        ("a.txt", b"caf\xe9 au lait", "is not UTF-8 (byte 0xe9 at offset 3)"),
        ("a.jsonl", b'{"text": "a"}\n\n{"body": "b"}\n', "line 3 of "),
        ("a.jsonl", b'{"text": "a"}\n{"text": 5}\n', "line 2 of "),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n', "is not JSON"),
        ("a.jsonl", b'{"text": "a \\ud800 b"}\n', "half of a surrogate pair"),
        ("a.jsonl", b"[" * 100_000, "nested too deeply"),
        ("a.jsonl", b'["text"]\n', 'has no "text" field'),
        ("a.jsonl", b'{"text": ""}\n', "is empty"),
        ("a.safetensors", b"not a safetensors file", "is not a readable safetensors file"),
    ],
)
def test_bad_file(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    said = refused(path)
    assert message in said and str(path) in said


def test_safetensors_with_disagreeing_samples(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"input_ids": torch.zeros(3, 4, dtype=torch.int64), "attention_mask": torch.ones(2, 4)}, path)
    assert "(attention_mask 2, input_ids 3)" in refused(path)


def test_safetensors_with_an_unknown_input(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"inputs_id": torch.zeros(3, 4)}, path)
    assert "'inputs_id', which is no model input; did you mean 'input_ids'?" in refused(path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"labels": torch.zeros(3)}, "is empty"),
        ({"input_ids": torch.zeros(0, 4)}, "is empty"),
        ({"timestep": torch.tensor(1.0)}, "is a single number"),
        ({"pixel_values": torch.tensor([1.0, float("nan")])}, "NaN or Inf"),
    ],
)
def test_safetensors_without_usable_inputs(tmp_path: Path, tensors: dict[str, torch.Tensor], message: str) -> None:
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    assert message in refused(path)


def test_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfabc")
    source = read_source(path, "mix")
    assert isinstance(source, TextSource) and source.documents == ["abc"]


def test_huge_file_is_read_in_part_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAXIMUM_BYTES >= 2**20
    monkeypatch.setattr("whit.data.read.MAXIMUM_BYTES", 10)
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\nthree\nfour\n")
    source = read_source(path, "mix")
    assert isinstance(source, TextSource) and source.documents == ["one\ntwo\n"]
    assert source.notes == ["only the first 8 of 19 bytes of 'a.txt' were read"]


def test_bundled_texts_are_intact_and_licensed() -> None:
    for name, corpus in bundled_corpora().items():
        documents = corpus.documents()
        assert sum(map(len, documents)) > 1_000_000 and corpus.licence
        source = read_source(name, "mix")
        assert isinstance(source, TextSource) and source.origin["sha256"] == corpus.sha256
        assert corpus_with_hash(corpus.sha256) is corpus


def test_wikitext_has_the_rows_of_the_published_data_set() -> None:
    rows = bundled_corpora()["wikitext2"].documents()
    assert len(rows) == 4358 and rows.count("") == 1467
    assert rows[:3] == ["", " = Robert Boulter = \n", ""]
    assert rows_of(" \n a \n") == ["", " a \n"]


def test_users_own_copy_of_a_bundled_text_gets_its_rule(tmp_path: Path) -> None:
    corpus = bundled_corpora()["wikitext2"]
    path = tmp_path / "wiki.test.raw"
    path.write_bytes(corpus.content())
    source = read_source(path, "mix")
    assert isinstance(source, TextSource) and source.documents == corpus.documents()
    assert source.origin["name"] == "wikitext2" and source.origin["path"] == "wiki.test.raw"


def test_every_prefix_of_the_mix_is_a_mix() -> None:
    start = "".join(bundled_corpora()["mix"].documents())[:60_000]
    assert "Question: " in start and "Congress" in start and "whale" in start


def test_tensors_come_back_as_stored(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {"input_ids": torch.arange(6).reshape(2, 3), "attention_mask": torch.ones(2, 3)}
    save_file(tensors, path)
    source = read_source(path, "mix")
    assert isinstance(source, TensorSource) and set(source.tensors) == set(tensors)
    assert all(torch.equal(source.tensors[name], item) for name, item in tensors.items())


def test_gzip_is_recognised_as_binary(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(gzip.compress(b"text", mtime=0))
    assert "is binary" in refused(path)
