"""Products of a decoding step with one vector, which can make their input themselves, a normalisation.

The kernels of `cuda_linear`, `cuda_several` and `codebook`, compiled with INPUT (`cuda/inputs.cuh`): every thread block
makes the whole input from what the kernel before left, which takes less time than a kernel between the two would. What
they compute is what `add_rms_norm` and a product do, with the same roundings. Several weights of
one layout meet the input in one launch, each with thread blocks, and perhaps a codebook, of its own.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from whit.formats.base import Packed
from whit.kernels.codebook_plan import CodebookLaunch, has_codebook_product
from whit.kernels.cuda_linear import op_arguments, usable
from whit.kernels.cuda_ops import (
    BulkWeight,
    Weight,
    aligned,
    operand_of,
    starts_early,
    waits_for_nothing,
    weight_of,
)
from whit.kernels.cuda_plan import Launch
from whit.kernels.cuda_several import MOST, BulkTask, Task, tasks_of
from whit.kernels.cuda_step import Call, Prepared, chosen_for, placed_codebooks, prepared_kernel
from whit.kernels.linear import SeveralProducts, register_several
from whit.kernels.nvrtc import Argument, CompilationError, failed, give_up


@dataclass(frozen=True)
class Normed:
    """weight * h / sqrt(mean(h^2) + epsilon), h = states + update: (1, columns) each, weight (columns,)."""

    states: Tensor
    update: Tensor | None
    weight: Tensor
    epsilon: float


class _Input(ctypes.Structure):
    _fields_ = (
        ("states", ctypes.c_void_p),
        ("update", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("sum", ctypes.c_void_p),
        ("epsilon", ctypes.c_float),
    )


class _Clusters(ctypes.Structure):
    _fields_ = (("weight", Weight), ("y", ctypes.c_void_p), ("first", ctypes.c_int))


@lru_cache(maxsize=MOST)
def _clusters_of(count: int) -> type[ctypes.Structure]:
    return type("_Several", (ctypes.Structure,), {"_fields_": (("of", _Clusters * count),)})


def makes_input(given: Normed | Tensor, bias: Tensor | None) -> bool:
    """Whether kernels take one vector or what it is made of: 16-bit tensors alike, on Hopper; a bias of that type."""
    vectors = [given] if isinstance(given, Tensor) else [given.states, given.weight]
    if isinstance(given, Normed) and given.update is not None:
        vectors.append(given.update)
    x = vectors[0]
    if x.device.type != "cuda" or (bias is not None and (bias.dtype != x.dtype or not bias.is_contiguous())):
        return False  # others convert a bias
    if x.numel() != x.shape[-1] or x.shape[-1] % 8 or not starts_early(x.device.index):  # measured on Hopper alone
        return False
    if any(item.dtype != x.dtype or item.data_ptr() % 16 or item.device != x.device for item in vectors):
        return False
    return all(item.numel() == x.numel() and item.stride(-1) == 1 for item in vectors)


def _call(given: Normed | Tensor, weights: Sequence[Packed], bias: Tensor | None) -> Call | None:
    """None where no kernel takes these."""
    x = given if isinstance(given, Tensor) else given.states
    if not 1 <= len(weights) <= MOST or (bias is not None and len(weights) > 1) or not makes_input(given, bias):
        return None
    add = isinstance(given, Normed) and given.update is not None
    layouts = [usable(x, packed) for packed in weights]
    layout = layouts[0]
    if layout is None or any(other != layout for other in layouts):
        return None
    if not (layout.multiplies or has_codebook_product(layout)):
        return None
    rows = tuple(packed.rows for packed in weights)
    return Call(
        layout, rows, weights[0].columns, x.dtype == torch.bfloat16, x.device.index, isinstance(given, Normed), add
    )


def products_of(
    given: Normed | Tensor, weights: Sequence[Packed], bias: Tensor | None = None, *, gated: bool = False
) -> tuple[Tensor, list[Tensor]] | None:
    """The products (1, rows) of weights of one layout and an input, which the kernel makes itself if it is `Normed`.

    Args:
        given: 16 bits, on Hopper.
        bias: (rows,) of the one weight, in the type of the input.
        gated: of two weights of as many rows, the product of the second times the SiLU of that of the first.

    Returns:
        h of `Normed` (`states` where there is no `update`), or the vector given, and the products. None where no kernel
        takes these.
    """
    maker = _MAKERS.get(weights[0].format.name)
    if maker is not None:
        return None if gated else maker(given, weights, bias)
    call = _call(given, weights, bias)
    kind = _GATED if gated else _KIND
    if call is None or failed((kind, call.layout)):
        return None
    if gated:
        if has_codebook_product(call.layout):
            return None
        call = replace(call, gated=True)
    try:
        with torch.cuda.device(call.index):
            prepared = prepared_kernel(call, chosen_for(call))
            return None if prepared is None else _launched(prepared, call, given, weights, bias)
    except CompilationError as error:
        give_up((kind, call.layout), f"{kind} of {weights[0].format}", error)
    return None


Maker = Callable[[Normed | Tensor, Sequence[Packed], Tensor | None], tuple[Tensor, list[Tensor]] | None]
_MAKERS: dict[str, Maker] = {}


def register_maker(format_name: str, maker: Maker) -> None:
    """Offer `products_of` for weights of one format, which kernels of their own multiply."""
    _MAKERS[format_name] = maker


_KIND = "products that make their input"
_GATED = "gated products"


def input_of(given: Normed | Tensor) -> tuple[Tensor, Argument]:
    """h of `Normed`, where a kernel writes it, or the vector given; and a kernel's argument for either."""
    if isinstance(given, Tensor):
        return given, ctypes.c_void_p(given.data_ptr())
    states, update = given.states, given.update
    total = states if update is None else torch.empty_like(states)
    pointers = (states.data_ptr(), None if update is None else update.data_ptr(), given.weight.data_ptr())
    return total, _Input(*pointers, total.data_ptr(), given.epsilon)


def _launched(
    prepared: Prepared,
    call: Call,
    given: Normed | Tensor,
    weights: Sequence[Packed],
    bias: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    total, made = input_of(given)
    out = torch.empty(1, call.rows[0] if call.gated else sum(call.rows), dtype=total.dtype, device=total.device)
    own = [op_arguments(packed)[0] for packed in weights]
    tensors = [aligned(items) for items in own]
    described = [
        weight_of(call.layout, items, count, call.columns)
        if isinstance(prepared.launch, CodebookLaunch)
        else operand_of(call.layout, prepared.launch.shape, items, count, call.columns)
        for items, count in zip(tensors, call.rows, strict=True)
    ]
    results = [out, out] if call.gated else list(torch.split(out, list(call.rows), -1))
    arguments: list[Argument]
    if len(weights) == 1:
        shift = None if bias is None else bias.data_ptr()
        arguments = [made, described[0], ctypes.c_void_p(shift), ctypes.c_void_p(out.data_ptr())]
    else:
        arguments = [made, _tasks(prepared, described, results)]
    early = all(waits_for_nothing(call.index, mine, items) for mine, items in zip(own, tensors, strict=True))
    prepared.start(arguments, early)
    return total, results[:1] if call.gated else results


def _tasks(prepared: Prepared, described: Sequence[Weight | BulkWeight], results: Sequence[Tensor]) -> ctypes.Structure:
    """Weights, results and thread blocks of each, as the kernel with SEVERAL takes them."""
    launch, first = prepared.launch, 0
    table = isinstance(launch, CodebookLaunch)
    bulk = isinstance(launch, Launch) and launch.shape.bulk
    tasks = _clusters_of(len(described))() if table else tasks_of(len(described), bulk)()
    for number, (weight, result, share) in enumerate(zip(described, results, prepared.parts, strict=True)):
        common = (weight, result.data_ptr(), first)
        own = _Clusters(*common) if table else (BulkTask if bulk else Task)(*common, share)
        tasks.of[number] = own
        first += share
    return tasks


def _meets(x: Tensor, weights: Sequence[Packed]) -> bool:
    call = _call(x.reshape(1, -1).contiguous(), weights, None) if len(weights) > 1 else None
    return call is not None and placed_codebooks(call) is not None


def _together(x: Tensor, weights: Sequence[Packed]) -> list[Tensor]:
    found = products_of(x.reshape(1, -1).contiguous(), weights)
    if found is None:
        raise CompilationError("codebooks cannot be multiplied in one launch")
    return [part.reshape(*x.shape[:-1], part.shape[-1]) for part in found[1]]


register_several("vector-codebook", SeveralProducts("cuda table product", _meets, _together))
