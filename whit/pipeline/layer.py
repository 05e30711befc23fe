"""One layer: compress its matrix, judge it, let the module compute with the result, or with one that is stored."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from whit.errors import ModelError
from whit.finite import all_finite
from whit.formats.base import Packed, format_from_json
from whit.methods.statistics import LayerStatistics, relative_output_error
from whit.models.packed import PackedModule, places_of, replace_module
from whit.models.source import TensorSource, check_finite
from whit.pipeline.assign import AssignedLayer
from whit.report.record import LayerRecord


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


def data_free(layer: AssignedLayer, module: nn.Module) -> LayerStatistics:
    """Statistics of a layer that no input reaches: as if its inputs were white noise, and no gradient."""
    device = next(module.parameters()).device
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
    if not all_finite(quantised) or math.isnan(error):
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
        module = block.get_submodule(name.removeprefix(prefix + ".") if prefix else name)
        packed = packed_from(tensors, by_name[name]).to(next(module.parameters()).device)
        adopt(layer, module, packed, swaps)


def adopt(layer: AssignedLayer, module: nn.Module, packed: Packed, swaps: Swaps) -> None:
    """Let a module (or its stand-in) compute with a packed weight, which is on the module's device."""
    target = module.weight
    assert isinstance(target, Tensor)
    target.data.copy_(layer.kind.stored(packed.unpack(), target.shape))
    if packed.format.changes_inputs:
        swaps.put(layer, packed)


def packed_from(tensors: dict[str, Tensor], record: LayerRecord) -> Packed:
    """The packed weight of a record among the tensors of its unit."""
    layout = format_from_json(record.format)
    names = layout.specs(record.rows, record.columns)
    return Packed(layout, record.rows, record.columns, {key: tensors[f"{record.name}.{key}"] for key in names})
