"""Which modules hold a compressible weight matrix, and how to see it as rows = outputs, columns = inputs.

`nn.Linear`, transformers' `Conv1D` (GPT-2: stored transposed) and `nn.Embedding` are known. Exact types only: a
subclass may use its weight in other ways (torch's MultiheadAttention reads `out_proj.weight` directly). One kind of
subclass is recognised by what it does: an embedding that returns its rows times a constant.
"""

from __future__ import annotations

import copy
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
    scale = embedding_scale(module)
    return PackedEmbedding(
        layout, module.num_embeddings, module.embedding_dim, module.weight.dtype, 1.0 if scale is None else scale
    )


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
    if type(module) in _KINDS:
        return _KINDS[type(module)]
    return _KINDS[nn.Embedding] if isinstance(module, nn.Embedding) and embedding_scale(module) is not None else None


def embedding_scale(module: nn.Embedding) -> float | None:
    """c if the module returns c times the rows of its weight, found by trying it on rows of ones; None otherwise."""
    if type(module) is nn.Embedding:
        return 1.0
    trial = copy.copy(module)
    # Shallow: the original keeps its parameter; the copy gets a small real one.
    trial._parameters = {"weight": nn.Parameter(torch.ones(4, module.embedding_dim), requires_grad=False)}
    trial.padding_idx = None
    try:
        out = trial(torch.arange(4))
    except Exception:
        return None
    if not isinstance(out, Tensor) or out.is_meta or out.shape != (4, module.embedding_dim):
        return None
    return float(out[0, 0]) if bool((out == out[0, 0]).all()) else None
