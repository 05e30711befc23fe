"""Who gets which method in a module that nobody knows: every linear layer and convolution, or what a recipe names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from whit.errors import KnobError, ModelError, nearest
from whit.methods.base import Method
from whit.models.layers import LayerKind, embedding_scale, layer_kind, why_not
from whit.models.stacks import Stack, find_stacks
from whit.pipeline.assign import (
    AssignedLayer,
    Assignment,
    block_of,
    combine,
    ends_of,
    explain_the_rest,
    first_match,
    packed_bytes,
)
from whit.pipeline.recipe import Place, Recipe, steps_for

NOT_SMALLER = "would not become smaller"


def assign_module(module: nn.Module, recipe: Recipe, skip: Sequence[str]) -> Assignment:
    """Decide for every matrix of a module.

    The words of a recipe: `@blocks` is every linear layer and convolution, in a repeated block or not, but for the
    output head of a model that declares one; `@first` and `@last` are the ends of the stacks of blocks, if there are
    any; `@embedding` is every embedding, `@head` the declared head and what shares its weight with an embedding.

    Raises:
        KnobError: a pattern of the recipe or of `skip` names no layer, two steps cannot follow one another, or a method
            that needs inputs is meant for an embedding.
        ModelError: nothing is left to compress; the message says why of the first layers.
    """
    stacks = _stacks(module)
    kinds = {name: kind for name, part in module.named_modules() if name and (kind := layer_kind(part)) is not None}
    out = Assignment(untouched={name: said for name, part in module.named_modules() if (said := why_not(part))})
    tied = _tied(module, kinds, out)
    skipped = {name: pattern for name in kinds if (pattern := first_match(name, skip)) is not None}
    for pattern in skip:
        if pattern not in skipped.values() and first_match_of(pattern, kinds) is None:
            raise KnobError(f"skip pattern {pattern!r} matches no layer{nearest(pattern, kinds)}")
    named = steps_for(recipe, _places(module, kinds, stacks, tied)) if kinds else {}
    for name, kind in kinds.items():
        if name in tied or name in out.untouched:
            continue
        method = combine(name, named[name])
        shares = next((other for other, leader in tied.items() if leader == name and other in skipped), None)
        if name in skipped or shares is not None:
            reason = (
                f"shares its weight with {shares!r}, which is skipped" if shares else f"skipped by {skipped[name]!r}"
            )
        elif method is None:
            reason = "an embedding that no step names" if kind.name == "embedding" else "named by no step of the recipe"
        else:
            layer = AssignedLayer(name, block_of(name, stacks), kind, *kind.shape(module.get_submodule(name)), method)
            if is_smaller(layer, module):
                _add(layer, module, out)
                continue
            reason = NOT_SMALLER
        out.untouched[name] = reason
    out.tied = {name: leader for name, leader in tied.items() if leader in out.layers}
    for name, leader in tied.items():
        if leader not in out.layers:
            out.untouched[name] = f"shares its weight with {leader!r}, which is left alone"
    explain_the_rest(module, out)
    if not out.layers:
        raise ModelError(nothing_left(module, out))
    return out


def is_smaller(layer: AssignedLayer, module: nn.Module) -> bool:
    """Whether the packed layer takes fewer bytes than the weight it replaces.

    Raises:
        KnobError: the method cannot take a weight of this shape; names the layer.
    """
    weight = module.get_parameter(f"{layer.name}.weight")
    stored = packed_bytes(layer.name, layer.method, layer.rows, layer.columns)
    return stored < weight.numel() * weight.element_size()


def first_match_of(pattern: str, names: Mapping[str, LayerKind]) -> str | None:
    """The first name that a pattern matches."""
    return next((name for name in names if first_match(name, (pattern,)) is not None), None)


def _stacks(module: nn.Module) -> list[Stack]:
    try:
        return find_stacks(module)
    except ModelError:  # no repeated block: every layer stands alone
        return []


def _tied(module: nn.Module, kinds: Mapping[str, LayerKind], out: Assignment) -> dict[str, str]:
    """Layers that share their weight with another: name -> the one whose packed matrix they will use.

    An embedding leads its linear layers; without one the first linear layer does. Layers that read a shared weight in
    another way cannot share a packed matrix: they are left alone.
    """
    groups: dict[int, list[str]] = {}
    for name in kinds:
        groups.setdefault(id(module.get_parameter(f"{name}.weight")), []).append(name)
    tied: dict[str, str] = {}
    for names in groups.values():
        leader = min(names, key=lambda name: kinds[name].name != "embedding")
        others = [name for name in names if name != leader]
        if all(kinds[name].name == "linear" for name in others) and kinds[leader].name in ("linear", "embedding"):
            tied |= dict.fromkeys(others, leader)
        else:
            for name in names if others else ():
                other = next(item for item in names if item != name)
                out.untouched[name] = f"shares its weight with {other!r}, which is no linear layer beside it"
    return tied


def _places(
    module: nn.Module, kinds: Mapping[str, LayerKind], stacks: Sequence[Stack], tied: Mapping[str, str]
) -> dict[str, Place]:
    ends, _ = ends_of(module)
    first, last = {stack.blocks[0] for stack in stacks}, {stack.blocks[-1] for stack in stacks}
    out = {}
    for name, kind in kinds.items():
        if name in tied:
            continue
        followers = tuple(other for other, leader in tied.items() if leader == name)
        block = block_of(name, stacks)
        words = {"@embedding"} if kind.name == "embedding" else {"@head"} if name in ends else {"@blocks"}
        words |= {"@head"} if kind.name == "embedding" and followers else set()
        words |= {"@first"} if block in first else set()
        words |= {"@last"} if block in last else set()
        out[name] = Place((name, *followers), frozenset(words))
    return out


def _add(layer: AssignedLayer, module: nn.Module, out: Assignment) -> None:
    if layer.kind.name == "embedding":
        _refuse_inputs(layer.name, layer.method)
        part = module.get_submodule(layer.name)
        assert isinstance(part, nn.Embedding)
        scale = embedding_scale(part)
        if scale is not None and scale != 1.0:
            out.scaled[layer.name] = scale
    out.layers[layer.name] = layer


def _refuse_inputs(name: str, method: Method) -> None:
    if method.required():
        raise KnobError(
            f"method {method.name!r} needs inputs of the layer, but {name!r} is an embedding, which has none: "
            "give it a method that needs none, such as rtn"
        )


def nothing_left(module: nn.Module, out: Assignment) -> str:
    """The message for a module without a layer to compress: why of the first layers."""
    matrices = [f"{name}: {said}" for name, said in out.untouched.items() if "not a matrix" not in said]
    said = "; ".join(matrices[:3]) or "it holds no linear layer and no convolution"
    if layer_kind(module) is not None:
        said = "it is a single layer: wrap it as nn.Sequential(layer)"
    return f"{type(module).__name__} has no layer to compress ({said})"
