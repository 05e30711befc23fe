"""From finished shards to a directory that transformers loads: consolidated weights, config, tokenizer."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from whit.errors import OutputError
from whit.formats.base import Format, TensorSpec, format_from_json
from whit.models.integration import WhitConfig
from whit.models.resolve import ModelReference
from whit.models.skeleton import keeps_float32
from whit.models.write import write_model
from whit.pipeline.assign import Assignment
from whit.pipeline.journal import Journal

# How inputs other than text are prepared: not the model's, but useless to be without.
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def saved_config(
    reference: ModelReference, assignment: Assignment, formats: Mapping[str, Format], dense_dtype: torch.dtype
) -> Any:
    """The config of the compressed model: the original's, and which module is packed in which layout.

    Args:
        formats: layout of each assigned layer.
        dense_dtype: of what is not packed.
    """
    config = copy.deepcopy(reference.config)
    config.architectures = [reference.model_class.__name__]
    if hasattr(config, "auto_map"):  # points at code that is neither used nor copied
        del config.auto_map
    parts = [getattr(config, key, None) for key in getattr(config, "sub_configs", {})]
    for part in [config, *(item for item in parts if item is not None)]:  # as transformers does when it loads
        part.dtype = str(dense_dtype).removeprefix("torch.")
    config.quantization_config = WhitConfig.of(
        {name: formats[name] for name in assignment.layers}, assignment.tied, assignment.scaled
    )
    return config


def dense_specs(model: nn.Module, assignment: Assignment, dense_dtype: torch.dtype) -> dict[str, TensorSpec]:
    """Shape and dtype of every tensor that will be saved as it is, by name; `model` is the skeleton."""
    replaced = {f"{name}.weight" for name in [*assignment.layers, *assignment.tied]}
    shared = set(getattr(model, "all_tied_weights_keys", None) or {})
    out = {}
    for name, value in model.state_dict().items():
        if name not in replaced and name not in shared:
            dtype = dense_tensor_dtype(model, name, dense_dtype) if value.is_floating_point() else value.dtype
            out[name] = TensorSpec(tuple(value.shape), dtype)
    return out


def saved_specs(model: nn.Module, assignment: Assignment, dense_dtype: torch.dtype) -> dict[str, TensorSpec]:
    """Shape and dtype of every tensor that will be saved, by name; `model` is the skeleton."""
    out = dense_specs(model, assignment, dense_dtype)
    for layer in assignment.layers.values():
        specs = layer.method.format(layer.rows, layer.columns).specs(layer.rows, layer.columns)
        out |= {f"{layer.name}.{key}": spec for key, spec in specs.items()}
    return out


def dense_tensor_dtype(model: nn.Module, name: str, dense_dtype: torch.dtype) -> torch.dtype:
    """Dtype in which an untouched floating-point parameter is saved: what transformers will load it as."""
    return torch.float32 if keeps_float32(model, name, dense_dtype) else dense_dtype


def write_directory(
    directory: Path,
    reference: ModelReference,
    skeleton: nn.Module,
    assignment: Assignment,
    journal: Journal,
    dense_dtype: torch.dtype,
) -> int:
    """Write the loadable model from the journal's shards.

    Args:
        skeleton: a model without weights; its assigned modules are replaced by empty packed ones.

    Returns:
        bytes of weight files and config.

    Raises:
        OutputError: the shards and the model disagree (a bug or a damaged working folder).
    """
    records = [record for layers in journal.units.values() for record in layers]
    formats = {record.name: format_from_json(record.format) for record in records}
    config = saved_config(reference, assignment, formats, dense_dtype)
    config.quantization_config.apply(skeleton)
    shared = set(getattr(skeleton, "all_tied_weights_keys", None) or {})
    order = [name for name in skeleton.state_dict() if name not in shared]
    stored = journal.lazy_tensors()
    missing, extra = sorted(set(order) - set(stored)), sorted(set(stored) - set(order))
    if missing or extra:
        raise OutputError(f"working folder and model disagree: missing {missing[:3]}, unexpected {extra[:3]}")
    weight_bytes = write_model(directory, {name: stored[name] for name in order})
    config.save_pretrained(directory)
    generation = reference.generation_config or getattr(skeleton, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(directory)
    tokenizer = reference.load_tokenizer()
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    for name in PROCESSOR_FILES:
        if reference.directory is not None and (reference.directory / name).is_file():
            shutil.copyfile(reference.directory / name, directory / name)
    return weight_bytes + (directory / "config.json").stat().st_size
