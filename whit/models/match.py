"""Making a checkpoint's tensors available under the model's names, or saying why that cannot be done."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.utils import logging as transformers_logging

from whit.errors import ModelError
from whit.models.names import match_names, tied_groups
from whit.models.source import InMemorySource, RenamedSource, TensorSource, main_dtype


@dataclass
class Matched:
    """A source under the model's names.

    Attributes:
        source: every parameter of the model is in it, tied ones under each of their names.
        untied: the config ties parameters that the checkpoint stores with different values; tying would lose one.
        notes: remarks for the user.
    """

    source: TensorSource
    untied: bool = False
    notes: list[str] = field(default_factory=list)


def match_source(skeleton: nn.Module, source: TensorSource, directory: Path | None, label: str) -> Matched:
    """Bring a source under the names of a model.

    Names are matched directly (see `names.py`). When transformers must convert tensors of this family (fuse, split,
    transpose), or renames them further, the folder is loaded whole by `from_pretrained` instead.

    Args:
        skeleton: the model, on meta.
        source: the checkpoint as stored.
        directory: the folder `from_pretrained` can read, if there is one.
        label: what to call the model in errors.

    Raises:
        ModelError: lists up to 5 missing or mismatched tensors.
    """
    match = match_names(skeleton, source)
    convert = _needs_conversion(skeleton, source.names())
    if match.complete and not convert:
        untied = _untied_group(skeleton, match.mapping, source)
        notes = []
        if match.unused:
            notes.append(f"{len(match.unused)} tensors of the checkpoint are not part of the model ({match.unused[0]})")
        if untied:
            notes.append(f"{' and '.join(untied)} are tied in the config but differ in the checkpoint: kept apart")
        mapping = match.mapping if untied else match.mapping | _aliases(skeleton, match.mapping)
        return Matched(RenamedSource(source, mapping), bool(untied), notes)
    # from_pretrained can only help when something in the checkpoint was not understood, or must be converted.
    if directory is not None and (convert or (match.missing and match.unused)):
        return _by_transformers(skeleton, source, directory, label)
    raise ModelError(f"{label!r} does not fit {type(skeleton).__name__}: {match.problems()} (check config.json)")


def _needs_conversion(skeleton: nn.Module, names: list[str]) -> bool:
    if not hasattr(skeleton, "config"):
        return False
    converters = [item for item in get_model_conversion_mapping(skeleton) if isinstance(item, WeightConverter)]
    return any(item.compiled_sources.search(name) for item in converters for name in names)


def _aliases(skeleton: nn.Module, mapping: dict[str, str]) -> dict[str, str]:
    """Tied names that the checkpoint does not store, each under the name it does store."""
    out: dict[str, str] = {}
    for group in tied_groups(skeleton):
        stored = next(name for name in group if name in mapping)
        out |= {name: mapping[stored] for name in group if name not in mapping}
    return out


def _untied_group(skeleton: nn.Module, mapping: dict[str, str], source: TensorSource) -> list[str]:
    for group in tied_groups(skeleton):
        stored = [name for name in group if name in mapping]
        names = {mapping[name] for name in stored}
        if len(names) > 1:
            first, *others = (source.load(name) for name in sorted(names))
            if not all(torch.equal(first, other) for other in others):
                return stored
    return []


def _by_transformers(skeleton: nn.Module, source: TensorSource, directory: Path, label: str) -> Matched:
    model_class: Any = type(skeleton)
    logger = transformers_logging.get_logger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)  # its load report repeats what the error below says
    try:
        model, info = model_class.from_pretrained(
            directory,
            dtype=main_dtype(source),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{label!r} does not fit {model_class.__name__} ({reason}): check config.json") from error
    finally:
        logger.setLevel(level)
    missing = sorted(info["missing_keys"])
    if missing:
        listed = "; ".join(missing[:5]) + (f"; and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise ModelError(f"{label!r} does not fit {model_class.__name__}: not in the file: {listed}")
    note = "the checkpoint's tensors had to be converted by transformers, so the whole model was held in memory once"
    return Matched(InMemorySource(model.state_dict(), source.stored_bytes), notes=[note])
