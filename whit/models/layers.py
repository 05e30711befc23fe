"""Which modules hold a compressible weight matrix, and how to see it as rows = outputs, columns = inputs.

`nn.Linear`, transformers' `Conv1D` (GPT-2: stored transposed) and `nn.Embedding` are known. Exact types only: a
subclass may use its weight in other ways (torch's MultiheadAttention reads `out_proj.weight` directly).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from whit.formats.base import Format
from whit.models.packed import PackedEmbedding, PackedLinear


@dataclass(frozen=True)
class LayerKind:
    """How one module type stores its matrix.

    Attributes:
        name: for the plan and `whit inspect`.
        transposed: the stored weight is (columns, rows).
        build: (module, format) -> empty packed replacement on the meta device.
    """

    name: str
    transposed: bool
    build: Callable[[nn.Module, Format], nn.Module]

    def matrix(self, stored: Tensor) -> Tensor:
        """Stored weight -> (rows, columns)."""
        return stored.T if self.transposed else stored

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """(rows, columns) of a module, which may be on the meta device."""
        first, second = _weight(module).shape
        return (second, first) if self.transposed else (first, second)


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _linear(module: nn.Module, layout: Format) -> nn.Module:
    assert isinstance(module, nn.Linear)
    return PackedLinear(layout, module.out_features, module.in_features, _bias_dtype(module))


def _conv1d(module: nn.Module, layout: Format) -> nn.Module:
    columns, rows = _weight(module).shape
    return PackedLinear(layout, rows, columns, _bias_dtype(module))


def _embedding(module: nn.Module, layout: Format) -> nn.Module:
    assert isinstance(module, nn.Embedding)
    return PackedEmbedding(layout, module.num_embeddings, module.embedding_dim, module.weight.dtype)


def _bias_dtype(module: nn.Module) -> torch.dtype | None:
    bias = getattr(module, "bias", None)
    return bias.dtype if isinstance(bias, Tensor) else None


_KINDS: dict[type[nn.Module], LayerKind] = {
    nn.Linear: LayerKind("linear", False, _linear),
    Conv1D: LayerKind("conv1d", True, _conv1d),
    nn.Embedding: LayerKind("embedding", False, _embedding),
}


def layer_kind(module: nn.Module) -> LayerKind | None:
    """The kind of a module that holds a compressible matrix, or None."""
    return _KINDS.get(type(module))
