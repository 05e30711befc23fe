"""Who gets which method: every weight matrix of the model is either assigned a method or left alone with a reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import nn

from whit.errors import KnobError, ModelError, nearest
from whit.methods.base import Method
from whit.methods.rtn import RTN
from whit.models.layers import LayerKind, embedding_scale, layer_kind
from whit.models.stacks import Stack
from whit.pipeline.options import RunOptions

EMBEDDING_GROUP = 64


@dataclass(frozen=True)
class AssignedLayer:
    """A weight matrix and the method that will compress it; `block` is "" outside the blocks."""

    name: str
    block: str
    kind: LayerKind
    rows: int
    columns: int
    method: Method


@dataclass
class Assignment:
    """Decisions for a whole model.

    Attributes:
        layers: by module name, in order of the model.
        untouched: parameter or module name -> why it is left alone.
        tied: output head -> embedding whose packed matrix it shares.
        scaled: embedding -> constant its rows are multiplied by, where that is not 1.
    """

    layers: dict[str, AssignedLayer] = field(default_factory=dict)
    untouched: dict[str, str] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    scaled: dict[str, float] = field(default_factory=dict)

    def of_block(self, block: str) -> dict[str, AssignedLayer]:
        """Layers of one block ("" for those outside)."""
        return {name: layer for name, layer in self.layers.items() if layer.block == block}


def assign(
    model: nn.Module, stacks: Sequence[Stack], method: Method, options: RunOptions, dtype: torch.dtype
) -> Assignment:
    """Decide for every matrix: layers in blocks get `method`, embedding and head round-to-nearest at `embedding_bits`.

    Args:
        model: skeleton, parameters may be on the meta device.
        dtype: of weights that stay dense; a layer that would not become smaller than that is left alone.

    Raises:
        KnobError: a --skip pattern matches nothing.
        ModelError: nothing is left to compress.
    """
    blocks = [block for stack in stacks for block in stack.blocks]
    ends, tied = _ends(model)
    out = Assignment()
    used_patterns: set[str] = set()
    names = [name for name, module in model.named_modules() if layer_kind(module) is not None]
    for name in names:
        module = model.get_submodule(name)
        kind = layer_kind(module)
        assert kind is not None
        rows, columns = kind.shape(module)
        block = next((block for block in blocks if name.startswith(block + ".")), "")
        pattern = next((pattern for pattern in options.skip if fnmatchcase(name, pattern)), None)
        if pattern is not None:
            used_patterns.add(pattern)
            out.untouched[name] = f"skipped by {pattern!r}"
            continue
        if name in tied:
            continue
        chosen: Method | None = None
        if name in ends:
            if options.embedding_bits == 16:
                out.untouched[name] = "embedding or head, left alone by --embedding-bits 16"
                continue
            chosen = RTN(bits=options.embedding_bits, group_size=EMBEDDING_GROUP, symmetric=True)
        elif block and kind.name != "embedding":
            chosen = method
        if chosen is None:
            out.untouched[name] = f"{kind.name} outside the repeated blocks" if not block else "embedding in a block"
        elif chosen.format(rows, columns).bytes(rows, columns) >= rows * columns * dtype.itemsize:
            out.untouched[name] = "would not become smaller"
        else:
            out.layers[name] = AssignedLayer(name, block, kind, rows, columns, chosen)
            scale = embedding_scale(module) if isinstance(module, nn.Embedding) else None
            if scale not in (None, 1.0):
                out.scaled[name] = scale
    _check_patterns(options.skip, used_patterns, names)
    for head, source in tied.items():
        if source in out.layers and head not in out.untouched:
            out.tied[head] = source
        elif source in out.layers:
            del out.layers[source]
            out.untouched[source] = f"shares its weight with {head!r}, which is skipped"
    _explain_the_rest(model, out)
    if not any(layer.block for layer in out.layers.values()):
        raise ModelError("no layer is left to compress: check --skip, or choose a method with fewer stored bits")
    return out


def _explain_the_rest(model: nn.Module, out: Assignment) -> None:
    """Say of every other parameter why it stays dense, so that plan and report account for all of them."""
    spoken_for = {f"{name}.weight" for name in [*out.layers, *out.tied, *out.untouched]}
    shared = set(getattr(model, "all_tied_weights_keys", None) or {})
    for name, parameter in model.named_parameters():
        if name in spoken_for or name in shared:
            continue
        owner = type(model.get_submodule(name.rpartition(".")[0])).__name__
        if name.endswith(".bias"):
            out.untouched[name] = "a bias, not a matrix"
        elif parameter.dim() < 2:
            out.untouched[name] = "a vector (norms, scales), not a matrix"
        else:
            out.untouched[name] = f"a parameter of {owner}, which is no linear layer or embedding"


def _ends(model: nn.Module) -> tuple[set[str], dict[str, str]]:
    """Names of the input embedding and output head, and {head: embedding} when they share one weight."""
    names = {id(module): name for name, module in model.named_modules()}
    ends: dict[str, nn.Module] = {}
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        module = getattr(model, getter)() if hasattr(model, getter) else None
        if isinstance(module, nn.Module) and id(module) in names and layer_kind(module) is not None:
            ends[names[id(module)]] = module
    tied: dict[str, str] = {}
    links = getattr(model, "all_tied_weights_keys", None) or {}
    for target, source in links.items():
        pair = (target.removesuffix(".weight"), source.removesuffix(".weight"))
        kinds = [layer_kind(model.get_submodule(name)) for name in pair if name in names.values()]
        if len(kinds) == 2 and all(kind is not None for kind in kinds):
            head, embedding = sorted(pair, key=lambda name: isinstance(model.get_submodule(name), nn.Embedding))
            tied[head] = embedding
            ends.setdefault(embedding, model.get_submodule(embedding))
    return set(ends), tied


def _check_patterns(patterns: Sequence[str], used: set[str], names: Sequence[str]) -> None:
    for pattern in patterns:
        if pattern not in used:
            raise KnobError(f"--skip {pattern!r} matches no layer{nearest(pattern, names)}")
