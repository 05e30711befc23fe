"""The one op of packed layers, y = transform(x) W^T + b, and the choice of its implementation.

The plain meaning is the format's own (`Format.linear`: by default it unpacks the weight and multiplies). Faster
implementations register themselves with a predicate; the first that supports the call is used. `explain` says which,
and is what `whit inspect` shows. One whose kernel turns out not to compile or launch on this machine is given up for
its format, with one warning, and the next is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from whit.formats.base import Packed
from whit.kernels.nvrtc import CompilationError, failed, give_up

FEW_IDS = 64
"""Ids up to which an embedding looks each of them up without asking which are the same."""

Supports = Callable[[Tensor, Packed], bool]
Linear = Callable[[Tensor, Packed, Tensor | None], Tensor]


@dataclass(frozen=True)
class Implementation:
    """A version of the op: `supports(x, packed)` must be cheap and must not synchronise with a device."""

    name: str
    supports: Supports
    linear: Linear


_IMPLEMENTATIONS: dict[str, list[Implementation]] = {}


def register_implementation(format_name: str, implementation: Implementation) -> None:
    """Offer a faster version for one format; later registrations are asked first."""
    _IMPLEMENTATIONS.setdefault(format_name, []).insert(0, implementation)


def choose(x: Tensor, packed: Packed) -> Implementation:
    """The implementation `packed_linear` will use for this call."""
    for candidate in _IMPLEMENTATIONS.get(packed.format.name, ()):
        if candidate.supports(x, packed) and not failed((candidate.name, packed.format)):
            return candidate
    return PLAIN


def explain(x: Tensor, packed: Packed) -> str:
    """Name of the implementation that a call with these arguments uses."""
    return choose(x, packed).name


def packed_linear(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """y = transform(x) W^T + b.

    Args:
        x: (..., columns), any float dtype, on the device of the packed tensors.
        packed: weight of `rows` x `columns`.
        bias: (rows,) or None.

    Returns:
        (..., rows) in the dtype of x.
    """
    chosen = choose(x, packed)
    if chosen is PLAIN:
        return packed.linear(x, bias)
    if bias is not None and bias.requires_grad and torch.is_grad_enabled():  # kernels have no derivative, a sum has
        return packed_linear(x, packed) + bias.to(x.dtype)
    try:
        return chosen.linear(x, packed, bias)
    except CompilationError as error:
        give_up((chosen.name, packed.format), f"products of {packed.format} by {chosen.name!r}", error)
    return packed_linear(x, packed, bias)


@dataclass(frozen=True)
class SeveralProducts:
    """A version of the op for several weights of one format and one x, without bias; `supports` as above.

    `tune`: (x, weights, seconds) tries every launch, timed by `seconds`, uses and keeps the fastest; returns how many
    could be launched. None where there is nothing to choose.
    """

    name: str
    supports: Callable[[Tensor, Sequence[Packed]], bool]
    products: Callable[[Tensor, Sequence[Packed]], list[Tensor]]
    tune: Callable[[Tensor, Sequence[Packed], Callable[[], float]], int] | None = None


_SEVERAL: dict[str, list[SeveralProducts]] = {}


def register_several(format_name: str, version: SeveralProducts) -> None:
    """Offer a faster version for one format; later registrations are asked first."""
    _SEVERAL.setdefault(format_name, []).insert(0, version)


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

    `supports(packed)`: whether this weight has it where it lies. `prepare(weights)`: that of several weights which
    meet the same input, alike in layout so that one launch may take them. `bits(packed)`: what it takes per weight, at
    least.
    """

    name: str
    supports: Callable[[Packed], bool]
    prepare: Callable[[Sequence[Packed]], list[Packed]]
    bits: Callable[[Packed], float]


_PREPARATIONS: dict[str, Preparation] = {}


def register_preparation(format_name: str, preparation: Preparation) -> None:
    """Offer another form for the weights of one format."""
    _PREPARATIONS[format_name] = preparation


def preparation_of(weights: Sequence[Packed]) -> Preparation | None:
    """The form that these weights, which meet the same input, may be held in while they are multiplied, or None."""
    names = {packed.format.name for packed in weights}
    found = _PREPARATIONS.get(names.pop()) if len(names) == 1 else None
    return found if found is not None and all(map(found.supports, weights)) else None


LooksUp = Callable[[Tensor, Packed, torch.dtype], bool]
LookUp = Callable[[Tensor, Packed, torch.dtype], Tensor]
_LOOK_UPS: dict[str, list[tuple[LooksUp, LookUp]]] = {}


def register_look_up(format_name: str, supports: LooksUp, look_up: LookUp) -> None:
    """Offer a faster embedding for one format, (ids, packed, dtype) -> rows; later registrations are asked first."""
    _LOOK_UPS.setdefault(format_name, []).insert(0, (supports, look_up))


def several_products(x: Tensor, weights: Sequence[Packed]) -> list[Tensor] | None:
    """x W_i^T for each weight, by the version for all at once; None where there is none, or it fails."""
    chosen = choose_several(x, weights)
    if chosen is None:
        return None
    try:
        return chosen.products(x, weights)
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
