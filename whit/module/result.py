"""What `whit.compress` gives back for a module in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from whit.models.names import persistent_buffers
from whit.report.record import LayerRecord


@dataclass(frozen=True)
class CompressedModule:
    """A compressed module and what became of its layers.

    Attributes:
        module: the module with packed layers; use it, save it (`whit.save`), move it as any other.
        layers: one record per compressed weight, in the order of the module: method, format, stored bytes, errors.
        untouched: parameter or module name -> why it is left alone.
        parameters: of the original, shared ones once.
        original_bytes: of all its parameters and persistent buffers, shared ones once.
        stored_bytes: the same of the compressed module: packed tensors and everything left dense.
    """

    module: nn.Module
    layers: list[LayerRecord]
    untouched: dict[str, str]
    parameters: int
    original_bytes: int
    stored_bytes: int

    @property
    def compressed_bits(self) -> float:
        """Stored bits per weight of the compressed layers: packed bytes x 8 / weights."""
        return sum(layer.stored_bytes for layer in self.layers) * 8 / sum(layer.parameters for layer in self.layers)

    @property
    def bits(self) -> float:
        """Stored bits per parameter of the whole module: stored bytes x 8 / parameters of the original."""
        return self.stored_bytes * 8 / self.parameters

    def __str__(self) -> str:
        """One line per compressed layer, then the sum."""
        width = max(len(layer.name) for layer in self.layers)
        lines = [
            f"{layer.name:<{width}}  {layer.rows} x {layer.columns}  {layer.format['format']}"
            f"  {layer.stored_bits:.3f} bits  error {layer.error:.3g}"
            for layer in self.layers
        ]
        total = (
            f"{len(self.layers)} layers in {self.compressed_bits:.3f} stored bits per weight, "
            f"{len(self.untouched)} parts left alone; module {self.original_bytes:,} -> {self.stored_bytes:,} bytes "
            f"({self.bits:.3f} bits per parameter)"
        )
        return "\n".join([*lines, total])


def held_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and persistent buffers, each tensor counted once."""
    return sum({id(tensor): tensor.numel() * tensor.element_size() for tensor in _held(module)}.values())


def _held(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    for name in persistent_buffers(module):
        yield module.get_buffer(name)
