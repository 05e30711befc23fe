"""What readers make of an exported GGUF file: the config as whit reads it back, and as transformers does."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging

from whit.errors import ModelError
from whit.exporters.base import CannotHoldError
from whit.exporters.source import CompressedModel
from whit.models.gguf import open_gguf
from whit.models.gguf_architectures import TOKEN_KEYS
from whit.models.loading import load_tokenizer

#: Config fields that do not change what the model computes, or that the file says elsewhere.
_SILENT = frozenset({
    "_model_name_or_path", "_name_or_path", "architectures", "attention_dropout", "dtype", "id2label",
    "initializer_range", "label2id", "pretraining_tp", "torch_dtype", "transformers_version", "unk_token_id",
    "use_cache", *TOKEN_KEYS.values(),
})  # fmt: skip
#: Texts on which a tokenizer read from the file is compared with the directory's.
PROBES = (
    "The capital of France is Paris.",
    "  two spaces, 12345 and a tab\tand\nnew lines\n\n",
    "na\u00efve \u4f60\u597d \U0001f600 x=3.14*(y**2); it's",
)


def head_dim(config: Any) -> int:
    """Width of an attention head, stated or implied."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def check_config(path: Path, config: Any) -> None:
    """Read the config of a file back, as whit reads it, and compare every field that matters.

    Raises:
        CannotHoldError: the file cannot say a field.
    """
    for key, wanted, found in _differing(config, open_gguf(path).config):
        raise CannotHoldError(
            "", f"its config has {key} = {wanted!r}, which GGUF cannot say (it would be read as {found!r})"
        )


def differences_in_transformers(path: Path, model: CompressedModel) -> list[str]:
    """Remarks where `from_pretrained(..., gguf_file=...)` gives another config or tokenizer than the directory has."""
    notes = []
    where = {"gguf_file": path.name, "local_files_only": True, "trust_remote_code": False}
    with _quiet():
        try:
            config = AutoConfig.from_pretrained(path.parent, **where)
            for key, wanted, found in _differing(model.config, config):
                notes.append(f"transformers reads {key} as {found!r}, not {wanted!r}: load it with whit or llama.cpp")
        except Exception as error:  # an older transformers, which does not read this architecture from GGUF
            return [f"this transformers cannot read the file ({_first_line(error)})"]
        try:
            original = load_tokenizer(model.directory)
        except ModelError:
            original = None
        if original is None:
            return notes
        try:
            read = AutoTokenizer.from_pretrained(path.parent, **where)
            same = all(read(text)["input_ids"] == original(text)["input_ids"] for text in PROBES)
        except Exception as error:
            return [
                *notes,
                f"transformers reads no tokenizer from the file ({_first_line(error)}): use the directory's",
            ]
    if not same:
        notes.append("transformers splits some texts otherwise with the tokenizer of the file: use the directory's")
    return notes


def _differing(first: Any, second: Any) -> Iterator[tuple[str, Any, Any]]:
    wanted, found = _plain(first), _plain(second)
    for key in sorted(wanted | found):
        if not _equal(wanted.get(key), found.get(key)):
            yield key, wanted.get(key), found.get(key)


def _plain(config: Any) -> dict[str, Any]:
    fields = {key: value for key, value in config.to_dict().items() if key not in _SILENT}
    return fields | {"head_dim": head_dim(config)}


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, float) and isinstance(second, float | int):
        return math.isclose(first, second, rel_tol=1e-6)  # the file holds float32
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_equal(first[key], second[key]) for key in first)
    return bool(first == second)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from printing bars and warnings of its own."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
