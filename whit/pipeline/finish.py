"""From finished shards to a directory that transformers loads: consolidated weights, config, tokenizer."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from torch import nn

from whit.errors import OutputError
from whit.formats.base import format_from_json
from whit.models.integration import WhitConfig
from whit.models.resolve import ModelReference
from whit.models.write import write_model
from whit.pipeline.assign import Assignment
from whit.pipeline.journal import Journal
from whit.report.record import LayerRecord


def quantization_config(assignment: Assignment, records: list[LayerRecord]) -> WhitConfig:
    """Describe the packed layers in the order of the model."""
    by_name = {record.name: record.format for record in records}
    formats: list[dict[str, object]] = []
    layers: dict[str, int] = {}
    for name in assignment.layers:
        described = format_from_json(by_name[name]).to_json()
        if described not in formats:
            formats.append(described)
        layers[name] = formats.index(described)
    return WhitConfig(formats, layers, assignment.tied, assignment.scaled)


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
    described = quantization_config(assignment, records)
    described.apply(skeleton)
    shared = set(getattr(skeleton, "all_tied_weights_keys", None) or {})
    order = [name for name in skeleton.state_dict() if name not in shared]
    stored = journal.lazy_tensors()
    missing, extra = sorted(set(order) - set(stored)), sorted(set(stored) - set(order))
    if missing or extra:
        raise OutputError(f"working folder and model disagree: missing {missing[:3]}, unexpected {extra[:3]}")
    weight_bytes = write_model(directory, {name: stored[name] for name in order})
    config = copy.deepcopy(reference.config)
    config.architectures = [reference.model_class.__name__]
    config.dtype = str(dense_dtype).removeprefix("torch.")
    config.quantization_config = described
    config.save_pretrained(directory)
    generation = reference.generation_config or getattr(skeleton, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(directory)
    tokenizer = reference.load_tokenizer()
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    return weight_bytes + (directory / "config.json").stat().st_size


def config_bytes(assignment: Assignment) -> int:
    """Bytes that the description of the packed layers adds to config.json, for the plan."""
    formats = {
        json.dumps(layer.method.format(layer.rows, layer.columns).to_json()) for layer in assignment.layers.values()
    }
    return sum(len(text) + 40 for text in formats) + sum(len(name) + 12 for name in assignment.layers)
