"""Compressing a module in memory, as a story: read the inputs, assign, look at the dense module, compress, replace.

The work is done by the parts of the block loop, to which the whole module is one block and each calibration item one
call of it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from whit.errors import DataError, ModelError
from whit.formats.base import Packed
from whit.methods.base import Method
from whit.methods.statistics import Statistic
from whit.models.integration import WhitConfig, untie_packed
from whit.models.packed import PackedModule, packed_modules, places_of, replace_module, tied_linear
from whit.models.source import InMemorySource
from whit.module.assign import assign_module, nothing_left
from whit.module.calibration import Feed, Forward, ItemCall, calibrating, call, read_calibration
from whit.module.gradients import Loss, loss_gradients
from whit.module.result import CompressedModule, held_bytes
from whit.module.survey import divide_budgets
from whit.pipeline.assign import Assignment
from whit.pipeline.block import Streams, compress_block
from whit.pipeline.events import Listener
from whit.pipeline.layer import Swaps
from whit.pipeline.recipe import Recipe, as_recipe
from whit.report.record import LayerRecord


def compress_module(
    module: nn.Module,
    method: str | Method | Recipe,
    *,
    calibration: Iterable[Any] | None = None,
    loss: Loss | None = None,
    forward: Forward | None = None,
    skip: Sequence[str] = (),
    true_sequential: bool = False,
    in_place: bool = False,
    listener: Listener | None = None,
    **knobs: Any,
) -> CompressedModule:
    """Compress a module in memory (`whit.compress` with a module as its first argument).

    Args:
        module: any module; linear layers and convolutions are packed, embeddings if a recipe names them.
        method: name (with `knobs`), a method value, or a recipe (`whit.Recipe`).
        calibration: inputs of the module, gone through once and kept; methods that need no inputs need none. An item
            is a Tensor (the one argument), a tuple (positional arguments), a mapping (keyword arguments) or a list
            (what a `DataLoader` gives: inputs first, the rest is for the loss). Tensors are moved to the module's
            device, never cast.
        loss: (output, item) -> scalar Tensor, for methods that need gradients.
        forward: (module, item) -> output, in place of the rules for items.
        skip: patterns (fnmatch) of layer names to leave alone.
        true_sequential: measure a layer with all layers before it compressed, at one pass over the calibration inputs
            for each group of layers with the same input; by default every layer is measured in the original module, in
            one pass, which holds the statistics of all layers at a time.
        in_place: change `module` itself, without a copy. If this fails on the way, layers that were finished hold
            their compressed values.
        listener: told about each layer.

    Returns:
        the compressed module, in the same training mode, and its records. Layers that the inputs never reach are
        compressed without data, and their records say so.

    Raises:
        KnobError: unknown method, knob or pattern.
        DataError: the method needs inputs or a loss that were not given, or the inputs do not fit the module.
        ModelError: the module has no values (meta device), nothing to compress, or weights that are not finite.
    """
    recipe = as_recipe(method, knobs)
    listener = listener or Listener()
    _check(module)
    items = read_calibration(calibration)
    subject = module if in_place else _copied(module)
    assignment = assign_module(subject, recipe, skip)
    _check_given(assignment, items, loss)
    parameters = sum(parameter.numel() for parameter in subject.parameters())
    original_bytes = held_bytes(subject)
    device = next(subject.parameters()).device
    feed = Feed(items, forward or call, device)
    with calibrating(subject, device):
        packed, records = _compress(subject, assignment, feed, loss, true_sequential, listener)
    _replace(subject, assignment, packed, device)
    order = list(assignment.layers)
    return CompressedModule(
        subject,
        sorted(records, key=lambda record: order.index(record.name)),
        assignment.untouched,
        parameters,
        original_bytes,
        held_bytes(subject),
    )


def _compress(
    module: nn.Module,
    assignment: Assignment,
    feed: Feed,
    loss: Loss | None,
    true_sequential: bool,
    listener: Listener,
) -> tuple[dict[str, Packed], list[LayerRecord]]:
    """Everything that is done on the module in evaluation mode; its weights hold the compressed values afterwards."""
    source = InMemorySource(dict(module.named_parameters(remove_duplicate=False)))
    wanted = Statistic.GRADIENT
    differentiated = {
        name: layer
        for name, layer in assignment.layers.items()
        if wanted in layer.method.required() | layer.method.survey_required()
    }
    gradients: dict[str, Tensor] = {}
    if differentiated and loss is not None:
        gradients, independent = loss_gradients(module, differentiated, feed, loss)
        for name in independent:
            del assignment.layers[name]
            assignment.untouched[name] = "the loss does not depend on it, so it has no gradient"
    calls = [[ItemCall(feed, index)] for index in range(len(feed.items))]
    streams = Streams([torch.empty(0) for _ in calls], calls)
    divide_budgets(module, assignment, streams, gradients)
    if not assignment.layers:
        raise ModelError(nothing_left(module, assignment))
    listener.phase("compression", len(assignment.layers))
    if not any(layer.method.required() for layer in assignment.layers.values()):
        streams = Streams([], [])
    return compress_block(
        module,
        assignment.layers,
        "",
        source,
        streams,
        true_sequential=true_sequential,
        done=listener.layer,
        swaps=Swaps(module, ""),
        gradients=gradients,
    )


def _replace(module: nn.Module, assignment: Assignment, packed: Mapping[str, Packed], device: torch.device) -> None:
    """Put packed modules in place of the compressed layers, wherever they are used."""
    swaps = Swaps(module, "")  # never undone; layers that round their inputs were swapped during calibration
    for name, item in packed.items():
        if not isinstance(module.get_submodule(name), PackedModule):
            swaps.put(assignment.layers[name], item.to(device))
    for name, leader in assignment.tied.items():
        source, original = module.get_submodule(leader), module.get_submodule(name)
        assert isinstance(source, PackedModule)
        for place in places_of(module, name):
            replace_module(module, place, tied_linear(source, original))
    config = getattr(module, "config", None)
    if hasattr(module, "save_pretrained") and config is not None:  # so that transformers can save and load it
        config.quantization_config = WhitConfig.of(
            {name: item.format for name, item in packed.items()}, assignment.tied, assignment.scaled
        )
        untie_packed(module)


def _check(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise ModelError(f"parameter {name!r} has no shape yet: run the module once on an input, then compress it")
        if parameter.is_meta:
            raise ModelError(
                f"parameter {name!r} is on the meta device and has no values: load weights into the module first"
            )
    if packed_modules(module):
        raise ModelError(
            f"{type(module).__name__} holds packed layers already ({next(iter(packed_modules(module)))!r}): "
            "compress the original"
        )


def _check_given(assignment: Assignment, items: list[Any], loss: Loss | None) -> None:
    """Refuse, before any work, methods that need what was not given.

    Raises:
        DataError: no calibration inputs, or no loss.
    """
    for layer in assignment.layers.values():
        needed = layer.method.required() | layer.method.survey_required()
        if needed and not items:
            raise DataError(
                f"method {layer.method.name!r} needs inputs of the layers: pass calibration=[...], inputs of the module"
            )
        if Statistic.GRADIENT in needed and loss is None:
            raise DataError(
                f"method {layer.method.name!r} needs gradients: pass loss=lambda output, item: ... "
                "that returns the scalar loss of one calibration item"
            )


def _copied(module: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(module)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{type(module).__name__} cannot be copied ({reason}): pass in_place=True") from error
