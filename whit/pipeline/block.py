"""One block: gather statistics, compress its layers, put the compressed values back, return what must be stored."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from whit.errors import ModelError
from whit.formats.base import Packed, format_from_json
from whit.methods.statistics import LayerStatistics, Statistic, relative_output_error
from whit.models.packed import PackedModule, places_of, replace_module
from whit.models.source import TensorSource, check_finite
from whit.pipeline.assign import AssignedLayer
from whit.pipeline.gather import find_groups, gathering
from whit.report.record import LayerRecord

UNREACHED = "the calibration inputs never reached this layer: compressed without data"


class Runnable(Protocol):
    """One call of a block, as `Call` is: everything but the hidden states is known."""

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Call the block on `hidden`; returns the new hidden states."""
        ...


@dataclass
class Streams:
    """Hidden states entering a block and its calls, one entry per batch; `propagate` replaces `hidden`."""

    hidden: list[Tensor]
    calls: Sequence[Sequence[Runnable]]


class Swaps:
    """Modules of a block that were replaced by packed ones, because their format also rounds its inputs: the rest of
    the model must then be calibrated on what the packed layer really gives. `undo` puts the originals back."""

    def __init__(self, block: nn.Module, prefix: str) -> None:
        self._block = block
        self._prefix = prefix
        self._originals: dict[str, nn.Module] = {}

    def put(self, layer: AssignedLayer, packed: Packed) -> None:
        """Let the block run `packed` (on the block's device) in place of a layer, wherever it is used."""
        name = layer.name.removeprefix(self._prefix + ".") if self._prefix else layer.name
        module = self._block.get_submodule(name)
        running = layer.kind.build(module, packed.format)
        assert isinstance(running, PackedModule)
        running.set_packed(packed)
        running.take_place_of(module)
        for place in places_of(self._block, name):
            self._originals.setdefault(place, module)
            replace_module(self._block, place, running)

    def undo(self) -> None:
        """Put every replaced module back."""
        for name, module in self._originals.items():
            replace_module(self._block, name, module)
        self._originals.clear()


def propagate(block: nn.Module, streams: Streams) -> None:
    """Run all batches through a finished block, in place."""
    with torch.no_grad():
        for index, calls in enumerate(streams.calls):
            for call in calls:
                streams.hidden[index] = call.run(block, streams.hidden[index])


def compress_block(
    block: nn.Module,
    layers: dict[str, AssignedLayer],
    prefix: str,
    source: TensorSource,
    streams: Streams,
    *,
    true_sequential: bool,
    done: Callable[[LayerRecord], None],
    swaps: Swaps,
    gradients: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Packed], list[LayerRecord]]:
    """Compress the assigned layers of a block; its modules hold the compressed values afterwards.

    Args:
        block: materialised in the compute dtype.
        layers: by full module name, all under `prefix`.
        true_sequential: gather statistics again before each group of layers, so that later layers of the block see the
            earlier ones compressed; otherwise once for all, as the published BiLLM code does.
        done: told about each layer.
        swaps: holds the modules that run packed until it is undone.
        gradients: G of the dense model by full module name, float32 (rows, columns), for methods that need it; a layer
            without one took part in no forward pass of the dense model and is compressed without data.

    Returns:
        packed weights by full module name, and their records.
    """
    modules = {name: block.get_submodule(name.removeprefix(prefix + ".")) for name in layers}

    groups = group_layers(block, modules, streams)
    reached = {name for group in groups for name in group}
    unreached = [name for name in layers if name not in reached or not _has_gradient(layers[name], gradients or {})]
    packed: dict[str, Packed] = {}
    records: list[LayerRecord] = []
    for part in [[group] for group in groups] if true_sequential else [groups]:
        needs = {group: _needs(layers[name] for name in group) for group in part}
        calls = sum(len(item) for item in streams.calls)
        with gathering(part, modules, needs, calls) as statistics:
            if any(needs.values()):
                _run_copies(block, streams)
        for group in part:
            for name in group:
                if name in unreached:
                    continue
                mine = statistics[group]
                if Statistic.GRADIENT in layers[name].method.required() and gradients:
                    mine = mine.with_gradient(gradients[name].to(_device(modules[name])))
                packed[name], record = compress_layer(layers[name], modules[name], source, mine, swaps)
                records.append(record)
                done(record)
            statistics[group].release()
    for name in unreached:
        noise = data_free(layers[name], modules[name])
        notes = (UNREACHED,) if layers[name].method.required() else ()
        packed[name], record = compress_layer(layers[name], modules[name], source, noise, swaps, notes)
        records.append(record)
        done(record)
    return packed, records


def _needs(layers: Iterable[AssignedLayer]) -> frozenset[Statistic]:
    """What the methods of a group need; errors that second moments cannot tell are measured on a sample of inputs."""
    out: frozenset[Statistic] = frozenset()
    for layer in layers:
        required = layer.method.required()
        changes_inputs = layer.method.format(layer.rows, layer.columns).changes_inputs
        judged = required and (changes_inputs or Statistic.SECOND_MOMENT not in required)
        out |= required | ({Statistic.SAMPLE} if judged else frozenset())
    return out


def group_layers(block: nn.Module, modules: dict[str, nn.Module], streams: Streams) -> list[tuple[str, ...]]:
    """Layers by shared inputs; batches are tried until every layer was reached, for blocks that route their inputs."""
    groups: list[tuple[str, ...]] = []
    waiting = dict(modules)
    for hidden, calls in zip(streams.hidden, streams.calls, strict=True):

        def run_once(call: Runnable = calls[0], hidden: Tensor = hidden) -> None:
            with torch.no_grad():
                call.run(block, hidden)

        found = find_groups(run_once, waiting)
        groups += found
        for name in (name for group in found for name in group):
            del waiting[name]
        if not waiting:
            break
    return groups


def _run_copies(block: nn.Module, streams: Streams) -> None:
    """Run all batches through the block without changing the streams."""
    with torch.no_grad():
        for hidden, calls in zip(streams.hidden, streams.calls, strict=True):
            out = hidden
            for call in calls:
                out = call.run(block, out)


def _has_gradient(layer: AssignedLayer, gradients: Mapping[str, Tensor]) -> bool:
    return layer.name in gradients or Statistic.GRADIENT not in layer.method.required()


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def data_free(layer: AssignedLayer, module: nn.Module) -> LayerStatistics:
    """Statistics of a layer that no input reaches: as if its inputs were white noise, and no gradient."""
    device = _device(module)
    ones = torch.ones(layer.columns, device=device)
    return LayerStatistics(
        layer.columns,
        0,
        torch.eye(layer.columns, device=device),
        square_sums=ones / 2,
        absolute_maximum=ones,
    )


def _full_precision(layer: AssignedLayer, loaded: Tensor, source: TensorSource) -> Tensor:
    """The weight as the source stores it, in float32; read again only if the module was loaded in another dtype."""
    name = f"{layer.name}.weight"
    if source.dtype(name) == loaded.dtype:
        check_finite(name, loaded)
        return loaded.detach().to(torch.float32, copy=True)  # the module gets the compressed values later
    weight = source.load(name).to(loaded.device)  # as it is stored, widened there: half the way
    check_finite(name, weight)
    return weight.float()


def compress_layer(
    layer: AssignedLayer,
    module: nn.Module,
    source: TensorSource,
    statistics: LayerStatistics,
    swaps: Swaps,
    notes: Sequence[str] = (),
) -> tuple[Packed, LayerRecord]:
    """Compress one matrix read from `source` at full precision and let `module` (or its stand-in) compute with it."""
    target = module.weight
    assert isinstance(target, Tensor)
    weight = layer.kind.matrix(_full_precision(layer, target, source)).contiguous()
    start = time.perf_counter()
    result = layer.method.compress(weight, statistics)
    seconds = time.perf_counter() - start
    quantised = result.packed.unpack()
    error = layer_error(weight, quantised, result.packed, statistics)
    if not bool(torch.isfinite(quantised).all()) or math.isnan(error):
        raise ModelError(
            f"method {layer.method.name!r} produced NaN or Inf for {layer.name!r}: raise its damping, if any, and "
            "check the model's weights and the calibration inputs for very large values"
        )
    target.data.copy_(layer.kind.stored(quantised, target.shape))
    if result.packed.format.changes_inputs:
        swaps.put(layer, result.packed)
    record = LayerRecord(
        name=layer.name,
        block=layer.block,
        rows=layer.rows,
        columns=layer.columns,
        method=layer.method.to_json(),
        format=result.packed.format.to_json(),
        stored_bytes=result.packed.stored_bytes(),
        error=error,
        weight_error=relative_output_error(weight, quantised, None),
        seconds=seconds,
        notes=[*notes, *result.notes],
        details=dict(result.details),
    )
    return result.packed.to("cpu"), record


def layer_error(weight: Tensor, quantised: Tensor, packed: Packed, statistics: LayerStatistics) -> float:
    """||Y - Y'||^2 / ||Y||^2 of the layer's outputs.

    From the second moments of all calibration inputs where only the weight changes; otherwise by running the packed
    layer on a sample of the inputs; of the weights alone where nothing is known of the inputs.
    """
    if statistics.sample is not None and (packed.format.changes_inputs or statistics.second_moment is None):
        exact = statistics.sample @ weight.T
        difference = packed.linear(statistics.sample) - exact
        below = exact.square().sum()
        return float(difference.square().sum() / below) if float(below) > 0 else float(difference.square().sum())
    return relative_output_error(weight, quantised, statistics.second_moment)


def restore_layers(
    block: nn.Module,
    prefix: str,
    layers: dict[str, AssignedLayer],
    records: Sequence[LayerRecord],
    tensors: dict[str, Tensor],
    swaps: Swaps,
) -> None:
    """Write the stored values of an already finished unit into its modules (continuing an interrupted run)."""
    by_name = {record.name: record for record in records}
    for name, layer in layers.items():
        target = block.get_submodule(name.removeprefix(prefix + ".") if prefix else name).weight
        assert isinstance(target, Tensor)
        packed = packed_from(tensors, by_name[name]).to(target.device)
        target.data.copy_(layer.kind.stored(packed.unpack(), target.shape))
        if packed.format.changes_inputs:
            swaps.put(layer, packed)


def packed_from(tensors: dict[str, Tensor], record: LayerRecord) -> Packed:
    """The packed weight of a record among the tensors of its unit."""
    layout = format_from_json(record.format)
    names = layout.specs(record.rows, record.columns)
    return Packed(layout, record.rows, record.columns, {key: tensors[f"{record.name}.{key}"] for key in names})
