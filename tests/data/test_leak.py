"""The leak test finds shared text however it is spaced or cut, and leaves honest pairs alone."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from whit.data.corpora import bundled_corpora
from whit.data.leak import SKETCH_SIZE, check_leak, overlap, tensor_sketch, text_sketch
from whit.errors import DataError


def words(count: int, seed: int) -> list[str]:
    generator = random.Random(seed)
    return [f"w{generator.randrange(5000)}" for _ in range(count)]


def provenance(documents: list[str], name: str = "text") -> dict[str, Any]:
    return {"name": name, "sha256": name, "sketch": text_sketch(documents)}


def test_different_texts_do_not_overlap() -> None:
    corpora = bundled_corpora()
    mix, wikitext = (provenance(corpora[name].documents(), name) for name in ("mix", "wikitext2"))
    assert overlap(mix, wikitext) < 0.002
    assert check_leak(mix, wikitext) is False


def test_text_inside_a_larger_one_is_found_in_both_directions() -> None:
    rows = bundled_corpora()["wikitext2"].documents()
    large = provenance([*bundled_corpora()["mix"].documents(), *rows], "large")
    for part in (rows, rows[:400]):
        small = provenance(part, "small")
        assert overlap(large, small) > 0.9 and overlap(small, large) > 0.9


def test_spacing_case_and_punctuation_do_not_hide_a_leak() -> None:
    text = words(3000, seed=0)
    spoken = provenance([" ".join(text)])
    printed = provenance([", ".join(word.upper() for word in text) + "!"], "other")
    assert overlap(spoken, printed) == 1.0


@pytest.mark.parametrize("size", [2_000, 30_000])
def test_overlap_estimates_the_shared_part(size: int) -> None:
    shared, first, second = words(size, 0), words(size, 1), words(3 * size, 2)
    a = provenance([" ".join(shared + first)], "a")
    b = provenance([" ".join(shared + second)], "b")
    assert overlap(a, b) == pytest.approx(0.5, abs=0.08)


def test_sketch_is_small_and_deterministic() -> None:
    text = [" ".join(words(100_000, 3))]
    sketch = text_sketch(text)
    assert sketch == text_sketch(text)
    assert sketch["shingles"] > 90_000 and len(sketch["hashes"]) == SKETCH_SIZE * 8


def test_a_stock_phrase_is_no_leak() -> None:
    phrase = "the president of the united states of america"
    a, b = ([" ".join([*words(60, seed), phrase, *words(60, seed + 9)])] for seed in (5, 6))
    assert overlap(provenance(a, "a"), provenance(b, "b")) == 0.0


def test_equal_content_is_a_leak_without_a_sketch() -> None:
    assert overlap({"sha256": "x"}, {"sha256": "x"}) == 1.0
    assert overlap({"sha256": None}, {"sha256": None}) == 0.0


def test_tiny_texts() -> None:
    assert overlap(provenance(["one two"], "a"), provenance(["One, two."], "b")) == 1.0
    assert overlap(provenance(["one two"], "a"), provenance(["one three"], "b")) == 0.0
    assert overlap(provenance(["..."], "a"), provenance(["one"], "b")) == 0.0


def test_refusal_names_both_texts_and_the_option() -> None:
    a = provenance([" ".join(words(500, 0))], "a.txt")
    b = provenance([" ".join(words(500, 0))], "b.txt")
    with pytest.raises(DataError, match=r"'a.txt'.*'b.txt' share 100%.*--allow-leak"):
        check_leak(a, b)
    assert check_leak(a, b, allow=True) is True


def test_shared_samples_of_features_are_found_and_labels_are_not_compared() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(20, 3, 4, generator=generator)
    same = torch.zeros(20, dtype=torch.int64)
    a = {"sha256": "a", "sketch": tensor_sketch({"pixel_values": features[:12], "labels": same[:12]})}
    b = {"sha256": "b", "sketch": tensor_sketch({"pixel_values": features[8:], "labels": same[8:]})}
    c = {"sha256": "c", "sketch": tensor_sketch({"pixel_values": features[12:], "labels": same[12:]})}
    assert overlap(a, b) == pytest.approx(4 / 12)
    assert overlap(a, c) == 0.0


def test_shared_token_ids_are_found_though_cut_differently() -> None:
    ids = torch.randint(0, 1000, (2000,), generator=torch.Generator().manual_seed(1))
    a = {"sha256": "a", "sketch": tensor_sketch({"input_ids": ids.reshape(20, 100)})}
    b = {"sha256": "b", "sketch": tensor_sketch({"input_ids": ids.reshape(50, 40)})}
    assert overlap(a, b) > 0.9
    assert overlap(a, {"sha256": "c", "sketch": tensor_sketch({"input_ids": ids.flip(0).reshape(20, 100)})}) == 0.0


@pytest.mark.parametrize("masked", [True, False])
def test_padding_is_no_shared_text(masked: bool) -> None:
    def padded(seed: int) -> dict[str, Any]:
        ids = torch.randint(1, 1000, (10, 40), generator=torch.Generator().manual_seed(seed))
        ids[:, 12:] = 0
        mask = {"attention_mask": (ids > 0).long()} if masked else {}
        return {"sha256": str(seed), "sketch": tensor_sketch({"input_ids": ids, **mask})}

    assert overlap(padded(0), padded(1)) == 0.0
    assert overlap(padded(0), padded(0) | {"sha256": "copy"}) == 1.0
