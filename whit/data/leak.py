"""Was the evaluation text part of the calibration text? A compact sketch of each answers without keeping either.

A text is the set of its shingles: 8 consecutive words, lower case, punctuation dropped (so re-spacing or another
tokenisation of the same sentences still matches). The sketch keeps the `SKETCH_SIZE` smallest of their 48-bit hashes
(bottom-k sketch, Broder 1997). Two sketches are complete below the smaller of their largest kept hashes; there

    overlap = |A and B| / min(|A|, |B|)

estimates which part of the smaller text lies in the other. Token ids are shingled likewise, other inputs (audio,
pixels) are hashed sample by sample. Sketches of different kinds cannot be compared; equal content hashes always can.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from whit.errors import DataError

SHINGLE = 8
SKETCH_SIZE = 2000
THRESHOLD = 0.01
# One stock phrase shared by two texts ("the president of the united states of america") is no leak.
MINIMUM_MATCHES = 3
_HASH_BITS = 48
_WORD = re.compile(r"\w+")


def text_sketch(documents: Iterable[str]) -> dict[str, Any]:
    """Sketch of texts: `{"kind": "words", "shingles": int, "hashes": base64 of little-endian 48-bit numbers}`.

    Text shorter than one shingle counts as a single shingle.
    """
    codes: dict[str, int] = {}
    ids: list[int] = []
    for document in documents:
        ids.extend(codes.setdefault(word, _word_hash(word)) for word in _WORD.findall(document.lower()))
    return _sketch("words", _shingles(np.array(ids, dtype=np.uint64)))


def tensor_sketch(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Sketch of model inputs with a leading sample dimension.

    Samples of floating-point inputs (features, pixels) are hashed whole; without any, `input_ids` (or else the first
    tensor) is shingled row by row. Labels are left out: two honest data sets share labels.
    """
    inputs = {name: item for name, item in sorted(tensors.items()) if name != "labels"}
    floating = [item for item in inputs.values() if item.is_floating_point()]
    if floating:
        rows = [hashlib.blake2b(digest_size=8) for _ in range(floating[0].shape[0])]
        for item in floating:
            for digest, row in zip(rows, item, strict=True):
                digest.update(row.contiguous().view(torch.uint8).numpy().tobytes())
        return _sketch("samples", np.array([int.from_bytes(row.digest(), "little") for row in rows], dtype=np.uint64))
    ids = inputs.get("input_ids", next(iter(inputs.values())))
    mask = inputs.get("attention_mask")
    samples = [_unpadded(row.flatten(), None if mask is None else mask[index]) for index, row in enumerate(ids)]
    return _sketch("ids", np.concatenate([_shingles(row) for row in samples]))


def overlap(calibration: Mapping[str, Any], evaluation: Mapping[str, Any]) -> float:
    """Share (0 to 1) of the smaller text that also lies in the other, from two provenances."""
    if calibration.get("sha256") is not None and calibration.get("sha256") == evaluation.get("sha256"):
        return 1.0
    first, second = calibration.get("sketch"), evaluation.get("sketch")
    if not first or not second or first["kind"] != second["kind"]:
        return 0.0
    a, b = _hashes(first), _hashes(second)
    limit = min(_complete_below(first, a), _complete_below(second, b))
    a, b = a[a <= limit], b[b <= limit]
    matches = len(np.intersect1d(a, b, assume_unique=True))
    smaller = min(len(a), len(b))
    return matches / smaller if matches >= min(MINIMUM_MATCHES, max(smaller, 1)) else 0.0


def check_leak(calibration: Mapping[str, Any], evaluation: Mapping[str, Any], *, allow: bool = False) -> bool:
    """Refuse to evaluate on text that was calibrated on.

    Args:
        calibration, evaluation: provenances.
        allow: go on, but return True so that the result can say so.

    Returns:
        whether there is a leak.

    Raises:
        DataError: more than 1 % of the smaller text is shared, and `allow` is False.
    """
    share = overlap(calibration, evaluation)
    if share <= THRESHOLD:
        return False
    if not allow:
        raise DataError(
            f"calibration text {calibration['name']!r} and evaluation text {evaluation['name']!r} share {share:.0%} of "
            "their content: choose another --calibration or --evaluation, or pass --allow-leak to mark the result"
        )
    return True


def _unpadded(row: Tensor, mask: Tensor | None) -> NDArray[np.uint64]:
    """Ids without padding, which all samples share: what the mask hides, else repetitions of the last id."""
    if mask is not None and mask.shape == row.shape:
        row = row[mask > 0]
    different = (row != row[-1]).nonzero() if len(row) else row
    end = int(different[-1]) + 2 if len(different) else min(len(row), 1)
    return row[:end].to(torch.int64).numpy().astype(np.uint64)


def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def _shingles(ids: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hashes of every run of SHINGLE ids: a polynomial over 64-bit wrap-around numbers, then the splitmix64 mix."""
    width = min(SHINGLE, len(ids))
    if width == 0:
        return ids
    total = np.zeros(len(ids) - width + 1, dtype=np.uint64)
    for offset in range(width):
        total = total * np.uint64(0x9E3779B97F4A7C15) + ids[offset : offset + len(total)] + np.uint64(1)
    total ^= total >> np.uint64(30)
    total *= np.uint64(0xBF58476D1CE4E5B9)
    total ^= total >> np.uint64(27)
    total *= np.uint64(0x94D049BB133111EB)
    return total ^ (total >> np.uint64(31))


def _sketch(kind: str, hashes: NDArray[np.uint64]) -> dict[str, Any]:
    distinct = np.unique(hashes >> np.uint64(64 - _HASH_BITS))
    kept = distinct[:SKETCH_SIZE]
    packed = kept.astype("<u8").view(np.uint8).reshape(-1, 8)[:, : _HASH_BITS // 8].tobytes()
    return {"kind": kind, "shingles": len(distinct), "hashes": base64.b64encode(packed).decode("ascii")}


def _hashes(sketch: Mapping[str, Any]) -> NDArray[np.uint64]:
    packed = np.frombuffer(base64.b64decode(sketch["hashes"]), dtype=np.uint8).reshape(-1, _HASH_BITS // 8)
    wide = np.zeros((len(packed), 8), dtype=np.uint8)
    wide[:, : _HASH_BITS // 8] = packed
    return wide.view("<u8").reshape(-1).astype(np.uint64)


def _complete_below(sketch: Mapping[str, Any], hashes: NDArray[np.uint64]) -> int:
    """Every shingle of the text with a hash up to this number is in the sketch."""
    return int(hashes[-1]) if sketch["shingles"] > len(hashes) else 1 << _HASH_BITS
