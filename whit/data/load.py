"""Calibration and evaluation data: from a name or a file to model inputs with provenance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whit.data.corpora import DEFAULT_CALIBRATION, DEFAULT_EVALUATION
from whit.data.inputs import ModelInputs
from whit.data.leak import tensor_sketch, text_sketch
from whit.data.read import TensorSource, TextSource, read_source
from whit.data.tokens import check_vocabulary, encode, flatten, special_tokens, tokenizer_identity
from whit.errors import DataError

CALIBRATION_LENGTH = 512
EVALUATION_WINDOW = 2048


def load_calibration(
    spec: str | Path | TextSource | TensorSource | None,
    tokenizer: Any,
    *,
    samples: int,
    sequence_length: int,
    seed: int,
    vocabulary_size: int | None,
    max_positions: int | None,
) -> ModelInputs:
    """Calibration sequences: documents are tokenised, concatenated, cut, and `samples` of the cuts drawn.

    Args:
        spec: see `read_source`; None takes the bundled mix. Or what that has read.
        tokenizer: of transformers, or None where the source holds tensors.
        samples: sequences wanted; where there are fewer, all are taken and the provenance says so.
        sequence_length: tokens per sequence; 0 takes the smaller of 512 and the model's maximum.
        seed: of the permutation that draws.
        vocabulary_size, max_positions: limits of the model, None if there are none.

    Raises:
        DataError: the source is missing or bad, too short for one sequence, or does not fit the model.
    """
    source = spec if isinstance(spec, TextSource | TensorSource) else read_source(spec, DEFAULT_CALIBRATION)
    if isinstance(source, TensorSource):
        return _from_tensors(source, samples, seed, vocabulary_size, max_positions)
    name = source.origin["name"]
    length = _length(sequence_length, CALIBRATION_LENGTH, max_positions, "--sequence-length")
    documents = [text + "\n\n" for text in source.documents] if len(source.documents) > 1 else source.documents
    encode(tokenizer, [""], special=False)
    added = special_tokens(tokenizer)
    content = _content(length, added.after, added.before)
    ids = flatten(encode(tokenizer, documents, special=added.rule == "once"))
    check_vocabulary(ids, vocabulary_size, name)
    available = len(ids) // content
    if available == 0:
        raise DataError(
            f"calibration text {name!r} has {len(ids)} tokens, one sequence needs {content}: give more text or lower "
            "--sequence-length"
        )
    chosen = _draw(available, samples, seed)
    windows = [ids[start * content : (start + 1) * content] for start in chosen]
    batches = [{"input_ids": (added.wrap(item) if added.after else item)[None]} for item in windows]
    provenance = _text_provenance(source, batches, length, len(ids)) | {"seed": seed}
    if available < samples:
        provenance["notes"].append(f"{name!r} has {available} sequences of {length} tokens; {samples} were asked for")
    return ModelInputs(batches, _count(batches), provenance, has_labels=False)


def load_evaluation(
    spec: str | Path | TextSource | TensorSource | None,
    tokenizer: Any,
    *,
    windows: int,
    window: int,
    vocabulary_size: int | None,
    max_positions: int | None,
) -> ModelInputs:
    """Evaluation windows: consecutive, not overlapping, in order, a last partial window dropped.

    A text shorter than one window is used whole. A tokenizer that adds only a BOS adds it once, at the start of the
    text; one that also closes a sequence (CLS ... SEP) has every window wrapped.

    Args:
        spec: see `read_source`; None takes the WikiText-2 test split. Or what that has read.
        windows: how many; 0 takes all.
        window: tokens per window; 0 takes the smaller of 2048 and the model's maximum.
        tokenizer, vocabulary_size, max_positions: as in `load_calibration`.

    Raises:
        DataError: the source is missing or bad, has fewer than two tokens, or does not fit the model.
    """
    source = spec if isinstance(spec, TextSource | TensorSource) else read_source(spec, DEFAULT_EVALUATION)
    if isinstance(source, TensorSource):
        return _from_tensors(source, windows, None, vocabulary_size, max_positions)
    name = source.origin["name"]
    length = _length(window, EVALUATION_WINDOW, max_positions, "--window")
    if length < 2:
        raise DataError(f"--window {length} holds no token that follows another: a perplexity needs at least 2")
    encode(tokenizer, [""], special=False)
    added = special_tokens(tokenizer)
    content = _content(length, added.after, added.before)
    ids = flatten(encode(tokenizer, [source.joined()], special=added.rule == "once"))
    check_vocabulary(ids, vocabulary_size, name)
    if len(ids) < 2:
        raise DataError(
            f"evaluation text {name!r} has {len(ids)} tokens, a perplexity needs at least 2: give more text"
        )
    parts = [ids[start : start + content] for start in range(0, len(ids) - content + 1, content)] or [ids]
    parts = parts[:windows] if windows else parts
    batches = [{"input_ids": (added.wrap(item) if added.after else item)[None]} for item in parts]
    provenance = _text_provenance(source, batches, length, len(ids))
    provenance["protocol"] = {
        "tokenizer": tokenizer_identity(tokenizer),
        "corpus": f"{source.origin['title']}@{source.origin['sha256'][:8]}",
        "window": batches[0]["input_ids"].shape[1],
        "stride": len(parts[0]),
        "bos": added.rule,
        "tokens": _count(batches),
    }
    if len(ids) < content:
        provenance["notes"].append(f"{name!r} is shorter than one window of {length} tokens and was used whole")
    return ModelInputs(batches, _count(batches), provenance, has_labels=False)


def _length(asked: int, usual: int, max_positions: int | None, option: str) -> int:
    limit = max_positions or max(asked, usual)
    if asked > limit:
        raise DataError(f"{option} {asked} is more than the model's {limit} positions: lower it")
    return asked or min(usual, limit)


def _content(length: int, *added: tuple[int, ...]) -> int:
    """Tokens of the text in one window: what special tokens around each window leave."""
    after, before = added
    content = length - len(after) - len(before) if after else length
    if content < 1:
        raise DataError(f"a sequence of {length} tokens has no room for text beside the special tokens: lengthen it")
    return content


def _draw(available: int, wanted: int, seed: int) -> list[int]:
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
    return [int(index) for index in order[:wanted]]


def _count(batches: list[dict[str, Tensor]]) -> int:
    """Token positions; for an encoder-decoder those of the decoder; samples where there are no tokens."""
    for name in ("decoder_input_ids", "labels", "input_ids"):
        if name in batches[0] and batches[0][name].ndim > 1:
            return sum(batch[name].numel() for batch in batches)
    return sum(next(iter(batch.values())).shape[0] for batch in batches)


def _text_provenance(source: TextSource, batches: list[dict[str, Tensor]], length: int, tokens: int) -> dict[str, Any]:
    characters = sum(map(len, source.documents))
    return source.origin | {
        "sequences": len(batches),
        "sequence_length": length,
        "tokens": _count(batches),
        "characters": characters,
        "characters_per_token": characters / max(tokens, 1),
        "notes": list(source.notes),
        "sketch": text_sketch(source.documents),
    }


def _from_tensors(
    source: TensorSource, samples: int, seed: int | None, vocabulary_size: int | None, max_positions: int | None
) -> ModelInputs:
    """Rows of the tensors, drawn with a seed or (None) the first ones in order; 0 samples takes all."""
    name, tensors = source.origin["name"], source.tensors
    available = next(iter(tensors.values())).shape[0]
    wanted = samples or available
    for key in ("input_ids", "decoder_input_ids"):
        if key not in tensors:
            continue
        if tensors[key].is_floating_point() or tensors[key].ndim != 2:
            raise DataError(f"{key!r} in {name!r} must be whole numbers of shape samples x length: make it again")
        check_vocabulary(tensors[key], vocabulary_size, name)
        if max_positions is not None and key == "input_ids" and tensors[key].shape[1] > max_positions:
            raise DataError(
                f"{key!r} in {name!r} has sequences of {tensors[key].shape[1]} tokens, the model takes "
                f"{max_positions}: shorten them"
            )
    chosen = list(range(min(wanted, available))) if seed is None else _draw(available, wanted, seed)
    batches = [{key: item[row : row + 1].clone() for key, item in sorted(tensors.items())} for row in chosen]
    count = _count(batches)
    first = next(iter(batches[0].values()))
    provenance: dict[str, Any] = source.origin | {
        "sequences": len(batches),
        "sequence_length": count // len(batches) if first.ndim > 1 else 1,
        "tokens": count,
        "seed": seed,
        "notes": [],
        "sketch": tensor_sketch(tensors),
        "protocol": {
            "tokenizer": "none",
            "corpus": f"{source.origin['title']}@{source.origin['sha256'][:8]}",
            "samples": len(batches),
            "tokens": count,
        },
    }
    if available < wanted:
        provenance["notes"].append(f"{name!r} has {available} samples; {wanted} were asked for")
    return ModelInputs(batches, count, provenance, has_labels="labels" in tensors)
