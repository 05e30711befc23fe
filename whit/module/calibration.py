"""Calibration of a module in memory: what an item of the user's iterable means, and running the module on it.

An item is read by its type alone:

    Tensor    the one argument: module(item)
    tuple     the positional arguments: module(*item)
    mapping   the keyword arguments: module(**item)
    list      what a `DataLoader` makes of (inputs, labels) samples: its first entry is one of the above, the rest
              is only for the loss

A `forward(module, item)` of the user's own replaces these rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from whit.errors import DataError, WhitError

Forward = Callable[[nn.Module, Any], Any]

RULE = (
    "a Tensor is the one argument, a tuple the positional ones, a dict the keywords, a list [inputs, labels]; "
    "forward=lambda module, item: ... says it otherwise"
)


def read_calibration(calibration: Iterable[Any] | None) -> list[Any]:
    """The items of the user's iterable, which is gone through once.

    Raises:
        DataError: it is one item instead of an iterable of items, or an item is of no kind that can be read.
    """
    if calibration is None:
        return []
    if isinstance(calibration, Tensor | Mapping | str | bytes) or not isinstance(calibration, Iterable):
        raise DataError(f"calibration is an iterable of inputs, got a {type(calibration).__name__}: put it into a list")
    items = list(calibration)
    if not items:
        raise DataError(
            "calibration holds no inputs: a generator that was used up gives none, pass a list or a new one"
        )
    return items


def call(module: nn.Module, item: Any) -> Any:
    """Run a module on an item by the rules above.

    Raises:
        DataError: the item is of no kind that can be read.
    """
    arguments, keywords = arguments_of(item)
    return module(*arguments, **keywords)


def arguments_of(item: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments that an item stands for.

    Raises:
        DataError: the item is of no kind that can be read.
    """
    if isinstance(item, Tensor):
        return (item,), {}
    if isinstance(item, tuple):
        return tuple(item), {}
    if isinstance(item, Mapping) and all(isinstance(key, str) for key in item):
        return (), dict(item)
    if isinstance(item, list) and item:
        return arguments_of(item[0])
    raise DataError(f"a calibration item is a {type(item).__name__}, which cannot be read as inputs: {RULE}")


@dataclass(frozen=True)
class Feed:
    """How items reach the module: by rule or by the user's `forward`, on its device, each with the same randomness in
    every pass.

    Attributes:
        items: as the user gave them.
        forward: (module, item on the device) -> the module's answer.
    """

    items: list[Any]
    forward: Forward
    device: torch.device

    def answer(self, module: nn.Module, index: int, item: Any) -> Any:
        """Run the module on (a part of) item number `index`, which is on the device already.

        Raises:
            DataError: the module refuses the item.
        """
        torch.manual_seed(index)  # the caller's generator is kept aside by `calibrating`
        try:
            return self.forward(module, item)
        except WhitError:
            raise
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(
                f"{type(module).__name__} cannot be run on calibration item {index + 1} ({reason}): {RULE}"
            ) from error

    def on_device(self, index: int) -> Any:
        """Item number `index` on the device of the module.

        Raises:
            DataError: it holds NaN.
        """
        moved = move(self.items[index], self.device)
        if any(bool(tensor.isnan().any()) for tensor in tensors_of(moved) if tensor.is_floating_point()):
            raise DataError(f"calibration item {index + 1} holds NaN: leave it out, or repair the data")
        return moved


@dataclass(frozen=True)
class ItemCall:
    """One item as the block loop sees it: a call whose hidden states are the item itself."""

    feed: Feed
    index: int

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Run the whole module on the item; nothing is handed on."""
        self.feed.answer(block, self.index, self.feed.on_device(self.index))
        return hidden


def move(value: Any, device: torch.device) -> Any:
    """Tensors in (nested) tuples, lists and mappings on a device; everything else as it is."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(move(part, device) for part in value))
    if isinstance(value, tuple | list):
        return type(value)(move(part, device) for part in value)
    if isinstance(value, Mapping):
        return {key: move(part, device) for key, part in value.items()}
    return value


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_of(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors_of(part)


@contextmanager
def calibrating(module: nn.Module, device: torch.device) -> Iterator[None]:
    """The module in evaluation mode; its modes and the caller's random generators are put back afterwards.

    Torch's fused attention and encoder layers are switched off meanwhile: they read weights instead of calling layers,
    which then would have no inputs to be seen.
    """
    modes = [(part, part.training) for part in module.modules()]
    fused = torch.backends.mha.get_fastpath_enabled()
    module.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for part, training in modes:
            part.training = training
