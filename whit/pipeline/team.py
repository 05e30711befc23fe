"""The layers of a block divided among processes: each compresses some, and all get every result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict

import torch
from torch import nn

from whit.formats.base import Packed, format_from_json
from whit.methods.statistics import LayerStatistics
from whit.models.source import TensorSource
from whit.pipeline.assign import AssignedLayer
from whit.pipeline.layer import Swaps, adopt, compress_layer
from whit.pipeline.ranks import Ranks, spread
from whit.report.record import LayerRecord


class Team:
    """Compresses layers, each on one of the processes, and lets all of them have the result.

    Attributes:
        packed: packed weights by full module name. records: of the same layers, in order.
    """

    def __init__(
        self,
        layers: Mapping[str, AssignedLayer],
        modules: Mapping[str, nn.Module],
        source: TensorSource,
        swaps: Swaps,
        done: Callable[[LayerRecord], None],
        ranks: Ranks,
    ) -> None:
        self.packed: dict[str, Packed] = {}
        self.records: list[LayerRecord] = []
        self._layers, self._modules, self._source, self._swaps = layers, modules, source, swaps
        self._done, self._ranks = done, ranks

    @contextmanager
    def dividing(self, names: Sequence[str]) -> Iterator[Callable[..., None]]:
        """A function (name, statistics, notes) that compresses those of `names` which fall to this process.

        At the end of the context every process has all of them, in the order of the names.
        """
        owners = dict(zip(names, spread([_cost(self._layers[name]) for name in names], self._ranks.count), strict=True))
        mine: dict[str, tuple[Packed, LayerRecord]] = {}

        def compress(name: str, statistics: LayerStatistics, notes: Sequence[str] = ()) -> None:
            if owners.get(name) != self._ranks.rank:
                return
            layer, module = self._layers[name], self._modules[name]
            mine[name] = compress_layer(layer, module, self._source, statistics, self._swaps, notes)
            if self._ranks.count == 1:
                self._done(mine[name][1])

        if self._ranks.count == 1:
            yield compress
        else:
            with self._ranks.together():
                yield compress
        shared = self._ranks.gather([asdict(record) for _, record in mine.values()])
        found = {item["name"]: LayerRecord(**item) for items in shared for item in items}
        for name in names:
            record = mine[name][1] if name in mine else found[name]
            self.packed[name] = self._receive(record, owners[name], mine[name][0] if name in mine else None)
            self.records.append(record)
            if self._ranks.count > 1:
                self._done(record)

    def _receive(self, record: LayerRecord, owner: int, mine: Packed | None) -> Packed:
        """The packed weight (on the CPU) that one process made, put into the module of every other."""
        if self._ranks.count == 1 and mine is not None:
            return mine
        layout = format_from_json(record.format)
        device = self._ranks.device
        specs = layout.specs(record.rows, record.columns)
        with self._ranks.together():
            if mine is None:
                tensors = {key: torch.empty(spec.shape, dtype=spec.dtype, device=device) for key, spec in specs.items()}
            else:
                tensors = {key: mine.tensors[key].to(device).contiguous() for key in specs}
        for tensor in tensors.values():
            self._ranks.broadcast(tensor, owner)
        packed = Packed(layout, record.rows, record.columns, tensors)
        if mine is None:
            adopt(self._layers[record.name], self._modules[record.name], packed, self._swaps)
        return packed.to("cpu")


def _cost(layer: AssignedLayer) -> float:
    """Of compressing a layer, in no unit: small steps for every column, products of the weight with a matrix of its
    inputs, and the inverse of that; weighted as BiLLM's layers of a 7B take on an H200.
    """
    return layer.columns * (1 + 1e-8 * layer.rows * layer.columns + 3e-9 * layer.columns**2)
