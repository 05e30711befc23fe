"""Catching the inputs of repeated blocks once, without running the blocks.

The parent's forward is run with every block replaced by a stand-in that records its arguments and hands its hidden
states through unchanged. That yields, per calibration batch, the hidden states that enter the first block and, for each
block in order of execution, all other arguments (masks, rotary tables, encoder states; these may differ from block to
block). Nothing here knows a model family: a shared block called twelve times is twelve calls of one block, and a
decoder that attends to an encoder is caught after the encoder is done, with the encoder's result replayed.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from whit.errors import ModelError
from whit.models.packed import replace_module


@dataclass(frozen=True)
class Call:
    """One call of one block: its name and all arguments but the hidden states.

    Attributes:
        slot: where the hidden states go: an index into `arguments` or a keyword.
    """

    block: str
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    slot: int | str

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Call the block on `hidden`; returns the new hidden states."""
        out = self._raw(block, hidden)
        return out if isinstance(out, Tensor) else out[0]

    def returns_tuple(self, block: nn.Module, hidden: Tensor) -> bool:
        """Whether the block wraps its hidden states in a tuple."""
        with torch.no_grad():
            return not isinstance(self._raw(block, hidden), Tensor)

    def _raw(self, block: nn.Module, hidden: Tensor) -> Any:
        arguments, keywords = list(self.arguments), dict(self.keywords)
        if isinstance(self.slot, int):
            arguments[self.slot] = hidden
        else:
            keywords[self.slot] = hidden
        return block(*arguments, **keywords)


@dataclass
class Caught:
    """What one batch brings to a stack of blocks: entering hidden states and the calls in order of execution."""

    hidden: Tensor
    calls: list[Call]


class _Stop(Exception):  # noqa: N818 - control flow, not an error
    """Raised to leave the parent's forward once the last call is recorded."""


@dataclass
class _Log:
    """Shared state of the stand-ins of one forward pass."""

    expected: int | None
    as_tuple: bool
    hidden: Tensor | None = None
    last: Tensor | None = None
    version: int = 0
    calls: list[Call] = field(default_factory=list)


class _Disguise(nn.Module):
    """Looks like the block it replaces, attributes included."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self._wrapped = (block,)  # in a tuple: not registered as a child

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._wrapped[0], name)


class _StandIn(_Disguise):
    """Only records."""

    def __init__(self, name: str, block: nn.Module, log: _Log) -> None:
        super().__init__(block)
        self._name = name
        self._log = log

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        log = self._log
        slot = _hidden_slot(self._wrapped[0], arguments, keywords)
        hidden = arguments[slot] if isinstance(slot, int) else keywords[slot]
        if log.hidden is None:
            log.hidden = hidden
        elif log.last is None or hidden is not log.last or log.last._version != log.version:
            raise ModelError(
                f"between repeated blocks, before {self._name!r}, the model changes the hidden states; "
                "whit can only stream blocks that feed each other directly"
            )
        # A key-value cache would grow with every call, and a call would see what earlier ones left in it.
        arguments = tuple(None if isinstance(item, Cache) else item for item in arguments)
        keywords = {key: None if isinstance(item, Cache) else item for key, item in keywords.items()}
        if isinstance(slot, int):
            kept: tuple[Any, ...] = (*arguments[:slot], None, *arguments[slot + 1 :])
            log.calls.append(Call(self._name, kept, keywords, slot))
        else:
            log.calls.append(Call(self._name, arguments, {k: v for k, v in keywords.items() if k != slot}, slot))
        # A copy is a new object with its own version counter: the next stand-in can tell it from a tensor that the
        # parent computed or changed in place, and nothing the parent does to it reaches what was recorded.
        log.last = hidden.clone()
        log.version = log.last._version
        if log.expected is not None and len(log.calls) == log.expected:
            raise _Stop
        return (log.last,) if log.as_tuple else log.last


class _Replay(_Disguise):
    """For a block of a finished stack: passes hidden states on; the last call returns the stack's result."""

    def __init__(self, block: nn.Module, state: dict[str, Any]) -> None:
        super().__init__(block)
        self._state = state

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        state = self._state
        state["seen"] += 1
        slot = _hidden_slot(self._wrapped[0], arguments, keywords)
        hidden = arguments[slot] if isinstance(slot, int) else keywords[slot]
        out = state["result"] if state["seen"] == state["calls"] else hidden
        return (out,) if state["as_tuple"] else out


class _Halt(nn.Module):
    """Stands in for a block of a later stack: reaching it ends the catch."""

    def forward(self, *_: Any, **__: Any) -> Any:
        raise _Stop


@dataclass
class Finished:
    """A stack that is done: its blocks, calls per forward, whether blocks return tuples, and results per batch."""

    blocks: Sequence[str]
    calls: int
    as_tuple: bool
    results: list[Tensor]


def _hidden_slot(block: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> int | str:
    """Where a block's hidden states are: its first parameter, given by position or by name."""
    if arguments:
        return 0
    for name in inspect.signature(block.forward).parameters:
        if isinstance(keywords.get(name), Tensor):
            return name
    raise ModelError(f"a block of type {type(block).__name__} is called without a tensor of hidden states")


class CallCatcher:
    """Catches the calls of one stack of blocks for any number of batches.

    The first batch is run through the whole parent to learn how many calls a forward makes; later ones stop there.

    Args:
        model: skeleton whose parameters outside the blocks are loaded.
        blocks: names of the stack's blocks.
        as_tuple: the blocks return tuples.
        finished: stacks that run before this one.
        later: blocks of stacks that run after this one; the catch ends there.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[str],
        *,
        as_tuple: bool,
        finished: Sequence[Finished] = (),
        later: Sequence[str] = (),
    ) -> None:
        self._model = model
        self._blocks = list(blocks)
        self.as_tuple = as_tuple
        self._finished = list(finished)
        self._later = list(later)
        self._expected: int | None = None
        self._shared: list[Call] = []

    def first_call(self, batch: dict[str, Tensor]) -> Caught | None:
        """Only the first call of a forward: used to learn what the blocks return. None if they are never called."""
        log = self._run(batch, 0, 1)
        return None if log.hidden is None else Caught(log.hidden, log.calls)

    def catch(self, batch: dict[str, Tensor], index: int) -> Caught:
        """Run batch number `index` up to the last call of the blocks.

        Raises:
            ModelError: this batch does not call the blocks as the first one did.
        """
        log = self._run(batch, index, self._expected)
        names = [call.block for call in log.calls]
        if log.hidden is None or (self._shared and names != [call.block for call in self._shared]):
            raise ModelError(
                f"calibration input {index + 1} calls {len(names)} blocks of {self._blocks[0]!r}, ... in another way "
                "than the first: give inputs that all take the same way through the model"
            )
        self._expected = len(names)
        return Caught(log.hidden, self._deduplicate(log.calls))

    def _run(self, batch: dict[str, Tensor], index: int, expected: int | None) -> _Log:
        log = _Log(expected, self.as_tuple)
        stand_ins: dict[str, nn.Module] = {
            name: _StandIn(name, self._model.get_submodule(name), log) for name in self._blocks
        }
        stand_ins |= _replays(self._model, self._finished, index)
        stand_ins |= {name: _Halt() for name in self._later}
        with _standing_in(self._model, stand_ins), torch.no_grad():
            try:
                self._model(**batch, **without_cache(self._model))
            except _Stop:
                pass
            except Exception:
                # Blocks may change the shape of what they hand on (the stages of a convolutional network), which their
                # stand-ins do not: what follows the last of them cannot run then, and need not.
                if {call.block for call in log.calls} != set(self._blocks):
                    raise
        return log

    def _deduplicate(self, calls: list[Call]) -> list[Call]:
        """Reuse tensors of the first batch that are equal (masks, rotary tables), so memory does not grow with them."""
        if not self._shared:
            self._shared = calls
            return calls
        out = []
        known: dict[tuple[int, int], Any] = {}  # blocks are mostly given the very same tensors
        for call, first in zip(calls, self._shared, strict=True):
            pairs = zip(call.arguments, first.arguments, strict=False)
            arguments = tuple(_share(new, old, known) for new, old in pairs)
            keywords = {key: _share(value, first.keywords.get(key), known) for key, value in call.keywords.items()}
            out.append(Call(call.block, arguments, keywords, call.slot))
        return out


def answer_of(model: nn.Module, batch: Mapping[str, Tensor], finished: Sequence[Finished], index: int) -> Any:
    """Run the whole parent on batch number `index` with finished stacks replayed; gradients flow into their results."""
    with _standing_in(model, _replays(model, finished, index)):
        return model(**batch, **without_cache(model))


def without_cache(model: nn.Module) -> dict[str, bool]:
    """Keyword that switches a key-value cache off, for models that take one: it would cost memory for nothing."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def _replays(model: nn.Module, finished: Sequence[Finished], index: int) -> dict[str, nn.Module]:
    out: dict[str, nn.Module] = {}
    for stack in finished:
        state = {"seen": 0, "calls": stack.calls, "as_tuple": stack.as_tuple, "result": stack.results[index]}
        out |= {name: _Replay(model.get_submodule(name), state) for name in stack.blocks}
    return out


@contextmanager
def _standing_in(model: nn.Module, stand_ins: Mapping[str, nn.Module]) -> Iterator[None]:
    """Blocks replaced by others, and put back whatever happens."""
    originals = {name: model.get_submodule(name) for name in stand_ins}
    try:
        for name, stand_in in stand_ins.items():
            replace_module(model, name, stand_in)
        yield
    finally:
        for name, block in originals.items():
            replace_module(model, name, block)


def _share(new: Any, old: Any, known: dict[tuple[int, int], Any]) -> Any:
    """`old` where the two are equal tensors, within tuples likewise; `known` keeps what was compared before."""
    if isinstance(new, tuple) and isinstance(old, tuple) and len(new) == len(old):
        return tuple(_share(a, b, known) for a, b in zip(new, old, strict=True))
    if not isinstance(new, Tensor) or not isinstance(old, Tensor):
        return new
    key = (id(new), id(old))  # all of them live until the batch is dealt with
    if key not in known:
        same = new.shape == old.shape and new.dtype == old.dtype and bool(torch.equal(new, old))
        known[key] = old if same else new
    return known[key]
