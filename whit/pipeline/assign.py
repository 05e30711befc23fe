"""Who gets which method: every weight matrix of the model is either assigned a method or left alone with a reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import nn

from whit.errors import KnobError, ModelError, nearest
from whit.methods.base import Method
from whit.methods.chain import PruneThenQuantise
from whit.methods.pruning import Pruner
from whit.methods.rtn import RTN
from whit.models.layers import LayerKind, declared_end, embedding_scale, layer_kind, why_not
from whit.models.stacks import Stack
from whit.pipeline.options import RunOptions
from whit.pipeline.recipe import Place, Recipe, Step, steps_for

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

    def widest_sum(self) -> int:
        """Outputs of all layers of a block together: what one position of a forward pass may hold at a time."""
        sums = Counter[str]()
        for layer in self.main():
            sums[layer.block] += layer.rows
        return max(sums.values())

    def main(self) -> list[AssignedLayer]:
        """The layers that bits per weight and sizes are about: those in blocks, or all if none lies in a block."""
        return [layer for layer in self.layers.values() if layer.block] or list(self.layers.values())


def assign(
    model: nn.Module, stacks: Sequence[Stack], recipe: Recipe, options: RunOptions, dtype: torch.dtype
) -> Assignment:
    """Decide for every matrix: layers get the steps of the recipe that name them.

    Embedding and head, unless a step names them, are rounded to nearest at `embedding_bits`.

    Args:
        model: skeleton, parameters may be on the meta device.
        dtype: of weights that stay dense; a layer that would not become smaller than that is left alone.

    Raises:
        KnobError: a pattern of the recipe or of --skip names no layer, two steps cannot follow one another on a layer,
            or a method that needs calibration inputs is meant for a layer outside the blocks.
        ModelError: nothing is left to compress.
    """
    ends, tied = ends_of(model)
    kinds = {name: kind for name, module in model.named_modules() if (kind := layer_kind(module)) is not None}
    blocks = {name: block_of(name, stacks) for name in kinds}
    out = Assignment()
    skipped = {name: pattern for name in kinds if (pattern := first_match(name, options.skip)) is not None}
    _check_patterns(options.skip, set(skipped.values()), list(kinds))
    named = steps_for(recipe, _places(kinds, blocks, stacks, ends, tied))
    for name, kind in kinds.items():
        module = model.get_submodule(name)
        rows, columns = kind.shape(module)
        block = blocks[name]
        if name in skipped:
            out.untouched[name] = f"skipped by {skipped[name]!r}"
            continue
        if name in tied:
            continue
        chosen = combine(name, named[name])
        if chosen is None and name in ends:
            if options.embedding_bits == 16:
                out.untouched[name] = "embedding or head, left alone by --embedding-bits 16"
                continue
            chosen = RTN(bits=options.embedding_bits, group_size=EMBEDDING_GROUP, symmetric=True)
        if chosen is None:
            out.untouched[name] = _reason(kind, block)
            continue
        if chosen.required() and not block:
            raise KnobError(
                f"method {chosen.name!r} needs calibration inputs, but {name!r} lies outside the blocks, where none "
                "are caught: give it a method that needs none, such as rtn"
            )
        if packed_bytes(name, chosen, rows, columns) >= rows * columns * dtype.itemsize:
            out.untouched[name] = "would not become smaller"
        else:
            out.layers[name] = AssignedLayer(name, block, kind, rows, columns, chosen)
            scale = embedding_scale(module) if isinstance(module, nn.Embedding) else None
            if scale not in (None, 1.0):
                out.scaled[name] = scale
    for head, source in tied.items():
        if source in out.layers and head not in out.untouched:
            out.tied[head] = source
        elif source in out.layers:
            del out.layers[source]
            out.untouched[source] = f"shares its weight with {head!r}, which is skipped"
    explain_the_rest(model, out)
    meant = any(named[name] for name, block in blocks.items() if block)
    if not (any(layer.block for layer in out.layers.values()) if meant else out.layers):
        raise ModelError("no layer is left to compress: check --skip, or choose a method with fewer stored bits")
    return out


def combine(name: str, steps: Sequence[Step]) -> Method | None:
    """The method that a layer's steps make together; None if there is none.

    Raises:
        KnobError: steps that cannot follow one another: only one that quantises can, after one that prunes.
    """
    methods = [step.method for step in steps]
    if len(methods) < 2:
        return methods[0] if methods else None
    first, last = methods[0], methods[-1]
    if len(methods) == 2 and isinstance(first, Pruner):
        try:
            return PruneThenQuantise(first, last)
        except KnobError as error:
            raise KnobError(f"{name!r} is pruned and then compressed by the recipe: {error}") from None
    said = " and ".join(method.name for method in methods)
    raise KnobError(
        f"{name!r} is named by more than one step of the recipe ({said}), and only a pruning step can be followed "
        "by another: exclude the layer from all but one"
    )


def packed_bytes(name: str, method: Method, rows: int, columns: int) -> int:
    """Stored bytes of a layer.

    Raises:
        KnobError: the method cannot take a weight of this shape; names the layer.
    """
    try:
        return method.format(rows, columns).bytes(rows, columns)
    except KnobError as error:
        raise KnobError(f"{name!r}: {error}") from None


def block_of(name: str, stacks: Sequence[Stack]) -> str:
    """The block that a module lies in, or ""."""
    blocks = (block for stack in stacks for block in stack.blocks)
    return next((block for block in blocks if name.startswith(block + ".")), "")


def first_match(name: str, patterns: Sequence[str]) -> str | None:
    """The first of some patterns that a name matches."""
    return next((pattern for pattern in patterns if fnmatchcase(name, pattern)), None)


def _reason(kind: LayerKind, block: str) -> str:
    if not block:
        return f"{kind.name} outside the repeated blocks"
    return "embedding in a block" if kind.name == "embedding" else "named by no step of the recipe"


def _places(
    kinds: Mapping[str, LayerKind],
    blocks: Mapping[str, str],
    stacks: Sequence[Stack],
    ends: set[str],
    tied: Mapping[str, str],
) -> dict[str, Place]:
    """Every matrix with the words that mean it; a tied head is another name of its embedding."""
    first = {stack.blocks[0] for stack in stacks}
    last = {stack.blocks[-1] for stack in stacks}
    out = {}
    for name, kind in kinds.items():
        if name in tied:
            continue
        words = set()
        if blocks[name] and kind.name != "embedding":
            words |= {"@blocks"} | ({"@first"} if blocks[name] in first else set())
            words |= {"@last"} if blocks[name] in last else set()
        heads = tuple(head for head, source in tied.items() if source == name)
        if name in ends:
            words |= {"@embedding"} if kind.name == "embedding" else {"@head"}
            words |= {"@head"} if heads else set()
        out[name] = Place((name, *heads), frozenset(words))
    return out


def explain_the_rest(model: nn.Module, out: Assignment) -> None:
    """Say of every other parameter why it stays dense, so that plan and report account for all of them."""
    spoken_for = {f"{name}.weight" for name in [*out.layers, *out.tied, *out.untouched]}
    shared = set(getattr(model, "all_tied_weights_keys", None) or {})
    for name, parameter in model.named_parameters():
        if name in spoken_for or name in shared:
            continue
        owner = model.get_submodule(name.rpartition(".")[0])
        if name.endswith(".bias"):
            out.untouched[name] = "a bias, not a matrix"
        elif parameter.dim() < 2:
            out.untouched[name] = "a vector (norms, scales), not a matrix"
        else:
            out.untouched[name] = (
                why_not(owner) or f"a parameter of {type(owner).__name__}, which holds no known matrix"
            )


def ends_of(model: nn.Module) -> tuple[set[str], dict[str, str]]:
    """Names of the input embedding and output head, and {head: embedding} when they share one weight."""
    names = {id(module): name for name, module in model.named_modules()}
    ends: dict[str, nn.Module] = {}
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        module = declared_end(model, getter)
        if module is not None and id(module) in names and layer_kind(module) is not None:
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
