"""Several layers that multiply the same input: joined into one product where their stored tensors allow it.

Rows of a packed weight are independent, so the rows of several weights of one layout can stand in one. Each module
keeps its own weight, as a view of the joined tensors: nothing is stored twice and every module means what it meant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor, nn

from whit.formats.base import Packed
from whit.kernels import packed_linear
from whit.kernels.cuda_inputs import Normed, products_of
from whit.kernels.decode_ops import add_rms_norm, gated
from whit.kernels.linear import choose_several, preparation_of, several_products
from whit.models.packed import PackedLinear, TiedPackedLinear


def join_rows(parts: Sequence[Packed]) -> Packed | None:
    """One packed weight with the rows of all parts, or None where the layout does not allow it.

    It does if every tensor either grows with the rows (and so lists them in order) or is the same in all parts, as the
    marked columns of two layers seldom are.
    """
    layout, columns = parts[0].format, parts[0].columns
    if any((part.format, part.columns) != (layout, columns) for part in parts):
        return None
    rows = sum(part.rows for part in parts)
    wanted = layout.specs(rows, columns)
    tensors: dict[str, Tensor] = {}
    for name, spec in wanted.items():
        each = [part.tensors[name] for part in parts]
        grown = (sum(tensor.shape[0] for tensor in each), *each[0].shape[1:])
        fixed = layout.specs(1, columns)[name].shape == layout.specs(2 * rows, columns)[name].shape
        if fixed and spec.shape == each[0].shape and all(torch.equal(each[0], tensor) for tensor in each[1:]):
            tensors[name] = each[0]
        elif not fixed and spec.shape == grown and _whole(layout.specs, name, parts):
            tensors[name] = _one_after_another(each)
        else:
            return None
    return Packed(layout, rows, columns, tensors)


def _one_after_another(parts: Sequence[Tensor]) -> Tensor:
    """The rows of all parts; without a copy where they lie so already, as after joining once before."""
    first, place = parts[0], parts[0].storage_offset()
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same and part.is_contiguous() and part.storage_offset() == place):
            return torch.cat(list(parts))
        place += part.numel()
    return first.as_strided((sum(len(part) for part in parts), *first.shape[1:]), first.stride())


def _whole(specs: object, name: str, parts: Sequence[Packed]) -> bool:
    """Whether no part ends within a byte: tensors packed across rows have as many bytes for twice the rows."""
    return all(
        part.format.specs(2 * part.rows, part.columns)[name].shape[0] == 2 * part.tensors[name].shape[0]
        for part in parts[:-1]
    )


class Products:
    """y_i = W_i x + b_i for several modules and one x.

    Args:
        modules: linear layers of any kind; each maps (n, columns) to (n, rows).
        join: hold equal layouts as one weight, others in the form that products on their device read fastest.
        branches: others run in one launch where a kernel does that, or beside each other as branches of a CUDA graph.
        dtype: of the inputs, on which the form they are held in depends; None: all are held as they are stored.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        *,
        join: bool = True,
        branches: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.modules = list(modules)
        self._branches = branches
        with torch.inference_mode(False), torch.no_grad():  # the modules keep the tensors, and may be trained
            if join and dtype is not None:
                self._prepare(dtype)
            self._joined = self._join() if join else None
        self._rows: list[int] = []
        self._packed = [module for module in self.modules if _plain_packed(module)]
        if len(self._packed) < len(self.modules):
            self._packed = []
        self._streams: list[torch.cuda.Stream] = []
        if self._joined is not None:
            self._rows = [int(getattr(module, "out_features")) for module in self.modules]  # noqa: B009

    @property
    def joined(self) -> Packed | None:
        """The packed weight in which all of them stand, if they could be joined."""
        return self._joined[0] if self._joined is not None and isinstance(self._joined[0], Packed) else None

    @property
    def meeting(self) -> list[Packed]:
        """The packed weights that one launch may multiply at once, if they were not joined."""
        return self._weights() if self._joined is None and self._meet else []

    @property
    def launched(self) -> list[Packed]:
        """The packed weights of the one launch that multiplies one vector by all of them, if there is such a launch."""
        if self.joined is not None:
            return [self.joined]
        return self._weights() if len(self._packed) == 1 or self._meet else []

    @property
    def gateable(self) -> list[Packed]:
        """Two packed weights that one launch multiplies, if these are, and multiplies with each other."""
        return self._weights() if self._meet and len(self._packed) == 2 else []

    def explain(self, inputs: Tensor) -> str:
        """How the products run, for reports: "joined", "one launch", "branches" or "in turn"."""
        if self._joined is not None:
            return "joined"
        if self._meet and choose_several(inputs, self._weights()) is not None:
            return "one launch"
        return "branches" if self._branches and inputs.is_cuda else "in turn"

    def __call__(self, inputs: Tensor) -> list[Tensor]:
        """(n, columns) -> (n, rows_i) for each module; the rows of a result may lie apart."""
        found = self._of(inputs) if inputs.is_cuda and inputs.shape[0] == 1 else None
        if found is not None:
            return found[1]
        if self._joined is not None:
            weight, bias = self._joined
            out = (
                packed_linear(inputs, weight, bias)
                if isinstance(weight, Packed)
                else torch.nn.functional.linear(inputs, weight, bias)
            )
            return list(torch.split_with_sizes(out, self._rows, -1))
        together = several_products(inputs, self._weights()) if self._meet else None
        if together is not None:
            return together
        if self._branches and inputs.is_cuda and torch.cuda.is_current_stream_capturing():
            return self._beside(inputs)
        return [_product(module, inputs) for module in self.modules]

    def normed(
        self, states: Tensor, update: Tensor | None, weight: Tensor, epsilon: float
    ) -> tuple[Tensor, list[Tensor]]:
        """`add_rms_norm` and the products of what it normalises: its first result, and those."""
        found = self._of(Normed(states, update, weight, epsilon))
        if found is not None:
            return found
        states, normal = add_rms_norm(states, update, weight, epsilon)
        return states, self(normal)

    def gated(self, states: Tensor, update: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        """The first result of `normed`, and of two modules the second's product times the SiLU of the first's."""
        weights = self.gateable if states.is_cuda and states.shape[0] == 1 else []  # others need not be asked about
        found = products_of(Normed(states, update, weight, epsilon), weights, gated=True) if weights else None
        if found is not None:
            return found[0], found[1][0]
        states, (gate, up) = self.normed(states, update, weight, epsilon)
        return states, gated(gate, up)

    def _of(self, given: Normed | Tensor) -> tuple[Tensor, list[Tensor]] | None:
        """Everything in one launch, where a kernel does that."""
        if self._joined is not None:
            weight, bias = self._joined
            found = products_of(given, [weight], bias) if isinstance(weight, Packed) else None
            return None if found is None else (found[0], list(torch.split_with_sizes(found[1][0], self._rows, -1)))
        several = len(self._packed) > 1 and not self._branches
        return products_of(given, self._weights()) if self._packed and not several else None

    @property
    def _meet(self) -> bool:
        """Whether one launch may take all of them, of which there are several."""
        return len(self._packed) > 1 and self._branches

    def _weights(self) -> list[Packed]:
        return [module.running for module in self._packed]

    def _beside(self, inputs: Tensor) -> list[Tensor]:
        main = torch.cuda.current_stream(inputs.device)
        while len(self._streams) < len(self.modules) - 1:
            self._streams.append(torch.cuda.Stream(inputs.device))  # type: ignore[no-untyped-call]
        for stream in self._streams:
            stream.wait_stream(main)
        out = [self.modules[0](inputs)]
        for module, stream in zip(self.modules[1:], self._streams, strict=True):
            with torch.cuda.stream(stream):
                out.append(module(inputs))
        for stream in self._streams:
            main.wait_stream(stream)
        return out

    def _prepare(self, dtype: torch.dtype) -> None:
        """Let the modules run in the form that products on their device read fastest."""
        packed = [module for module in self.modules if type(module) is PackedLinear]
        if len(packed) < len(self.modules) or all(module.running.format != module.format for module in packed):
            return
        for module in packed:
            module.run_as_stored()
        weights = [module.packed for module in packed]
        preparation = preparation_of(weights, dtype)
        if preparation is not None:
            for module, prepared in zip(packed, preparation.prepare(weights), strict=True):
                module.run_as(prepared)

    def _join(self) -> tuple[Packed | Tensor, Tensor | None] | None:
        if len({type(module) for module in self.modules}) > 1 or len(self.modules) < 2:
            return None
        if any(hooked(module) for module in self.modules):
            return None
        biases = [getattr(module, "bias", None) for module in self.modules]
        if any(bias is None for bias in biases) != all(bias is None for bias in biases):
            return None
        bias = None if biases[0] is None else torch.cat([item.detach() for item in biases if item is not None])
        weight: Packed | Tensor | None = None
        if all(type(module) is PackedLinear for module in self.modules):
            weight = _join_packed([module for module in self.modules if isinstance(module, PackedLinear)])
        elif all(type(module) is nn.Linear for module in self.modules):
            weight = _join_dense([module for module in self.modules if isinstance(module, nn.Linear)])
        return None if weight is None else (weight, bias)


def _product(module: nn.Module, inputs: Tensor) -> Tensor:
    """What the module gives; a packed layer's empty hook, which torch takes a while to call, is passed over."""
    out: Tensor = (module.forward if type(module) is PackedLinear and not hooked(module) else module)(inputs)
    return out


def _plain_packed(module: nn.Module) -> TypeGuard[PackedLinear]:
    return type(module) is PackedLinear and module.bias is None and not hooked(module)


def hooked(module: nn.Module) -> bool:
    """Whether someone wants to see the module called (packed layers carry one hook that does nothing)."""
    if module._forward_hooks or "forward" in module.__dict__:  # replaced, as by those who move weights about
        return True
    return len(module._forward_pre_hooks) > isinstance(module, PackedLinear | TiedPackedLinear)


def _join_packed(modules: list[PackedLinear]) -> Packed | None:
    joined = join_rows([module.running for module in modules])
    if joined is None:
        return None
    first = dict.fromkeys(joined.tensors, 0)
    for module in modules:
        own: dict[str, Tensor] = {}
        running = module.running
        for name, whole in joined.tensors.items():
            size = running.tensors[name].shape[0]
            own[name] = whole if whole.shape[0] == size else whole[first[name] : first[name] + size]
            first[name] += size
        view = Packed(running.format, module.rows, module.columns, own)
        (module.set_packed if running.format == module.format else module.run_as)(view)
    return joined


def _join_dense(modules: list[nn.Linear]) -> Tensor | None:
    weights = [module.weight.detach() for module in modules]
    if len({(weight.dtype, weight.device, weight.shape[1]) for weight in weights}) > 1:
        return None
    if any(weight.is_inference() for weight in weights):  # torch lets nobody give them other memory
        return None
    whole = _one_after_another(weights)
    for module, part in zip(modules, torch.split(whole, [len(weight) for weight in weights]), strict=True):
        module.weight.data = part
    return whole
