"""A tokenizer as GGUF metadata: copied from the GGUF file a model came from, or derived from its tokenizer.json.

What is derived (keys `tokenizer.ggml.*`, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md):

- byte-level BPE (`model` "gpt2"): tokens, merges, and `pre`, a name for the way text is split, found by comparing the
  splitter with those of known families;
- BPE with byte fallback, converted from SentencePiece (`model` "llama"): tokens, merges, and scores that rank a token
  by the merge that makes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from whit.errors import WhitError
from whit.models import catalog
from whit.models.gguf_architectures import TOKEN_KEYS
from whit.models.gguf_header import read_gguf_header
from whit.report.record import RESULT_FILE, Result

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
#: How the splitter of a tokenizer.json is called in GGUF. A splitter is its pre-tokenizers: type and what decides.
_SPLITTERS: dict[tuple[tuple[str, Any], ...], str] = {
    (("ByteLevel", True),): "gpt-2",
    (("Digits", True), ("ByteLevel", True)): "smollm",
    (("Split", _QWEN2), ("ByteLevel", False)): "qwen2",
    (("Split", _QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)), ("ByteLevel", False)): "llama-bpe",
}


@dataclass(frozen=True)
class TokenizerMetadata:
    """Metadata entries (full key -> value, lists as arrays) and a remark about where they come from."""

    entries: dict[str, Any] = field(default_factory=dict)
    note: str = ""


def tokenizer_metadata(directory: Path, config: Any, rows: int) -> TokenizerMetadata:
    """The tokenizer of a compressed directory.

    Args:
        config: transformers config, for the special tokens.
        rows: of the embedding; the token list is filled up to it.

    Returns:
        no entries, and a note that says why, if there is no tokenizer or GGUF has no name for its kind.
    """
    copied = _from_source(directory)
    if copied:
        return TokenizerMetadata(copied, "tokenizer: copied from the GGUF file that the model came from")
    path = directory / "tokenizer.json"
    if not path.is_file():
        return TokenizerMetadata({}, "no tokenizer in the file: the directory has no tokenizer.json")
    try:
        derived = _derive(json.loads(path.read_text(encoding="utf-8")), _template(directory), config, rows)
    except (ValueError, KeyError, TypeError) as error:
        return TokenizerMetadata({}, f"no tokenizer in the file: {error}; use the one in {str(directory)!r}")
    return TokenizerMetadata(derived, "tokenizer: derived from tokenizer.json")


def _from_source(directory: Path) -> dict[str, Any]:
    """Tokenizer entries of the GGUF file of the catalogue that the model was compressed from, if it is installed."""
    try:
        label = Result.load(directory / RESULT_FILE).model["label"]
        entry = catalog.CATALOG[label]
        if entry.kind != "gguf":
            return {}
        metadata = read_gguf_header(catalog.locate(entry)).metadata
    except (OSError, ValueError, KeyError, TypeError, WhitError):
        return {}
    return {key: value for key, value in metadata.items() if key.startswith("tokenizer.")}


def _derive(fields: Mapping[str, Any], template: str | None, config: Any, rows: int) -> dict[str, Any]:
    model = fields["model"]
    if model.get("type") != "BPE":
        raise ValueError(f"whit writes BPE tokenizers to GGUF, not {model.get('type')}")
    pieces = {index: token for token, index in model["vocab"].items()}
    added = {item["id"]: item for item in fields.get("added_tokens") or ()}
    pieces |= {index: item["content"] for index, item in added.items()}
    if max(pieces, default=-1) >= rows:
        raise ValueError(f"it has {max(pieces) + 1:,} tokens, the embedding {rows:,} rows")
    tokens = [pieces.get(index, f"[PAD{index}]") for index in range(rows)]
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    byte_fallback = bool(model.get("byte_fallback"))
    types = [_type(index, token, pieces, added, model, byte_fallback) for index, token in enumerate(tokens)]
    out: dict[str, Any] = {
        "tokenizer.ggml.model": "llama" if byte_fallback else "gpt2",
        "tokenizer.ggml.pre": "default" if byte_fallback else _splitter(fields.get("pre_tokenizer")),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
    }
    if byte_fallback:
        out["tokenizer.ggml.scores"] = _scores(tokens, merges)
        out["tokenizer.ggml.add_space_prefix"] = _adds_space(fields)
    starts = _added_ids(fields)
    out["tokenizer.ggml.add_bos_token"] = config.bos_token_id is not None and config.bos_token_id in starts
    ids = {key: getattr(config, name, None) for key, name in TOKEN_KEYS.items()}
    ids["unknown"] = model["vocab"].get(model.get("unk_token"))
    for key, value in ids.items():
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(first, int) and 0 <= first < rows:
            out[f"tokenizer.ggml.{key}_token_id"] = first
    return out | ({} if template is None else {"tokenizer.chat_template": template})


def _type(
    index: int, token: str, pieces: Mapping[int, str], added: Mapping[int, Any], model: Any, byte_fallback: bool
) -> int:
    if index not in pieces:
        return UNUSED
    if token == model.get("unk_token") and byte_fallback:
        return UNKNOWN
    if index in added:
        return CONTROL if added[index].get("special") else USER_DEFINED
    return BYTE if byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">") else NORMAL


def _splitter(described: Any) -> str:
    """The GGUF name of a pre-tokenizer.

    Raises:
        ValueError: it is not one of the known ones.
    """
    parts = (described or {}).get("pretokenizers", [described] if described else [])
    kinds = []
    for part in parts:
        pattern = part.get("pattern", {})
        decides = {
            "Digits": part.get("individual_digits"),
            "ByteLevel": part.get("use_regex", True),
            "Split": pattern.get("Regex", pattern.get("String")),
        }
        kinds.append((part.get("type"), decides.get(part.get("type"))))
    if tuple(kinds) not in _SPLITTERS:
        raise ValueError("whit knows no GGUF name for the way its tokenizer.json splits text")
    return _SPLITTERS[tuple(kinds)]


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """Minus the rank of the first merge that makes a token; tokens that no merge makes come after all that one does."""
    rank: dict[str, int] = {}
    for index, pair in enumerate(merges):
        rank.setdefault("".join(pair), index)
    return [-float(rank.get(token, len(merges) + index)) for index, token in enumerate(tokens)]


def _adds_space(fields: Mapping[str, Any]) -> bool:
    text = json.dumps([fields.get("normalizer"), fields.get("pre_tokenizer")])
    return '"Prepend"' in text or '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text


def _added_ids(fields: Mapping[str, Any]) -> set[int]:
    """Ids of the special tokens that the post-processor puts around a text."""
    post = fields.get("post_processor") or {}
    processors = post.get("processors", [post])
    found: set[int] = set()
    for processor in processors:
        used = {item["SpecialToken"]["id"] for item in processor.get("single") or () if "SpecialToken" in item}
        for name in used:
            found |= set((processor.get("special_tokens") or {}).get(name, {}).get("ids", ()))
    return found


def _template(directory: Path) -> str | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    settings = directory / "tokenizer_config.json"
    if not settings.is_file():
        return None
    template = json.loads(settings.read_text(encoding="utf-8")).get("chat_template")
    return template if isinstance(template, str) else None
