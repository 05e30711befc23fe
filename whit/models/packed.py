"""Packed modules: what a compressed layer becomes. They hold the stored tensors and no float copy of the weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from whit.formats.base import Format, Packed
from whit.kernels import packed_embedding, packed_linear
from whit.models.convolution import Window

_PREPARED = "prepared_"


class PackedModule(nn.Module):
    """Buffers named after the format's tensors, plus the logical shape.

    `.half()`, `.to(torch.bfloat16)` and the like move a packed module between devices but never change the dtype of
    what is stored: float16 scales rounded to bfloat16 would no longer be the compressed model.
    """

    def __init__(self, layout: Format, rows: int, columns: int) -> None:
        super().__init__()
        self.format = layout
        self.rows = rows
        self.columns = columns
        self._stored = tuple(layout.specs(rows, columns))
        self._packed: Packed | None = None
        self._prepared: Packed | None = None
        self._prepared_from: Mapping[str, Tensor] = {}
        for name, spec in layout.specs(rows, columns).items():
            self.register_buffer(name, torch.empty(spec.shape, dtype=spec.dtype))

    @property
    def packed(self) -> Packed:
        """The compressed weight as it is stored (tensors shared, not copied); in host memory while it is `prepared`."""
        known, buffers = self._packed, self._buffers
        if known is not None:
            for name, tensor in known.tensors.items():
                if buffers[name] is not tensor:
                    break
            else:
                return known
        # Checking shapes and dtypes costs as much as a small layer: once for the same tensors.
        tensors = {name: cast(Tensor, buffers[name]) for name in self._stored}
        known = self._packed = Packed(self.format, self.rows, self.columns, tensors)
        return known

    @property
    def weight(self) -> Tensor:
        """The weight, float32 (rows, columns), unpacked anew at each access: to look at, not for the forward."""
        return self.running.unpack()

    @property
    def running(self) -> Packed:
        """The weight in the form in which it is multiplied: as stored, or as `run_as` has set it.

        A stored tensor that was put in another's place meanwhile counts (`torch.func.functional_call` does that).
        """
        prepared, buffers = self._prepared, self._buffers
        if prepared is None:
            return self.packed
        for name, tensor in self._prepared_from.items():
            if buffers[name] is not tensor:
                return self.packed.to(next(iter(prepared.tensors.values())).device)
        return prepared

    def run_as(self, prepared: Packed) -> None:
        """Multiply by the same weight in another form from now on (`whit.kernels.linear.Preparation`).

        Its tensors are buffers that no file gets. What is stored waits in host memory, so that a device holds one form
        only and a saved model has the bytes that it was loaded from; whatever moves the module, or loads a weight into
        it, brings it back first. What is written into a stored tensor in place has no effect until then.

        Raises:
            ValueError: it has another shape.
        """
        if (prepared.rows, prepared.columns) != (self.rows, self.columns):
            raise ValueError(f"layer is {self.extra_repr()}, weight is {prepared.rows} x {prepared.columns}")
        if self._prepared is None:
            for name in self._stored:
                self._buffers[name] = cast(Tensor, self._buffers[name]).cpu()
        self._forget()
        for name, tensor in prepared.tensors.items():
            self.register_buffer(_PREPARED + name, tensor, persistent=False)
        self._prepared, self._prepared_from = prepared, self.packed.tensors

    def run_as_stored(self) -> None:
        """Give up another form: multiply by the stored weight, on the device of that form."""
        if self._prepared is None:
            return
        device = next(iter(self._prepared.tensors.values())).device
        for name in self._stored:
            self._buffers[name] = cast(Tensor, self._buffers[name]).to(device)
        self._forget()

    def _forget(self) -> None:
        """Hold nothing but the buffers of what is stored."""
        for name in self._prepared.tensors if self._prepared is not None else ():
            delattr(self, _PREPARED + name)
        self._packed = self._prepared = None
        self._prepared_from = {}

    def set_packed(self, packed: Packed) -> None:
        """Take over the tensors of a packed weight of the same layout and shape."""
        if (packed.format, packed.rows, packed.columns) != (self.format, self.rows, self.columns):
            raise ValueError(
                f"layer is {self.extra_repr()}, weight is {packed.format} {packed.rows} x {packed.columns}"
            )
        self.run_as_stored()
        for name, tensor in packed.tensors.items():
            setattr(self, name, tensor)
        self._packed = None  # or the tensors before would stay in memory

    def take_place_of(self, module: nn.Module) -> None:
        """Take over bias, training mode and forward hooks (the user's handles go on working) of the original."""
        _take_place(self, module)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.run_as_stored()
        stored = set(self._stored)

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if any(tensor is self._buffers.get(name) for name in stored) and moved.dtype != tensor.dtype:
                return tensor.to(moved.device)
            return moved

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        self._packed = None  # or the tensors of another device would stay in memory
        return self

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        self.run_as_stored()
        super()._load_from_state_dict(*arguments, **keywords)

    def extra_repr(self) -> str:
        """Shape, layout and honest bits."""
        bits = self.format.bytes(self.rows, self.columns) * 8 / (self.rows * self.columns)
        return f"{self.columns} -> {self.rows}, {self.format}, {bits:.3f} stored bits"


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def _take_place(new: nn.Module, original: nn.Module) -> None:
    bias = getattr(original, "bias", None)
    if isinstance(bias, nn.Parameter):
        new.bias = bias
    new.training = original.training
    for name in _HOOKS:
        hooks = getattr(original, name)
        hooks.update(getattr(new, name))
        setattr(new, name, hooks)


def tied_linear(source: PackedModule, original: nn.Module) -> TiedPackedLinear:
    """The packed form of a linear layer that shares its weight with the module that became `source`."""
    bias = getattr(original, "bias", None)
    out = TiedPackedLinear(source, bias.dtype if isinstance(bias, nn.Parameter) else None)
    _take_place(out, original)
    return out


def _must_be_called(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
    """A hook that does nothing: torch's fused encoder layer, which would read `weight` instead of calling the layer
    (and so unpack a copy, in another dtype perhaps, without the rounding of inputs), keeps away from hooked modules."""


class PackedLinear(PackedModule):
    """Replaces `nn.Linear` and transformers' `Conv1D`: y = transform(x) W^T + b."""

    def __init__(self, layout: Format, rows: int, columns: int, bias_dtype: torch.dtype | None) -> None:
        super().__init__(layout, rows, columns)
        self.in_features, self.out_features = columns, rows
        self.bias = None if bias_dtype is None else nn.Parameter(torch.empty(rows, dtype=bias_dtype))
        self.register_forward_pre_hook(_must_be_called)

    def forward(self, input: Tensor) -> Tensor:
        """(..., columns) -> (..., rows), in the dtype of the input. Nested tensors (torch's encoder) go part by part.

        The argument is called what torch calls it, here and below, for callers that give it by keyword.
        """
        if input.is_nested:
            parts = [packed_linear(part, self.running, self.bias) for part in input.unbind()]
            return torch.nested.as_nested_tensor(parts)
        return packed_linear(input, self.running, self.bias)


class PackedConv2d(PackedModule):
    """Replaces `nn.Conv2d` (of one group): the matrix meets every window of the image."""

    def __init__(
        self, layout: Format, rows: int, channels: int, window: Window, bias_dtype: torch.dtype | None
    ) -> None:
        super().__init__(layout, rows, channels * window.kernel[0] * window.kernel[1])
        self.in_channels, self.out_channels = channels, rows
        self.window = window
        self.bias = None if bias_dtype is None else nn.Parameter(torch.empty(rows, dtype=bias_dtype))

    @property
    def weight(self) -> Tensor:
        """The weight, float32 (out channels, in channels, *kernel), unpacked anew at each access."""
        return self.running.unpack().view(self.out_channels, self.in_channels, *self.window.kernel)

    def forward(self, input: Tensor) -> Tensor:
        """(n, in channels, height, width), or one image without n -> the same of the output, in the input's dtype.

        A format that only stores the weight is unpacked into torch's convolution, which needs no copy of the windows;
        one that does something to its inputs must be given them.
        """
        if self.format.changes_inputs or type(self.format).transform is not Format.transform:
            return self.window.fold(packed_linear(self.window.unfold(input), self.running, self.bias), input)
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return self.window.convolve(input, self.weight.to(input.dtype), bias)

    def extra_repr(self) -> str:
        """As for every packed module, and the window."""
        return f"{super().extra_repr()}, {self.window}"


class PackedEmbedding(PackedModule):
    """Replaces `nn.Embedding`: rows of the packed matrix times `scale` (for Gemma), in the compute dtype."""

    def __init__(self, layout: Format, rows: int, columns: int, dtype: torch.dtype, scale: float = 1.0) -> None:
        super().__init__(layout, rows, columns)
        self.scale = scale
        self.num_embeddings, self.embedding_dim = rows, columns
        self.compute_dtype = dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        return self

    def forward(self, input: Tensor) -> Tensor:
        """Integer ids (...) -> (..., columns)."""
        out = packed_embedding(input, self.packed, self.compute_dtype)
        return out if self.scale == 1.0 else out * torch.tensor(self.scale, dtype=out.dtype, device=out.device)


class TiedPackedLinear(nn.Module):
    """A linear layer that shares the packed matrix of another module, as an output head that of the embedding.

    It stores nothing but an optional bias.
    """

    def __init__(self, source: PackedModule, bias_dtype: torch.dtype | None) -> None:
        super().__init__()
        # A tuple hides the shared module from registration, so its tensors are stored, moved and counted once.
        self._source = (source,)
        self.in_features, self.out_features = source.columns, source.rows
        self.bias = None if bias_dtype is None else nn.Parameter(torch.empty(source.rows, dtype=bias_dtype))
        self.register_forward_pre_hook(_must_be_called)

    @property
    def weight(self) -> Tensor:
        """As `PackedModule.weight`, of the source."""
        return self.source.weight

    @property
    def source(self) -> PackedModule:
        """The module whose matrix is used."""
        return self._source[0]

    def forward(self, input: Tensor) -> Tensor:
        """(..., columns) -> (..., rows)."""
        return packed_linear(input, self.source.running, self.bias)


def replace_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` at the dotted `name` under `root`."""
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent) if parent else root, child, module)


def places_of(root: nn.Module, name: str) -> list[str]:
    """Every dotted name under `root` of the module at `name`: more than one if the module is used in several places."""
    wanted = root.get_submodule(name)
    return [place for place, module in root.named_modules(remove_duplicate=False) if module is wanted]


def packed_modules(root: nn.Module) -> dict[str, PackedModule]:
    """Every packed module under `root` by dotted name."""
    return {name: module for name, module in root.named_modules() if isinstance(module, PackedModule)}
