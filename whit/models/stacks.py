"""Finding the repeated blocks of a model by structure: no model family is named here.

A stack is an `nn.ModuleList` or `nn.Sequential` whose children are blocks: modules of one class that hold compressible
matrices (see `layers.py`) below them. Only the outermost such list counts, so experts or sub-layers inside a block are
part of it. Hybrid models, whose list mixes a few block classes, are stacks when the classes recur.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from whit.errors import ModelError
from whit.models.layers import layer_kind


@dataclass(frozen=True)
class Stack:
    """Repeated blocks that follow one another.

    Attributes:
        name: dotted name of the list in the model.
        blocks: dotted names of the blocks, in order.
    """

    name: str
    blocks: tuple[str, ...]


def find_stacks(model: nn.Module) -> list[Stack]:
    """Every outermost stack of blocks, in the order of the model's modules (an encoder before its decoder).

    Raises:
        ModelError: the model has no repeated block.
    """
    stacks = list(_search("", model))
    if not stacks:
        raise ModelError(
            f"{type(model).__name__} has no repeated block (no ModuleList or Sequential of blocks with linear layers "
            "or convolutions), so there is nothing to compress block by block: from Python, "
            "whit.compress(module, method, calibration=...) takes any module in memory"
        )
    return stacks


def _search(name: str, module: nn.Module) -> list[Stack]:
    if _is_stack(module):
        return [Stack(name, tuple(f"{name}.{child}" if name else child for child, _ in module.named_children()))]
    found: list[Stack] = []
    for child, submodule in module.named_children():
        found.extend(_search(f"{name}.{child}" if name else child, submodule))
    return found


def _is_stack(module: nn.Module) -> bool:
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        return False
    children = list(module.children())
    classes = {type(child) for child in children}
    # One class, or (hybrid models) classes that recur. A list that is used once, such as a head, mixes classes.
    recurs = len(classes) == 1 or len(classes) * 2 <= len(children)
    return bool(children) and recurs and all(_is_block(child) for child in children)


def _is_block(module: nn.Module) -> bool:
    if layer_kind(module) is not None or isinstance(module, nn.ModuleList | nn.Sequential):
        return False
    return any(
        layer_kind(submodule) is not None and not isinstance(submodule, nn.Embedding) for submodule in module.modules()
    )
