"""The GGUF target: one file for llama.cpp and transformers, in the block types that hold the weights exactly.

Layers take the smallest exact type (`gguf_blocks.py`), pruned ones F16 where their values are. An embedding or head
that fits none is written dense in the model's dtype; what the model holds dense stays in its dtype, vectors in
float32, as readers expect. The config goes into the metadata, and is read back and compared before the file gets its
name (`gguf_check.py`).
"""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from whit import __version__
from whit.errors import MissingDependencyError
from whit.exporters.base import CannotHoldError, Target, Written, register_target
from whit.exporters.gguf_blocks import BLOCK_TYPES, Bytes, exact_blocks, exact_halves, why_not
from whit.exporters.gguf_check import check_config, differences_in_transformers, head_dim
from whit.exporters.gguf_tokenizer import tokenizer_metadata
from whit.exporters.source import CompressedModel, PackedLayer
from whit.formats.base import Packed
from whit.models.gguf_architectures import ARCHITECTURES, CONFIG_KEYS, GGUFArchitecture
from whit.report.figures import format_bytes

_DENSE = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Item:
    """One tensor of the file: its name, type, shape, and how to make its bytes, uint8 (..., bytes of a row)."""

    name: str
    kind: str
    shape: tuple[int, ...]
    load: Callable[[], Bytes]


@dataclass(frozen=True)
class Plan:
    """The architecture's name in GGUF, and every tensor in the order of the model; remarks about what became dense."""

    architecture: str
    items: list[Item]
    notes: list[str]


@register_target
class GGUF(Target):
    """Ternary, 4-, 5- and 8-bit blocks for llama.cpp and transformers."""

    name: ClassVar[str] = "gguf"
    summary: ClassVar[str] = "one file for llama.cpp and transformers: TQ1_0, Q4_0, Q4_1, Q5_0, Q8_0, where exact"
    suffix: ClassVar[str] = ".gguf"
    types: ClassVar[tuple[str, ...]] = tuple(BLOCK_TYPES)

    def plan(self, model: CompressedModel) -> Plan:
        """Type of every tensor; reads all packed layers.

        Raises:
            CannotHoldError: a layer in a block fits no type exactly, or GGUF does not know the architecture.
            MissingDependencyError: the gguf package is not installed.
        """
        if importlib.util.find_spec("gguf") is None:
            raise MissingDependencyError("writing GGUF needs the gguf package: pip install 'gguf>=0.17'")
        architecture = _architecture(model)
        known = ARCHITECTURES[architecture]
        items, notes, dense = [], [], []
        for layer in model.layers.values():
            found = _exact(model.packed(layer), self.prefer)
            if found is None and layer.name not in model.ends:
                raise CannotHoldError(layer.name, why_not(layer.format, layer.columns))
            kind = _DENSE[model.dtype] if found is None else found[0]
            if found is None:
                before = format_bytes(layer.format.bytes(layer.rows, layer.columns))
                after = format_bytes(layer.rows * layer.columns * model.dtype.itemsize)
                notes.append(f"{layer.name} is written as {kind} ({before} -> {after}): no block type holds it exactly")
            elif kind == "F16":
                dense.append(layer)
            items.append(_packed_item(model, known, layer, kind, self.prefer))
        if dense:
            before = format_bytes(sum(layer.format.bytes(layer.rows, layer.columns) for layer in dense))
            after = format_bytes(sum(layer.rows * layer.columns * 2 for layer in dense))
            notes.append(f"{len(dense)} layers are written as F16 ({before} -> {after}): GGUF has no sparse type")
        items += [_dense_item(model, known, name) for name in model.dense]
        return Plan(architecture, items, notes)

    def write(self, model: CompressedModel, plan: Plan, path: Path) -> Written:
        """The file, tensor by tensor; then its config is read back and compared."""
        import gguf

        rows = int(next(item.shape[0] for item in plan.items if item.name == "token_embd.weight"))
        tokenizer = tokenizer_metadata(model.directory, model.config, rows)
        packed = Counter(item.kind for item in plan.items[: len(model.layers)])
        writer = gguf.GGUFWriter(None, plan.architecture)
        writer.add_name(model.directory.resolve().name)
        writer.add_description(f"exported by whit {__version__}")
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(_file_type(packed.most_common(1)[0][0]))
        for key, value in _config_entries(model.config, plan.architecture, rows).items():
            _add(writer, key, value)
        for key, value in tokenizer.entries.items():
            _add(writer, key, value)
        for item in plan.items:
            kind = gguf.GGMLQuantizationType[item.kind]
            size = gguf.quant_shape_to_byte_shape(item.shape, kind)
            writer.add_tensor_info(item.name, size, np.dtype(np.uint8), int(np.prod(size)), raw_dtype=kind)
        try:
            writer.write_header_to_file(path)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for item in plan.items:
                writer.write_tensor_data(np.ascontiguousarray(item.load()))
        finally:
            writer.close()
        with path.open("rb") as file:
            os.fsync(file.fileno())
        check_config(path, model.config)
        notes = [*plan.notes, tokenizer.note, *differences_in_transformers(path, model)]
        return Written(dict(packed), path.stat().st_size, notes)


def _architecture(model: CompressedModel) -> str:
    name = type(model.skeleton).__name__
    found = [key for key, known in ARCHITECTURES.items() if known.model_class == name]
    if not found:
        classes = ", ".join(known.model_class for known in ARCHITECTURES.values())
        raise CannotHoldError("", f"whit writes the GGUF of {classes}, not of {name}")
    if model.dtype not in _DENSE:
        raise CannotHoldError("", f"GGUF has no type for {model.dtype}")
    return found[0]


def _stored_name(known: GGUFArchitecture, name: str) -> str:
    stored = known.stored_name(name)
    if stored is None:
        raise CannotHoldError("", f"GGUF knows no tensor {name!r} in a {known.model_class}")
    return stored


def _exact(packed: Packed, prefer: str | None) -> tuple[str, Bytes] | None:
    """The type that holds a packed weight exactly, and its bytes."""
    blocks = exact_blocks(packed, prefer)
    if blocks is not None:
        return blocks
    halves = exact_halves(packed)
    return None if halves is None else ("F16", halves)


def _packed_item(
    model: CompressedModel, known: GGUFArchitecture, layer: PackedLayer, kind: str, prefer: str | None
) -> Item:
    name = _stored_name(known, f"{layer.name}.weight")
    transform = known.transform(name)
    assert transform is None or transform.moves_rows  # what changes values is a norm

    def load() -> Bytes:
        found = _exact(model.packed(layer), prefer)
        rows = _bytes_of(model.packed(layer).unpack().to(model.dtype)) if found is None else found[1]
        return rows if transform is None else transform.write(torch.from_numpy(rows), model.config).numpy()

    return Item(name, kind, (layer.rows, layer.columns), load)


def _dense_item(model: CompressedModel, known: GGUFArchitecture, name: str) -> Item:
    stored = _stored_name(known, name)
    transform = known.transform(stored)
    shape, dtype = model.shape(name), model.dtype_of(name)
    if dtype not in _DENSE:
        raise CannotHoldError("", f"GGUF has no type for {dtype} ({name!r})")
    dtype = torch.float32 if len(shape) == 1 else dtype

    def load() -> Bytes:
        value = model.load(name)
        return _bytes_of((value if transform is None else transform.write(value, model.config)).to(dtype))

    return Item(stored, _DENSE[dtype], shape, load)


def _bytes_of(tensor: Tensor) -> Bytes:
    flat: Bytes = tensor.contiguous().view(torch.uint8).numpy()
    return flat


def _file_type(kind: str) -> int:
    """The number of the file type named after the most frequent type of its layers."""
    import gguf

    names = {item.name: int(item.value) for item in gguf.LlamaFileType}
    return names.get(f"MOSTLY_{kind}", names["ALL_F32"])


def _config_entries(config: Any, architecture: str, rows: int) -> dict[str, Any]:
    """Metadata that says the config: what the reader reads, and what llama.cpp wants besides."""
    fields = {key: getattr(config, key, None) for _, key in (*CONFIG_KEYS, *ARCHITECTURES[architecture].config)}
    rope = config.rope_parameters or {}
    fields["rope_theta"] = rope.get("full_attention", rope).get("rope_theta")
    fields["head_dim"] = head_dim(config)
    entries: dict[str, Any] = {
        f"{architecture}.{key}": fields[name]
        for key, name in reversed((*CONFIG_KEYS, *ARCHITECTURES[architecture].config))
        if fields[name] is not None
    }
    size = head_dim(config)
    entries |= {f"{architecture}.attention.key_length": size, f"{architecture}.attention.value_length": size}
    entries |= {f"{architecture}.rope.dimension_count": size, f"{architecture}.vocab_size": rows}
    return {key: float(value) if key.endswith(("epsilon", "freq_base")) else value for key, value in entries.items()}


def _add(writer: Any, key: str, value: Any) -> None:
    """One metadata entry; Python types decide those of GGUF (whole numbers: unsigned 32 bits, in arrays signed)."""
    adders = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    if value != []:  # an empty array has no type
        adders[type(value)](key, value)
