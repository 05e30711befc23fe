"""Reading calibration and evaluation sources, with one clear error for each way in which they can be bad."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from whit.data.corpora import Corpus, bundled_corpora, corpus_with_hash
from whit.errors import DataError, nearest
from whit.finite import all_finite

#: Keyword inputs a data file may hold: the names that forward methods of the field use.
INPUT_NAMES = frozenset(
    {
        "input_ids", "attention_mask", "token_type_ids", "position_ids", "decoder_input_ids", "decoder_attention_mask",
        "input_features", "input_values", "pixel_values", "pixel_mask", "labels", "sample", "timestep", "x",
        "encoder_hidden_states",
    }
)  # fmt: skip
#: More text than this is never needed for calibration or a perplexity; the rest of a larger file is not read.
MAXIMUM_BYTES = 64 * 2**20


@dataclass(frozen=True)
class TextSource:
    """Text and where it came from. `joined()` is what a perplexity is measured on."""

    documents: list[str]
    origin: dict[str, Any]
    notes: list[str]

    def joined(self) -> str:
        """One text: documents joined by an empty line."""
        return "\n\n".join(self.documents)


@dataclass(frozen=True)
class TensorSource:
    """Model inputs, each with a leading sample dimension."""

    tensors: dict[str, Tensor]
    origin: dict[str, Any]


def read_source(spec: str | Path | None, default: str) -> TextSource | TensorSource:
    """Read a bundled corpus or a file.

    Args:
        spec: None for the bundled corpus `default`; the name of a bundled corpus; or the path of a .safetensors file
            (keyword inputs), a .jsonl file (a "text" field per line) or any other UTF-8 text file.

    Raises:
        DataError: there is no such source, or it is empty, not text, or broken.
    """
    corpora = bundled_corpora()
    name = default if spec is None else str(spec)
    path = Path(name)
    if name in corpora and not path.is_file():
        return _from_corpus(corpora[name], None)
    if not path.exists():
        siblings = [str(item) for item in path.parent.iterdir() if item.is_file()] if path.parent.is_dir() else []
        raise DataError(
            f"no file and no bundled text is called {name!r}{nearest(name, [*corpora, *siblings])} "
            f"(bundled: {', '.join(corpora)})"
        )
    if not path.is_file():
        raise DataError(f"{name!r} is not a file: give a .txt, .jsonl or .safetensors file")
    try:
        return _read_tensors(path) if path.suffix == ".safetensors" else _read_text(path)
    except OSError as error:
        raise DataError(f"cannot read {name!r}: {error.strerror or error}") from None


def _from_corpus(corpus: Corpus, path: Path | None) -> TextSource:
    origin = {
        "name": corpus.name,
        "title": corpus.title,
        "path": path.name if path else None,
        "sha256": corpus.sha256,
        "licence": corpus.licence,
    }
    return TextSource(corpus.documents(), origin, [])


def _read_text(path: Path) -> TextSource:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        content = file.read(MAXIMUM_BYTES)
        digest.update(content)
        size = len(content)
        while more := file.read(2**20):
            digest.update(more)
            size += len(more)
    if corpus := corpus_with_hash(digest.hexdigest()):
        return _from_corpus(corpus, path)
    notes = []
    if size > len(content):
        content = content[: content.rfind(b"\n") + 1] or content
        notes.append(f"only the first {len(content)} of {size} bytes of {path.name!r} were read")
    text = _decode(path, content)
    documents = _json_lines(path, text) if path.suffix in (".jsonl", ".ndjson") else [text]
    origin = {
        "name": path.name,
        "title": path.stem,
        "path": path.name,
        "sha256": digest.hexdigest(),
        "licence": "not stated (a file of the user)",
    }
    return TextSource(documents, origin, notes)


def _decode(path: Path, content: bytes) -> str:
    where = repr(str(path))
    zero = content.find(b"\0")
    if zero >= 0:
        raise DataError(f"{where} is binary (zero byte at offset {zero}): give a .txt, .jsonl or .safetensors file")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where} is not UTF-8 (byte 0x{content[error.start]:02x} at offset {error.start}): convert it, for "
            "example with iconv -t UTF-8"
        ) from None
    if not text.strip():
        raise DataError(f"{where} is empty: give a file with text")
    return text


def _json_lines(path: Path, text: str) -> list[str]:
    documents = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"line {number} of {str(path)!r}"
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{where} is not JSON ({error.msg} at column {error.colno}): write one object a line"
            ) from None
        except RecursionError:
            raise DataError(f"{where} is nested too deeply: write one object a line") from None
        if not isinstance(item, dict) or not isinstance(item.get("text"), str):
            raise DataError(f'{where} has no "text" field that is a string: write {{"text": "..."}}')
        if any("\ud800" <= letter <= "\udfff" for letter in item["text"]):  # JSON can escape half of a pair
            raise DataError(f"{where} holds half of a surrogate pair, which is no character: write whole characters")
        documents.append(item["text"])
    if not any(document.strip() for document in documents):
        raise DataError(f"{str(path)!r} is empty: no line has any text")
    return documents


def _read_tensors(path: Path) -> TensorSource:
    where = repr(str(path))
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise DataError(f"{where} is not a readable safetensors file ({error}): write it again") from None
    if not tensors:
        raise DataError(f"{where} is empty: store keyword inputs such as input_ids with a leading sample dimension")
    for name, item in tensors.items():
        if name not in INPUT_NAMES:
            raise DataError(
                f"{where} holds {name!r}, which is no model input{nearest(name, INPUT_NAMES)} "
                f"(known: {', '.join(sorted(INPUT_NAMES))})"
            )
        if item.ndim == 0:
            raise DataError(f"{name!r} in {where} is a single number: give it a leading sample dimension")
        if not all_finite(item):
            raise DataError(f"{name!r} in {where} holds NaN or Inf: make the inputs again")
    lengths = {name: item.shape[0] for name, item in sorted(tensors.items())}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise DataError(f"tensors in {where} disagree about the number of samples ({listed}): make them equal")
    if set(tensors) == {"labels"} or 0 in (item.numel() for item in tensors.values()):
        raise DataError(f"{where} is empty: it holds no model inputs")
    origin = {
        "name": path.name,
        "title": path.stem,
        "path": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "licence": "not stated (a file of the user)",
    }
    return TensorSource(tensors, origin)
