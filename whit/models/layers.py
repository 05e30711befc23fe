"""Which modules hold a compressible weight matrix, and how to see it as rows = outputs, columns = inputs.

`nn.Linear`, `nn.Conv2d` (a matrix over the windows of its image), transformers' `Conv1D` (GPT-2: stored transposed) and
`nn.Embedding` are known. Exact types only: a subclass may use its weight in other ways (torch's MultiheadAttention
reads `out_proj.weight` directly). One kind of subclass is recognised by what it does: an embedding that returns its
rows times a constant.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from transformers.pytorch_utils import Conv1D

from whit.formats.base import Format
from whit.models.convolution import Window
from whit.models.packed import PackedConv2d, PackedEmbedding, PackedLinear


def _no_window(_: nn.Module) -> Window | None:
    return None


@dataclass(frozen=True)
class LayerKind:
    """How one module type stores its matrix and what it multiplies it with.

    Attributes:
        name: for the plan and `whit inspect`.
        transposed: the stored weight is (columns, rows).
        build: (module, format) -> empty packed replacement on the meta device.
        window: the window through which a module sees its input, or None if that is vectors already.
    """

    name: str
    transposed: bool
    build: Callable[[nn.Module, Format], nn.Module]
    window: Callable[[nn.Module], Window | None] = _no_window

    def inputs(self, module: nn.Module, given: Tensor) -> Tensor:
        """What a module was given -> the vectors (..., columns) that meet its matrix."""
        window = self.window(module)
        return given if window is None else window.unfold(given)

    def parts(self, module: nn.Module, given: Tensor) -> tuple[Tensor, ...]:
        """What a module was given, in parts of which `inputs` takes a bounded room."""
        window = self.window(module)
        return (given,) if window is None else window.parts(given)

    def matrix(self, stored: Tensor) -> Tensor:
        """Stored weight (or its gradient) -> (rows, columns)."""
        return stored.T if self.transposed else stored.flatten(1)

    def stored(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """Inverse of `matrix` for a weight stored in `shape`."""
        return matrix.T if self.transposed else matrix.reshape(shape)

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """(rows, columns) of a module, which may be on the meta device."""
        first, *rest = _weight(module).shape
        return (math.prod(rest), first) if self.transposed else (first, math.prod(rest))


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


def _conv2d(module: nn.Module, layout: Format) -> nn.Module:
    assert isinstance(module, nn.Conv2d)
    return PackedConv2d(layout, module.out_channels, module.in_channels, Window.of(module), _bias_dtype(module))


def _window(module: nn.Module) -> Window | None:
    assert isinstance(module, nn.Conv2d)
    return Window.of(module)


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
    nn.Conv2d: LayerKind("convolution", False, _conv2d, _window),
    nn.Embedding: LayerKind("embedding", False, _embedding),
}


def layer_kind(module: nn.Module) -> LayerKind | None:
    """The kind of a module that holds a compressible matrix, or None (`why_not` may say why)."""
    if type(module) in _KINDS:
        return _KINDS[type(module)] if why_not(module) is None else None
    return _KINDS[nn.Embedding] if isinstance(module, nn.Embedding) and embedding_scale(module) is not None else None


def why_not(module: nn.Module) -> str | None:
    """Why a module of a known type holds no matrix that can be packed, or None."""
    if type(module) not in _KINDS:
        return None
    weight = module._parameters.get("weight")
    if weight is None:  # torch.nn.utils: weight_norm, spectral_norm, prune
        return "its weight is computed from other parameters"
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        return f"a convolution in {module.groups} groups: each has inputs of its own, which one matrix cannot hold"
    if isinstance(weight, UninitializedParameter):
        return "its weight has no shape yet"
    return None if weight.is_floating_point() else f"its weight is of dtype {weight.dtype}"


def declared_end(model: nn.Module, getter: str) -> nn.Module | None:
    """What a transformers model says its `get_input_embeddings` or `get_output_embeddings` is, or None.

    Models without an embedding (convolutional networks) raise where others say None.
    """
    try:
        found = getattr(model, getter)() if hasattr(model, getter) else None
    except NotImplementedError:
        return None
    return found if isinstance(found, nn.Module) else None


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
