"""The one op of packed layers, y = transform(x) W^T + b, and the choice of its implementation.

The plain meaning is the format's own (`Format.linear`: by default it unpacks the weight and multiplies). Faster
implementations register themselves with a predicate; the first that supports the call is used. `explain` says which,
and is what `whit inspect` shows. One whose kernel turns out not to compile or launch on this machine is given up for
its format, with one warning, and the next is used.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from whit.formats.base import Packed
from whit.formats.memory import Memory
from whit.kernels.calling import unobserved
from whit.kernels.nvrtc import CompilationError, failed, give_up

FEW_IDS = 64
"""Ids up to which an embedding looks each of them up without asking which are the same."""

Supports = Callable[[Tensor, Packed], bool]
Linear = Callable[[Tensor, Packed, Tensor | None], Tensor]
Run = Callable[[Tensor, Tensor | None], Tensor]
"""(x (vectors, columns), bias), both contiguous and of one type -> (vectors, rows)."""
Prepare = Callable[[Tensor, Packed], Run | None]


@dataclass(frozen=True)
class Implementation:
    """A version of the op.

    Attributes:
        supports: (x, packed); must not synchronise with a device. On a GPU its answer is kept with the weight for x of
            the same type, device, width and `count_class`, without gradients: it must depend on nothing else of x, nor
            on the values of the stored tensors.
        linear: (x, packed, bias) -> y.
        prepare: (x, packed) -> the same product for such x while the stored tensors stay where they are, with all that
            does not change from call to call worked out before; None: there is only `linear`. It may hold the tensors
            and must not hold `packed`, with which it is kept.
    """

    name: str
    supports: Supports
    linear: Linear
    prepare: Prepare | None = None


_IMPLEMENTATIONS: dict[str, list[Implementation]] = {}


def register_implementation(format_name: str, implementation: Implementation) -> None:
    """Offer a faster version for one format; later registrations are asked first."""
    _IMPLEMENTATIONS.setdefault(format_name, []).insert(0, implementation)
    Memory.forget_all()


def choose(x: Tensor, packed: Packed) -> Implementation:
    """The implementation that a call with these arguments uses, asked anew."""
    for candidate in _IMPLEMENTATIONS.get(packed.format.name, ()):
        if candidate.supports(x, packed) and not failed((candidate.name, packed.format)):
            return candidate
    return PLAIN


def explain(x: Tensor, packed: Packed) -> str:
    """Name of the implementation that a call with these arguments uses."""
    return choose(x, packed).name


@dataclass(slots=True)
class _Decision:
    """What multiplies a weight by x of one type, device and size, and what that has prepared, if it does."""

    chosen: Implementation
    prepared: bool = False
    run: Run | None = None

    def ready(self, x: Tensor, packed: Packed) -> Run | None:
        if not self.prepared:
            self.run = None if self.chosen.prepare is None else self.chosen.prepare(x, packed)
            self.prepared = True
        return self.run


def remembers(x: Tensor) -> bool:
    """Whether what is found out for a call is kept with the weight: one on a GPU that nobody traces or derives."""
    return x.is_cuda and unobserved(x) and not (x.requires_grad and torch.is_grad_enabled())


EXACT = 32
"""Numbers of vectors up to which every one is a class of its own."""


def count_class(vectors: int, rows: int, columns: int) -> tuple[int, int]:
    """Numbers of vectors for which whatever supports one supports all: prompts of other lengths ask nothing anew.

    Above `EXACT`, versions are chosen by powers of two, which are classes of their own, as are the numbers between two;
    but where a matrix could have more numbers than 32 bits count, every number of vectors is one.
    """
    if vectors <= EXACT or vectors * max(rows, columns) >= 2**29:
        return vectors, 0
    return vectors.bit_length(), (vectors - 1).bit_length()


def _remembered(x: Tensor, packed: Packed) -> _Decision | None:
    columns = packed.columns
    if columns == 0 or x.shape[-1:] != (columns,) or not remembers(x):
        return None
    answers = packed.memory.of(packed.tensors)
    question = (x.dtype, x.get_device(), *count_class(x.numel() // columns, packed.rows, columns))
    known: _Decision | None = answers.get(question)
    if known is None:
        known = answers[question] = _Decision(choose(x, packed))
    return known


def packed_linear(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """y = transform(x) W^T + b.

    Args:
        x: (..., columns), any float dtype, on the device of the packed tensors.
        packed: weight of `rows` x `columns`.
        bias: (rows,) or None.

    Returns:
        (..., rows) in the dtype of x.
    """
    decision = _remembered(x, packed)
    chosen = choose(x, packed) if decision is None else decision.chosen
    if chosen is PLAIN:
        return packed.linear(x, bias)
    if bias is not None and bias.requires_grad and torch.is_grad_enabled():  # kernels have no derivative, a sum has
        return packed_linear(x, packed) + bias.to(x.dtype)
    try:
        run = None if decision is None else decision.ready(x, packed)
        if run is None:
            return chosen.linear(x, packed, bias)
        if bias is not None and (bias.dtype != x.dtype or not bias.is_contiguous()):
            bias = bias.to(x.dtype).contiguous()
        if x.dim() == 2 and x.is_contiguous():
            return run(x, bias)
        return run(x.reshape(-1, packed.columns).contiguous(), bias).reshape(*x.shape[:-1], packed.rows)
    except CompilationError as error:
        give_up((chosen.name, packed.format), f"products of {packed.format} by {chosen.name!r}", error)
    return packed_linear(x, packed, bias)


RunSeveral = Callable[[Tensor], list[Tensor]]


@dataclass(frozen=True)
class SeveralProducts:
    """A version of the op for several weights of one format and one x, without bias; `supports` as above.

    `prepare`: as of `Implementation`, (x, weights) -> (x (vectors, columns)) -> products; may hold no weight either.
    `tune`: (x, weights, seconds) tries every launch, timed by `seconds`, uses and keeps the fastest; returns how many
    could be launched. None where there is nothing to choose.
    """

    name: str
    supports: Callable[[Tensor, Sequence[Packed]], bool]
    products: Callable[[Tensor, Sequence[Packed]], list[Tensor]]
    tune: Callable[[Tensor, Sequence[Packed], Callable[[], float]], int] | None = None
    prepare: Callable[[Tensor, Sequence[Packed]], RunSeveral | None] | None = None


_SEVERAL: dict[str, list[SeveralProducts]] = {}


def register_several(format_name: str, version: SeveralProducts) -> None:
    """Offer a faster version for one format; later registrations are asked first."""
    _SEVERAL.setdefault(format_name, []).insert(0, version)
    Memory.forget_all()


def choose_several(x: Tensor, weights: Sequence[Packed]) -> SeveralProducts | None:
    """The version that multiplies all of these at once, or None."""
    names = {packed.format.name for packed in weights}
    for candidate in _SEVERAL.get(names.pop(), ()) if len(names) == 1 else ():
        if candidate.supports(x, weights) and not failed((candidate.name, weights[0].format, "several")):
            return candidate
    return None


@dataclass(frozen=True)
class Preparation:
    """Another form of the weights of a format, which products on a device read faster than what is stored.

    `supports(packed, dtype)`: whether this weight has it where it lies, for inputs of a type. `prepare(weights)`: that
    of several weights which meet the same input, alike in layout so that one launch may take them. `bits(packed)`:
    what it takes per weight, at least.
    """

    name: str
    supports: Callable[[Packed, torch.dtype], bool]
    prepare: Callable[[Sequence[Packed]], list[Packed]]
    bits: Callable[[Packed], float]


_PREPARATIONS: dict[str, Preparation] = {}


def register_preparation(format_name: str, preparation: Preparation) -> None:
    """Offer another form for the weights of one format."""
    _PREPARATIONS[format_name] = preparation


def preparation_of(weights: Sequence[Packed], dtype: torch.dtype) -> Preparation | None:
    """The form that these weights, which meet the same input of a type, may be held in while they are multiplied."""
    names = {packed.format.name for packed in weights}
    found = _PREPARATIONS.get(names.pop()) if len(names) == 1 else None
    return found if found is not None and all(found.supports(packed, dtype) for packed in weights) else None


LooksUp = Callable[[Tensor, Packed, torch.dtype], bool]
LookUp = Callable[[Tensor, Packed, torch.dtype], Tensor]
_LOOK_UPS: dict[str, list[tuple[LooksUp, LookUp]]] = {}


def register_look_up(format_name: str, supports: LooksUp, look_up: LookUp) -> None:
    """Offer a faster embedding for one format, (ids, packed, dtype) -> rows; later registrations are asked first."""
    _LOOK_UPS.setdefault(format_name, []).insert(0, (supports, look_up))


@dataclass(slots=True)
class _JointDecision:
    """The same for several weights; the first remembers it, and the answers of the others are those that it saw."""

    chosen: SeveralProducts | None
    others: list[dict[Hashable, Any]]
    prepared: bool = False
    run: RunSeveral | None = None

    def ready(self, x: Tensor, weights: Sequence[Packed]) -> RunSeveral | None:
        if not self.prepared:
            if self.chosen is not None and self.chosen.prepare is not None:
                self.run = self.chosen.prepare(x, weights)
            self.prepared = True
        return self.run


def _remembered_several(x: Tensor, weights: Sequence[Packed]) -> _JointDecision | None:
    first, columns = weights[0], weights[0].columns
    if columns == 0 or x.shape[-1:] != (columns,) or not remembers(x):
        return None
    answers = first.memory.of(first.tensors)
    others = [packed.memory.of(packed.tensors) for packed in weights[1:]]
    widest = max([packed.rows for packed in weights])
    question = (len(weights), x.dtype, x.get_device(), *count_class(x.numel() // columns, widest, columns))
    known: _JointDecision | None = answers.get(question)
    if known is None or any(mine is not seen for mine, seen in zip(others, known.others, strict=True)):
        known = answers[question] = _JointDecision(choose_several(x, weights), others)
    return known


def several_products(x: Tensor, weights: Sequence[Packed]) -> list[Tensor] | None:
    """x W_i^T for each weight, by the version for all at once; None where there is none, or it fails."""
    decision = _remembered_several(x, weights)
    chosen = choose_several(x, weights) if decision is None else decision.chosen
    if chosen is None:
        return None
    try:
        run = None if decision is None else decision.ready(x, weights)
        if run is None or x.dim() != 2 or not x.is_contiguous():
            return chosen.products(x, weights)
        return run(x)
    except CompilationError as error:
        layout = weights[0].format
        give_up((chosen.name, layout, "several"), f"joint products of {layout} by {chosen.name!r}", error)
    return several_products(x, weights)


def packed_embedding(ids: Tensor, packed: Packed, dtype: torch.dtype) -> Tensor:
    """Rows `ids` (any shape, integer) of the packed matrix: (*ids.shape, columns) in `dtype`."""
    for supports, look_up in _LOOK_UPS.get(packed.format.name, ()):
        if supports(ids, packed, dtype):
            return look_up(ids, packed, dtype)
    if ids.is_cuda and ids.numel() <= FEW_IDS:  # finding duplicates would wait for the device
        table = packed.format.unpack_rows(packed.tensors, packed.rows, packed.columns, ids.reshape(-1))
        return table.to(dtype).view(*ids.shape, packed.columns)
    flat, inverse = torch.unique(ids, return_inverse=True)
    table = packed.format.unpack_rows(packed.tensors, packed.rows, packed.columns, flat)
    return table.to(dtype)[inverse]


def _plain_linear(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    return packed.linear(x, bias)


PLAIN = Implementation("plain", lambda x, packed: True, _plain_linear)
