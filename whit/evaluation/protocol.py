"""The protocol of a measurement as one line of text: equal ids mean comparable numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Raised when a change of the code changes numbers under the same settings.
VERSION = 1
#: Fields in this order, whatever else follows sorted by name.
ORDER = ("tokenizer", "corpus", "window", "stride", "bos", "samples", "tokens", "dtype")


def protocol_id(name: str, fields: Mapping[str, Any]) -> str:
    """`name/version;field=value;...`, for example

    `perplexity/1;tokenizer=736ce314;corpus=wikitext2-test@173c87a5;window=2048;stride=2048;bos=none;tokens=16376;`
    `dtype=float32`.
    """
    ordered = [key for key in ORDER if key in fields] + sorted(set(fields) - set(ORDER))
    return ";".join([f"{name}/{VERSION}", *(f"{key}={fields[key]}" for key in ordered)])
