"""From text to token ids: what a tokenizer adds by itself, its identity, and a check against the model's vocabulary."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from whit.errors import DataError


@dataclass(frozen=True)
class SpecialTokens:
    """Ids a tokenizer puts before and after every text (BOS; or CLS and SEP)."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    @property
    def rule(self) -> str:
        """For the protocol id: "none", "once" (at the start of the text) or "window" (around every window)."""
        return "window" if self.after else "once" if self.before else "none"

    def wrap(self, window: Tensor) -> Tensor:
        """`before + window + after` for a 1-D tensor of ids."""
        return torch.cat([window.new_tensor(self.before), window, window.new_tensor(self.after)])


def special_tokens(tokenizer: Any) -> SpecialTokens:
    """What the tokenizer adds, found by encoding a word with and without."""
    bare = _encode(tokenizer, ["word"], special=False)[0]
    full = _encode(tokenizer, ["word"], special=True)[0]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return SpecialTokens(tuple(full[:start]), tuple(full[start + len(bare) :]))
    return SpecialTokens((), ())


def encode(tokenizer: Any, documents: list[str], *, special: bool) -> list[list[int]]:
    """Token ids of every document, with or without the tokenizer's own special tokens.

    Raises:
        DataError: there is no tokenizer.
    """
    if tokenizer is None:
        raise DataError(
            "the model has no tokenizer, so text cannot be used: give a .safetensors file of input_ids "
            "(shape samples x length)"
        )
    return _encode(tokenizer, documents, special=special)


def _encode(tokenizer: Any, documents: list[str], *, special: bool) -> list[list[int]]:
    # verbose=False: the warning about texts longer than the model is for people who feed them whole.
    ids: list[list[int]] = tokenizer(documents, add_special_tokens=special, verbose=False)["input_ids"]
    return ids


def tokenizer_identity(tokenizer: Any) -> str:
    """First 8 hex digits of the SHA-256 of the vocabulary (token -> id, sorted by id)."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:8]


def flatten(ids: list[list[int]]) -> Tensor:
    """All ids one after the other, int64 (tokens,)."""
    return torch.from_numpy(np.fromiter((token for part in ids for token in part), dtype=np.int64))


def check_vocabulary(ids: Tensor, vocabulary_size: int | None, name: str) -> None:
    """Refuse ids that the embedding does not have.

    Raises:
        DataError: an id is negative or not below `vocabulary_size`.
    """
    if vocabulary_size is None or ids.numel() == 0:
        return
    smallest, largest = int(ids.min()), int(ids.max())
    if smallest < 0 or largest >= vocabulary_size:
        bad = smallest if smallest < 0 else largest
        raise DataError(
            f"{name!r} gives token id {bad}, but the model's vocabulary has {vocabulary_size} entries: "
            "use the tokenizer (or the input_ids) made for this model"
        )
