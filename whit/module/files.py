"""A compressed module of the user's own on disk: plain tensors and one JSON description, read into a fresh skeleton.

    DIR/model.safetensors   every tensor of the state dict, shared ones once
    DIR/whit.json           which layer is packed in which layout, which names share a tensor

The architecture stays the user's code: `load_into` is given the module as its constructor makes it, replaces the layers
that the description names and fills in every tensor, none missing, none left over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from whit import __version__
from whit.errors import ModelError, OutputError, nearest
from whit.formats.base import Format, TensorSpec, format_from_json
from whit.models.checkpoint import open_checkpoint, read_json_object
from whit.models.layers import layer_kind
from whit.models.packed import (
    PackedEmbedding,
    PackedModule,
    TiedPackedLinear,
    packed_modules,
    places_of,
    replace_module,
    tied_linear,
)
from whit.models.write import DTYPES, LazyTensor, atomic_file, write_model

DESCRIPTION = "whit.json"
VERSION = 1
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Description:
    """What `whit.json` says.

    Attributes:
        formats: layout of each packed layer by module name.
        tied: linear layer -> packed layer whose matrix it shares.
        scaled: embedding -> constant its rows are multiplied by.
        shared: name in the state dict -> name under which the same tensor is stored.
    """

    formats: dict[str, Format]
    tied: dict[str, str]
    scaled: dict[str, float]
    shared: dict[str, str]


def save(module: nn.Module, directory: str | Path) -> None:
    """Write a module with packed layers (`whit.save`): `model.safetensors` and `whit.json`, never a pickle.

    Args:
        module: any module; for a transformers model use its own `save_pretrained`.
        directory: made if need be; an earlier save in it is replaced.

    Raises:
        ModelError: the module is a transformers model, or its state dict holds something else than tensors that
            safetensors can store.
        OutputError: the directory cannot be written, or holds a model that `whit.save` did not write.
    """
    if hasattr(module, "save_pretrained") and hasattr(module, "config"):
        raise ModelError(
            f"{type(module).__name__} is a transformers model: model.save_pretrained(directory) saves it, and "
            "from_pretrained (or whit.load) loads it"
        )
    path = Path(directory)
    stored, shared = _distinct(module)
    description = {
        "whit": __version__,
        "version": VERSION,
        "module": type(module).__name__,
        **_packing(module),
        "shared": shared,
    }
    try:
        _claim(path)
        write_model(path, {name: _lazy(tensor) for name, tensor in stored.items()})
        with atomic_file(path / DESCRIPTION) as file:
            file.write((json.dumps(description, indent=1) + "\n").encode())
    except OSError as error:
        raise OutputError(f"{str(directory)!r} cannot be written ({error.strerror or error})") from error


def load_into(module: Module, directory: str | Path) -> Module:
    """Read what `whit.save` wrote into a fresh module (`whit.load_into`); returns the same module, now packed.

    Args:
        module: as its constructor makes it; its values do not matter, and it may be on the meta device. It is changed:
            every tensor is replaced by the stored one, in the stored dtype, on the module's device (the CPU for meta).
        directory: what `whit.save` was given.

    Raises:
        ModelError: not such a directory, damaged files, or a module that differs from the saved one: all names and
            shapes are compared before anything is changed.
    """
    path = Path(directory)
    description = _read(path)
    source = open_checkpoint(path)
    found = {name: TensorSpec(source.shape(name), source.dtype(name)) for name in source.names()}
    _compare(module, description, found)
    device = next((tensor.device for tensor in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    device = torch.device("cpu") if device.type == "meta" else device
    _pack(module, description)
    done: set[int] = set()
    for name, old in module.state_dict(keep_vars=True).items():
        if id(old) not in done:
            done.add(id(old))
            _set(module, name, source.load(description.shared.get(name, name)).to(device))
    _refuse_meta(module)
    return module


def _distinct(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of the state dict, each once, and the other names of those that have several."""
    first: dict[int, str] = {}
    stored: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPES or tensor.is_meta:
            said = f"a {type(tensor).__name__}" if not isinstance(tensor, Tensor) else f"{tensor.dtype} {tensor.device}"
            raise ModelError(f"{name!r} of the module is {said}, which safetensors files do not hold")
        if id(tensor) in first:
            shared[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            stored[name] = tensor.detach()
    return stored, shared


def _lazy(tensor: Tensor) -> LazyTensor:
    return LazyTensor(TensorSpec(tuple(tensor.shape), tensor.dtype), lambda: tensor)


def _packing(module: nn.Module) -> dict[str, Any]:
    formats: list[dict[str, Any]] = []
    layers: dict[str, int] = {}
    packed = packed_modules(module)
    for name, part in packed.items():
        described = part.format.to_json()
        if described not in formats:
            formats.append(described)
        layers[name] = formats.index(described)
    names = {id(part): name for name, part in packed.items()}
    tied = {name: names[id(part.source)] for name, part in module.named_modules() if isinstance(part, TiedPackedLinear)}
    scaled = {
        name: part.scale for name, part in packed.items() if isinstance(part, PackedEmbedding) and part.scale != 1.0
    }
    return {"formats": formats, "layers": layers, "tied": tied, "scaled": scaled}


def _claim(path: Path) -> None:
    """The directory, without the files of an earlier save.

    Raises:
        OutputError: it is a file, or holds weights that are not ours to replace.
    """
    if path.exists() and not path.is_dir():
        raise OutputError(f"{str(path)!r} is a file: give a directory")
    weights = sorted(path.glob("model*.safetensors*")) if path.is_dir() else []
    if weights and not (path / DESCRIPTION).is_file():
        raise OutputError(f"{str(path)!r} holds {weights[0].name!r} of another model: choose another directory")
    path.mkdir(parents=True, exist_ok=True)
    for old in [path / DESCRIPTION, *weights]:
        old.unlink(missing_ok=True)


def _read(path: Path) -> Description:
    if not (path / DESCRIPTION).is_file():
        raise ModelError(f"{str(path)!r} has no {DESCRIPTION}: give a directory that whit.save wrote")
    fields = read_json_object(path / DESCRIPTION)
    version = fields.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise ModelError(f"{str(path)!r} was saved by another whit (description {version!r}): pip install -U whit")
    try:
        formats = [format_from_json(item) for item in fields["formats"]]
        return Description(
            {str(name): formats[index] for name, index in fields["layers"].items()},
            {str(name): str(leader) for name, leader in fields["tied"].items()},
            {str(name): float(scale) for name, scale in fields["scaled"].items()},
            {str(name): str(first) for name, first in fields["shared"].items()},
        )
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{str(path / DESCRIPTION)!r} is damaged ({error}): copy it again") from error


def _compare(module: nn.Module, description: Description, stored: Mapping[str, TensorSpec]) -> None:
    """Refuse a module that is not the saved one, before anything is changed."""
    label = type(module).__name__
    parts = dict(module.named_modules(remove_duplicate=False))
    for name in [*description.formats, *description.tied]:
        if name not in parts:
            raise ModelError(f"the saved module packs {name!r}, which {label} lacks{nearest(name, parts)}")
        if layer_kind(parts[name]) is None and name not in description.scaled:
            raise ModelError(f"the saved module packs {name!r}, but a {type(parts[name]).__name__} cannot be packed")
    for name, leader in description.tied.items():
        if leader not in description.formats:
            raise ModelError(f"the saved module ties {name!r} to {leader!r}, which is not packed: copy it again")
    dense, packed = _expected(module, parts, description)
    stored = {**stored, **{name: stored[first] for name, first in description.shared.items() if first in stored}}
    for name, spec in (dense | packed).items():
        if name not in stored:
            raise ModelError(f"the saved module has no tensor {name!r} of {label}{nearest(name, stored)}")
        found = stored[name]
        # What is not packed may have been saved in another floating-point dtype than the skeleton's.
        free = name in dense and found.dtype.is_floating_point and spec.dtype.is_floating_point
        if found.shape != spec.shape or (found.dtype != spec.dtype and not free):
            raise ModelError(
                f"tensor {name!r} is {found.shape} {found.dtype} in the saved module, {spec.shape} {spec.dtype} in "
                f"{label}"
            )
    extra = sorted(set(stored) - set(dense) - set(packed))
    if extra:
        raise ModelError(f"the saved module has a tensor {extra[0]!r} that {label} lacks{nearest(extra[0], dense)}")


def _expected(
    module: nn.Module, parts: Mapping[str, nn.Module], description: Description
) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
    """The state dict once the described layers are packed: what stays dense, and what the layouts store."""
    dense = {name: TensorSpec(tuple(value.shape), value.dtype) for name, value in module.state_dict().items()}
    layouts = {id(parts[name]): layout for name, layout in description.formats.items()}
    tied = {id(parts[name]) for name in description.tied}
    packed: dict[str, TensorSpec] = {}
    for name, part in parts.items():
        if id(part) in layouts or id(part) in tied:
            weight = dense.pop(f"{name}.weight")
            if id(part) in layouts:
                kind = layer_kind(part)
                rows, columns = kind.shape(part) if kind is not None else weight.shape
                packed |= {f"{name}.{key}": spec for key, spec in layouts[id(part)].specs(rows, columns).items()}
    return dense, packed


def _pack(module: nn.Module, description: Description) -> None:
    for name, layout in description.formats.items():
        part = module.get_submodule(name)
        if name in description.scaled and isinstance(part, nn.Embedding):
            size = (part.num_embeddings, part.embedding_dim)
            new: nn.Module = PackedEmbedding(layout, *size, part.weight.dtype, description.scaled[name])
        else:
            kind = layer_kind(part)
            assert kind is not None
            new = kind.build(part, layout)
        assert isinstance(new, PackedModule)
        new.take_place_of(part)
        for place in places_of(module, name):
            replace_module(module, place, new)
    for name, leader in description.tied.items():
        source = module.get_submodule(leader)
        assert isinstance(source, PackedModule)
        shared = tied_linear(source, module.get_submodule(name))
        for place in places_of(module, name):
            replace_module(module, place, shared)


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    """Put a tensor at its place in the state dict; a parameter stays one, wherever else it is used."""
    prefix, _, key = name.rpartition(".")
    part = module.get_submodule(prefix)
    old = part._parameters.get(key)
    if old is None:
        part._buffers[key] = value
    elif not old.is_meta and old.dtype == value.dtype:
        old.data = value
    else:
        new = nn.Parameter(value, requires_grad=old.requires_grad and value.is_floating_point())
        for owner in module.modules():
            for other, parameter in owner._parameters.items():
                if parameter is old:
                    owner._parameters[other] = new


def _refuse_meta(module: nn.Module) -> None:
    for name, buffer in module.named_buffers():
        if buffer.is_meta:
            raise ModelError(
                f"buffer {name!r} of {type(module).__name__} is not saved and has no values on the meta device: build "
                "the module on the CPU"
            )
