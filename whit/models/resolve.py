"""From MODEL as the user typed it to a `ModelReference`: class, config, tensor source, tokenizer; or one clear error.

A model is, in this order: a path (directory or GGUF file), a catalogue name, a hub id. Everything that can be wrong
with it is found here, before any work: names and shapes of every tensor are compared with a skeleton of the model.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from whit.errors import ModelError, WhitError, nearest
from whit.models import architecture, catalog, gguf
from whit.models.card import license_in_card
from whit.models.checkpoint import PICKLED_REMEDY, open_checkpoint, read_config_json
from whit.models.ctranslate2 import open_whisper
from whit.models.match import match_source
from whit.models.skeleton import skeleton_of
from whit.models.source import TensorSource, hash_lines, main_dtype
from whit.models.stacks import find_stacks
from whit.models.tokenizer import checked_loader, folder_loader, smiles_loader

TokenizerLoader = Callable[[], Any]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.jinja", "tokenizer*", "*.model"]
_VOLATILE_CONFIG = ("transformers_version", "_name_or_path", "_attn_implementation_autoset")


@dataclass
class ModelReference:
    """A model that can be built and whose weights can be read one by one.

    Attributes:
        label: short name for tables.
        model_class: transformers class.
        config: its config.
        source: the weights, under the names of the model's state dict.
        directory: folder the model came from, None if it is not a folder in transformers format.
        load_tokenizer: returns the tokenizer, or None if the model has none; ModelError if it does not fit the model.
        generation_config: as stored, or derived from the config; None for models that do not generate.
        identity: sha256 over the weights, their names and the config: two references with equal identity are the same
            model.
        dense_bytes: bytes of all parameters (tied ones once) in `dtype`.
        notes: remarks the user should read.
        dtype: the model's own dtype: of its config, else of most stored values; for GGUF the one the architecture is
            known to compute well in.
        license: of the weights as the catalogue or the folder's README says it, else None.
    """

    label: str
    model_class: type
    config: Any
    source: TensorSource
    directory: Path | None
    load_tokenizer: TokenizerLoader
    generation_config: Any
    identity: str
    dense_bytes: int
    notes: list[str]
    dtype: torch.dtype
    license: str | None = None


@dataclass
class _Parts:
    """What each kind of model contributes; `_finish` does what all kinds share."""

    label: str
    config: Any
    source: TensorSource
    directory: Path | None
    load_tokenizer: TokenizerLoader
    generation_config: Any = None
    dtype: torch.dtype | None = None
    notes: list[str] = field(default_factory=list)
    license: str | None = None


def resolve_model(model: str | Path | None) -> ModelReference:
    """Find, check and describe a model without loading its weights.

    Args:
        model: a transformers folder, a GGUF file, a catalogue name, a hub id "owner/name", or None for the default.

    Raises:
        ModelError: the input is not a model whit can compress; the message quotes it and names the remedy.
        MissingDependencyError: a catalogue model's package, or a reader, is not installed.
    """
    if model is None:
        return _finish(_from_catalog(catalog.DEFAULT))
    if not str(model):
        raise ModelError("MODEL is empty: give a folder, a GGUF file, a hub id or a name (or nothing for the default)")
    try:
        return _finish(_parts_of(model))
    except OSError as error:
        if isinstance(error, WhitError):
            raise
        raise ModelError(f"cannot read {str(model)!r}: {error.strerror or error}") from error


def _parts_of(model: str | Path) -> _Parts:
    path = Path(model).expanduser()
    if path.exists():
        return _from_path(path)
    if str(model) in catalog.CATALOG:
        return _from_catalog(str(model))
    if isinstance(model, str) and _HUB_ID.fullmatch(model):
        return _from_hub(model)
    raise ModelError(_not_found(str(model), path))


def _not_found(text: str, path: Path) -> str:
    if path.parent == Path() and not path.suffix:
        hint = nearest(text, [*catalog.CATALOG, *_listing(Path())])
        return f"no model {text!r}: no such folder, and not one of {', '.join(catalog.CATALOG)}{hint}"
    parent = path.parent
    while not parent.exists():
        path, parent = parent, parent.parent
    siblings = difflib.get_close_matches(path.name, _listing(parent), n=1, cutoff=0.5)
    hint = f"; did you mean {str(parent / siblings[0])!r}?" if siblings else f"; {str(parent)!r} has no {path.name!r}"
    return f"no such file or folder: {text!r}{hint}"


def _listing(folder: Path) -> list[str]:
    try:
        return sorted(item.name for item in folder.iterdir())
    except OSError:
        return []


def _from_path(path: Path) -> _Parts:
    if path.is_dir():
        return _from_directory(path, path.resolve().name)
    if gguf.is_gguf(path):
        return _from_gguf(path, path.stem)
    if path.suffix == ".safetensors":
        raise ModelError(
            f"{str(path)!r} is only the weights: give the folder that also holds config.json ({str(path.parent)!r})"
        )
    raise ModelError(
        f"{str(path)!r} is not a model whit reads: it takes a transformers folder with safetensors, or a GGUF file; "
        f"for pickled weights: {PICKLED_REMEDY}"
    )


def _from_directory(directory: Path, label: str) -> _Parts:
    fields = read_config_json(directory)
    config = architecture.load_config(directory, fields)
    return _Parts(
        label,
        config,
        open_checkpoint(directory),
        directory,
        folder_loader(directory),
        architecture.load_generation_config(directory),
        license=license_in_card(directory),
    )


def _from_gguf(path: Path, label: str) -> _Parts:
    file = gguf.open_gguf(path)
    return _Parts(label, file.config, file.source, None, file.load_tokenizer, None, file.dtype, list(file.notes))


def _from_catalog(name: str) -> _Parts:
    entry = catalog.CATALOG[name]
    path = catalog.locate(entry)
    parts = _KINDS[entry.kind](path.parent if entry.kind == "folder" else path, name)
    parts.license = entry.licence
    parts.notes = [*([entry.warning] if entry.warning else []), *parts.notes]
    return parts


def _from_whisper(path: Path, label: str) -> _Parts:
    whisper = open_whisper(path)
    return _Parts(
        label,
        whisper.config,
        whisper.source,
        None,
        whisper.load_tokenizer,
        whisper.generation_config,
        main_dtype(whisper.source),
    )


def _from_smiles(path: Path, label: str) -> _Parts:
    fields = read_config_json(path.parent)
    source = catalog.read_state_dict(path)
    config = architecture.load_config(path.parent, fields)
    return _Parts(label, config, source, None, smiles_loader(path.parent / "vocab.txt"))


_KINDS: dict[str, Callable[[Path, str], _Parts]] = {
    "gguf": _from_gguf,
    "folder": _from_directory,
    "whisper-ctranslate2": _from_whisper,
    "smiles": _from_smiles,
}


def _from_hub(name: str) -> _Parts:
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=["*/*"])
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(". ")
        raise ModelError(
            f"{name!r} is neither a folder here nor a model that could be fetched from the hub ({reason}): check the "
            "name and the network, or give the path of a downloaded folder"
        ) from error
    return _from_directory(Path(folder), name)


def _finish(parts: _Parts) -> ModelReference:
    model_class = architecture.model_class_of(parts.config)
    dtype = parts.dtype or architecture.config_dtype(parts.config) or main_dtype(parts.source)
    skeleton = skeleton_of(model_class, parts.config, dtype)
    find_stacks(skeleton)
    matched = match_source(skeleton, parts.source, parts.directory, parts.label)
    if matched.untied:
        parts.config.tie_word_embeddings = False
        skeleton = skeleton_of(model_class, parts.config, dtype)
    config_json = _config_json(parts.config)
    return ModelReference(
        label=parts.label,
        model_class=model_class,
        config=parts.config,
        source=matched.source,
        directory=parts.directory,
        load_tokenizer=checked_loader(parts.load_tokenizer, parts.config, parts.label),
        generation_config=parts.generation_config or _default_generation_config(skeleton),
        identity=hash_lines([matched.source.fingerprint(), model_class.__name__, config_json]),
        dense_bytes=sum(parameter.numel() for parameter in skeleton.parameters()) * dtype.itemsize,
        notes=[*parts.notes, *matched.notes],
        dtype=dtype,
        license=parts.license,
    )


def _config_json(config: Any) -> str:
    fields = {key: value for key, value in config.to_diff_dict().items() if key not in _VOLATILE_CONFIG}
    return json.dumps(fields, sort_keys=True, default=str)


def _default_generation_config(skeleton: nn.Module) -> Any:
    return getattr(skeleton, "generation_config", None)
