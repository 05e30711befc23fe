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
from whit.kernels.codebook_plan import (
    CodebookLaunch,
    clusters_at_once,
    codebook_options,
    codebook_source,
    has_codebook_product,
    place_codebook,
    place_codebooks,
)
from whit.kernels.cuda_layout import Layout
from whit.kernels.cuda_linear import op_arguments, usable
from whit.kernels.cuda_ops import (
    BulkWeight,
    Weight,
    aligned,
    build,
    choice,
    counts_bits,
    device_limits,
    operand_of,
    starts_early,
    waits_for_nothing,
    weight_of,
)
from whit.kernels.cuda_plan import Launch, place_gemv
from whit.kernels.cuda_several import (
    MOST,
    BulkTask,
    Chosen,
    Task,
    own_shape,
    place_several,
    placed_several,
    several_key,
    shares,
    tasks_of,
)
from whit.kernels.cuda_shapes import Shape, step_sizes, step_timings
from whit.kernels.cuda_tuned import Tuned, tuned_shapes, tuning_key
from whit.kernels.linear import SeveralProducts, register_several
from whit.kernels.nvrtc import Argument, CompilationError, Kernel, Source, failed, give_up, kernel

MOST_EIGHTS = 8
"""Eights of columns that a thread makes, at most: it keeps them in registers."""


@dataclass(frozen=True)
class Normed:
    """weight * h / sqrt(mean(h^2) + epsilon), h = states + update: (1, columns) each, weight (columns,)."""

    states: Tensor
    update: Tensor | None
    weight: Tensor
    epsilon: float


@dataclass(frozen=True)
class Call:
    """What a kernel is compiled for: `makes` and `add` are INPUT and ADD of `inputs.cuh`."""

    layout: Layout
    rows: tuple[int, ...]
    columns: int
    bfloat: bool
    index: int
    makes: bool
    add: bool

    def options(self, threads: int) -> tuple[str, ...]:
        """Preprocessor options beside those of the product."""
        several = (f"-DSEVERAL={len(self.rows)}",) if len(self.rows) > 1 else ()
        return (*several, *(input_options(self.add, self.columns, threads) if self.makes else ()))


def input_options(add: bool, columns: int, threads: int) -> tuple[str, ...]:
    """Preprocessor options of `inputs.cuh` for a kernel that makes its input."""
    return ("-DINPUT=1", f"-DADD={int(add)}", f"-DEIGHTS={-(-columns // (8 * threads))}")


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


@dataclass(frozen=True)
class _Prepared:
    run: Kernel
    launch: Launch | CodebookLaunch
    parts: tuple[int, ...]  # thread blocks, or clusters, of each weight
    made: int = 0  # bytes for the input beside those of the launch

    def start(self, arguments: list[Argument], early: bool) -> None:
        launch = self.launch
        if isinstance(launch, CodebookLaunch):
            numbers, shared = (launch.passes, launch.rows_each), launch.shared + self.made
            threads, cluster = launch.threads, launch.splits
        else:
            numbers, shared = (launch.chunk, launch.tiles), launch.shared
            threads, cluster = launch.shape.threads, 1
        arguments = [*arguments, *(ctypes.c_int(number) for number in numbers)]
        self.run.launch(launch.grid, threads, shared, arguments, early=early, cluster=cluster)


@lru_cache(maxsize=1024)
def _prepared(call: Call, chosen: tuple[Chosen | None, Tuned | None, Tuned | None]) -> _Prepared | None:
    """The kernel of a call; None where no launch makes its input.

    Args:
        chosen: what one weight of as many rows takes, what tuning found for several, and what it found for a step of
            decoding: with others all is made anew.
    """
    if has_codebook_product(call.layout):
        return _prepared_codebooks(call)
    found, _, step = chosen
    if not isinstance(found, Launch):
        return None
    device, processors, memory = device_limits(call.index)
    early, parts, span = starts_early(call.index), list[int](), call.layout.span(call.columns)
    sizes = (call.columns, processors, memory)
    launch = place_step(call.layout, call.rows, *sizes, step)
    if launch is not None:
        parts = shares(call.rows, processors) if len(call.rows) > 1 else []
    elif len(call.rows) > 1:
        launch, parts = place_several(
            device, call.layout, call.rows, *sizes, binary=counts_bits(call.index), early=early
        )
        if launch.chunk < span:  # a block has its multiprocessor for itself, whatever its shape says
            wider = placed_several(call.layout, call.rows, *sizes, replace(launch.shape, resident=1))
            launch = None if wider is None else replace(wider, grid=launch.grid)
    else:  # every block makes all of the input
        shape = replace(found.shape, share=1)
        launch = place_gemv(call.layout, call.rows[0], *sizes, shape)
        if launch is not None and launch.chunk < span:
            launch = place_gemv(call.layout, call.rows[0], *sizes, replace(shape, resident=1))
    if launch is None or not _holds(call.layout, launch, call.columns):
        return None
    source, options, _ = call_source(call, launch)
    run = kernel(source, "gemv", options, call.index)
    return _Prepared(run, replace(launch, shared=max(launch.shared, alone(memory))), tuple(parts))


def alone(memory: int) -> int:
    """Shared memory, of that which a block may have, with which a block has a multiprocessor for itself.

    Where two fit, kernels with few or small blocks between products make two blocks of one product meet on one
    multiprocessor while another has none.
    """
    return memory // 2


def call_source(call: Call, launch: Launch) -> Source:
    """What the kernel of a call is compiled from."""
    source, _, options, specific = build(call.layout, launch, 1, call.bfloat, starts_early(call.index))
    return source, (*options, *call.options(launch.shape.threads)), specific


def _holds(layout: Layout, launch: Launch, columns: int) -> bool:
    """Whether a block makes all of an input at once."""
    return launch.chunk >= layout.span(columns) and columns <= 8 * launch.shape.threads * MOST_EIGHTS


def place_step(
    layout: Layout, rows: Sequence[int], columns: int, processors: int, memory: int, shape: Tuned | None
) -> Launch | None:
    """The launch of one or several weights in one of the shapes for a step of decoding; None where it cannot be."""
    if not isinstance(shape, Shape) or all(shape not in step_timings(size) for size in step_sizes(layout)):
        return None
    if len(rows) > 1:
        launch = placed_several(layout, rows, columns, processors, memory, shape)
        launch = None if launch is None else replace(launch, grid=sum(shares(rows, processors)))
    else:
        launch = place_gemv(layout, rows[0], columns, processors, memory, shape)
    return launch if launch is not None and _holds(layout, launch, columns) else None


def step_key(layout: Layout, rows: Sequence[int], columns: int) -> str:
    """What a shape found within a step of decoding is filed under."""
    outside = several_key(layout, rows, columns) if len(rows) > 1 else tuning_key(layout, rows[0], columns, 1)
    return f"{outside}/step"


def _chosen(call: Call) -> tuple[Chosen | None, Tuned | None, Tuned | None]:
    if has_codebook_product(call.layout):
        return None, None, None
    found = choice(call.layout, sum(call.rows), call.columns, 1, call.index)
    own = own_shape(call.layout, call.rows, call.columns, call.index) if len(call.rows) > 1 else None
    step = tuned_shapes(device_limits(call.index)[0]).get(step_key(call.layout, call.rows, call.columns))
    return found, own, step if counts_bits(call.index) else None


def _placed_codebooks(call: Call) -> tuple[CodebookLaunch, list[int], int] | None:
    """The launch, clusters of each of several weights, and bytes for the input; None where it does not fit."""
    _, processors, memory = device_limits(call.index)
    made = -(-2 * call.columns // 128) * 128 if call.makes else 0
    room, memory = clusters_at_once(processors, starts_early(call.index)), memory - made
    found: tuple[CodebookLaunch, list[int]] | None
    if len(call.rows) > 1:
        found = place_codebooks(call.layout, call.rows, memory, room)
    else:
        single = place_codebook(call.layout, call.rows[0], memory, room)
        found = None if single is None else (single, [])
    if found is None or (call.makes and call.columns > 8 * found[0].threads * MOST_EIGHTS):
        return None
    return *found, made


def _prepared_codebooks(call: Call) -> _Prepared | None:
    placed = _placed_codebooks(call)
    if placed is None:
        return None
    launch, parts, made = placed
    options = codebook_options(call.layout, launch, call.bfloat, starts_early(call.index))
    run = kernel(codebook_source(), "codebook_product", (*options, *call.options(launch.threads)), call.index)
    return _Prepared(run, launch, tuple(parts), made)


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
    given: Normed | Tensor, weights: Sequence[Packed], bias: Tensor | None = None
) -> tuple[Tensor, list[Tensor]] | None:
    """The products (1, rows) of weights of one layout and an input, which the kernel makes itself if it is `Normed`.

    Args:
        given: 16 bits, on Hopper.
        bias: (rows,) of the one weight, in the type of the input.

    Returns:
        h of `Normed` (`states` where there is no `update`), or the vector given, and the products. None where no kernel
        takes these.
    """
    maker = _MAKERS.get(weights[0].format.name)
    if maker is not None:
        return maker(given, weights, bias)
    call = _call(given, weights, bias)
    if call is None or failed((_KIND, call.layout)):
        return None
    try:
        with torch.cuda.device(call.index):
            prepared = _prepared(call, _chosen(call))
            return None if prepared is None else _launched(prepared, call, given, weights, bias)
    except CompilationError as error:
        give_up((_KIND, call.layout), f"{_KIND} of {weights[0].format}", error)
    return None


Maker = Callable[[Normed | Tensor, Sequence[Packed], Tensor | None], tuple[Tensor, list[Tensor]] | None]
_MAKERS: dict[str, Maker] = {}


def register_maker(format_name: str, maker: Maker) -> None:
    """Offer `products_of` for weights of one format, which kernels of their own multiply."""
    _MAKERS[format_name] = maker


_KIND = "products that make their input"


def input_of(given: Normed | Tensor) -> tuple[Tensor, Argument]:
    """h of `Normed`, where a kernel writes it, or the vector given; and a kernel's argument for either."""
    if isinstance(given, Tensor):
        return given, ctypes.c_void_p(given.data_ptr())
    states, update = given.states, given.update
    total = states if update is None else torch.empty_like(states)
    pointers = (states.data_ptr(), None if update is None else update.data_ptr(), given.weight.data_ptr())
    return total, _Input(*pointers, total.data_ptr(), given.epsilon)


def _launched(
    prepared: _Prepared,
    call: Call,
    given: Normed | Tensor,
    weights: Sequence[Packed],
    bias: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    total, made = input_of(given)
    out = torch.empty(1, sum(call.rows), dtype=total.dtype, device=total.device)
    own = [op_arguments(packed)[0] for packed in weights]
    tensors = [aligned(items) for items in own]
    described = [
        weight_of(call.layout, items, count, call.columns)
        if isinstance(prepared.launch, CodebookLaunch)
        else operand_of(call.layout, prepared.launch.shape, items, count, call.columns)
        for items, count in zip(tensors, call.rows, strict=True)
    ]
    results = list(torch.split(out, list(call.rows), -1))
    arguments: list[Argument]
    if len(weights) == 1:
        shift = None if bias is None else bias.data_ptr()
        arguments = [made, described[0], ctypes.c_void_p(shift), ctypes.c_void_p(out.data_ptr())]
    else:
        arguments = [made, _tasks(prepared, described, results)]
    early = all(waits_for_nothing(call.index, mine, items) for mine, items in zip(own, tensors, strict=True))
    prepared.start(arguments, early)
    return total, results


def _tasks(
    prepared: _Prepared, described: Sequence[Weight | BulkWeight], results: Sequence[Tensor]
) -> ctypes.Structure:
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
    return call is not None and _placed_codebooks(call) is not None


def _together(x: Tensor, weights: Sequence[Packed]) -> list[Tensor]:
    found = products_of(x.reshape(1, -1).contiguous(), weights)
    if found is None:
        raise CompilationError("codebooks cannot be multiplied in one launch")
    return [part.reshape(*x.shape[:-1], part.shape[-1]) for part in found[1]]


register_several("vector-codebook", SeveralProducts("cuda table product", _meets, _together))
