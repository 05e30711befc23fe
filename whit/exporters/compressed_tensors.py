"""The compressed-tensors target: a folder that transformers, vLLM and SGLang load, written without that library.

Linear layers are stored as `schemes.py` says. Embeddings and output heads are written dense in the model's dtype:
inference engines read neither packed. Projections that engines fuse into one matrix (q, k and v; gate and up) must
share a scheme, which is checked.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from whit.exporters.base import CannotHoldError, Target, Written, register_target
from whit.exporters.schemes import Scheme, hold, part_specs
from whit.exporters.source import CompressedModel, PackedLayer
from whit.formats.base import TensorSpec
from whit.models.write import LazyTensor, atomic_file, write_model
from whit.report.figures import format_bytes

#: Projections that inference engines concatenate, by the last part of their names.
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("w1", "w3"),
)
#: Files of a compressed directory that describe whit's packing and are replaced or left behind.
OWN_FILES = frozenset({"config.json", "model.safetensors.index.json", "result.json", "README.md", "report.html"})


@dataclass(frozen=True)
class Plan:
    """Scheme of every layer that stays packed, and the layers (embeddings, head) that are written dense."""

    schemes: dict[str, Scheme]
    dense: tuple[str, ...]
    scale_dtype: torch.dtype


@register_target
class CompressedTensors(Target):
    """Integer and FP8 linear layers for transformers, vLLM and SGLang."""

    name: ClassVar[str] = "compressed-tensors"
    summary: ClassVar[str] = "a folder for vLLM, SGLang and transformers: 4- and 8-bit integers"

    def plan(self, model: CompressedModel) -> Plan:
        """A scheme per linear layer; embeddings and head become dense.

        Raises:
            CannotHoldError: as said in `schemes.py`, or fused projections of different schemes.
        """
        # bfloat16 would round the scales (float16, 11 significant bits); whoever computes in it does so on loading.
        scale_dtype = torch.float32 if model.dtype is torch.float32 else torch.float16
        schemes, dense = {}, []
        for name, layer in model.layers.items():
            if layer.kind == "embedding" or name in model.ends:
                dense.append(name)
                continue
            if layer.kind != "linear":
                raise CannotHoldError(name, f"it holds nn.Linear layers, not {layer.kind}")
            schemes[name], _ = hold(layer, model.tensors(layer), scale_dtype)
        if not schemes:
            raise CannotHoldError("", "no linear layer of the model is packed")
        _check_fused(model, schemes)
        return Plan(schemes, tuple(dense), scale_dtype)

    def write(self, model: CompressedModel, plan: Plan, path: Path) -> Written:
        """Weights, config, and every other file of the directory (tokenizer, generation config, ...)."""
        tensors: dict[str, LazyTensor] = {}
        notes = []
        for name, layer in model.layers.items():
            tensors |= _dense(model, layer) if name in plan.dense else _parts(model, layer, plan.scale_dtype)
        for name in model.dense:
            spec = TensorSpec(model.shape(name), model.dtype_of(name))
            tensors[name] = LazyTensor(spec, lambda name=name: model.load(name))  # type: ignore[misc]
        weight_bytes = write_model(path, tensors)
        config = json.loads((model.directory / "config.json").read_text(encoding="utf-8"))
        config["quantization_config"] = quantization_config(model, plan.schemes)
        with atomic_file(path / "config.json") as file:
            file.write((json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
        for item in sorted(model.directory.iterdir()):
            if item.is_file() and item.name not in OWN_FILES and item.suffix != ".safetensors":
                shutil.copyfile(item, path / item.name)
        for name in plan.dense:
            layer = model.layers[name]
            before = layer.format.bytes(layer.rows, layer.columns)
            after = layer.rows * layer.columns * model.dtype.itemsize
            notes.append(
                f"{name} is written dense ({format_bytes(before)} -> {format_bytes(after)}): inference engines read no "
                "packed embedding or head"
            )
        notes += _reader_notes(plan.schemes)
        stored: dict[str, int] = {}
        for scheme in plan.schemes.values():
            stored[scheme.format] = stored.get(scheme.format, 0) + 1
        if plan.dense:
            stored[str(model.dtype).removeprefix("torch.")] = len(plan.dense)
        return Written(stored, weight_bytes + (path / "config.json").stat().st_size, notes)


def quantization_config(model: CompressedModel, schemes: Mapping[str, Scheme]) -> dict[str, Any]:
    """What `config.json` says: one config group per scheme, and the linear layers that are not quantised."""
    linear = [name for name, module in model.skeleton.named_modules() if isinstance(module, nn.Linear)]
    groups: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        groups.setdefault(scheme, []).append(name)
    formats = {scheme.format for scheme in groups}
    # With one scheme the class name says it; names of layers are only needed to tell schemes apart.
    targets = {scheme: ["Linear"] if len(groups) == 1 else names for scheme, names in groups.items()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{index}": scheme.to_json(targets[scheme]) for index, scheme in enumerate(groups)
        },
        "ignore": [name for name in linear if name not in schemes],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }  # fmt: skip


def _check_fused(model: CompressedModel, schemes: Mapping[str, Scheme]) -> None:
    modules = {name for name, _ in model.skeleton.named_modules()}
    for name in schemes:
        parent, _, last = name.rpartition(".")
        for group in FUSED:
            siblings = [f"{parent}.{item}" for item in group if f"{parent}.{item}" in modules]
            other = next((item for item in siblings if schemes.get(item) != schemes[name]), None)
            if last in group and other is not None:
                raise CannotHoldError(
                    name, f"inference engines fuse it with {other!r}, which has another scheme "
                    "(compress both by the same method and knobs)"
                )  # fmt: skip


def _parts(model: CompressedModel, layer: PackedLayer, dtype: torch.dtype) -> dict[str, LazyTensor]:
    _, parts = hold(layer, model.tensors(layer), dtype)
    specs = part_specs(layer, dtype)
    return {f"{layer.name}.{key}": LazyTensor(specs[key], make) for key, make in parts.items()}


def _dense(model: CompressedModel, layer: PackedLayer) -> dict[str, LazyTensor]:
    def load() -> Tensor:
        return model.packed(layer).unpack().to(model.dtype)

    return {f"{layer.name}.weight": LazyTensor(TensorSpec((layer.rows, layer.columns), model.dtype), load)}


def _reader_notes(schemes: Mapping[str, Scheme]) -> list[str]:
    notes = []
    if any(not scheme.weights.symmetric for scheme in schemes.values()):
        notes.append(
            "transformers loads zero points only with quantization_config=CompressedTensorsConfig(dequantize=True)"
            + (", and only if all layers share one scheme, which they do not" if len(set(schemes.values())) > 1 else "")
        )
    if any(scheme.inputs is not None for scheme in schemes.values()):
        notes.append("inputs are rounded by the reader, whose scale per token may differ from whit's in the last bit")
    return notes
