"""A model without weights, and weights put in or taken out one submodule at a time.

The skeleton is built by the model's own constructor while `torch.empty`, which is what layers allocate their
parameters with, makes meta tensors. Buffers computed by the constructor (rotary frequencies, position ids, masks) are
therefore real and correct, which building on the meta device would lose. What the constructor allocated otherwise
(norm weights made by `torch.ones`) is small, and is put on meta afterwards.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from whit.errors import ModelError
from whit.models.names import persistent_buffers
from whit.models.source import TensorSource, check_finite

if TYPE_CHECKING:
    from whit.models.resolve import ModelReference


class _EmptyOnMeta(TorchFunctionMode):
    """Sends `torch.empty` to the meta device and leaves every other function alone."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def build_skeleton(reference: ModelReference, dtype: torch.dtype) -> nn.Module:
    """The model of a reference with every parameter on the meta device, in evaluation mode.

    Non-persistent buffers are real. Persistent buffers hold their initial values until `materialise`.

    Raises:
        ModelError: the class refuses the config.
    """
    return skeleton_of(reference.model_class, reference.config, dtype)


def skeleton_of(model_class: type, config: Any, dtype: torch.dtype) -> nn.Module:
    """`build_skeleton` from a transformers class and config (which is copied, not changed)."""
    config = copy.deepcopy(config)
    try:
        # The constructor draws random initial values for what is not on meta: the caller's generator must not notice.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), torch.no_grad(), _EmptyOnMeta():
            warnings.simplefilter("ignore")
            model: nn.Module = model_class._from_config(config, dtype=dtype)  # type: ignore[attr-defined]
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"{model_class.__name__} cannot be built from its config ({reason[0]}): check config.json"
        ) from error
    release(model, "")
    _refuse_lost_buffers(model, model_class.__name__)
    return model.eval()


def _refuse_lost_buffers(model: nn.Module, name: str) -> None:
    """Refuse a model whose constructor left a computed buffer on meta: its values would be unknown."""
    persistent = set(persistent_buffers(model))
    lost = [key for key, buffer in model.named_buffers() if buffer.is_meta and key not in persistent]
    if lost:
        raise ModelError(f"{name} computes its buffer {lost[0]!r} in a way whit cannot follow: use another class")


def keeps_float32(model: nn.Module, name: str, dtype: torch.dtype) -> bool:
    """Whether the model's class asks for this parameter to stay in float32 when the rest is in `dtype`."""
    plan = {
        torch.float16: ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"),
        torch.bfloat16: ("_keep_in_fp32_modules_strict",),
    }
    patterns = {item for attribute in plan.get(dtype, ()) for item in getattr(model, attribute, None) or ()}
    return any(f".{pattern}." in f".{name}." for pattern in patterns)


def materialise(
    model: nn.Module, prefix: str, source: TensorSource, dtype: torch.dtype, device: torch.device | str
) -> None:
    """Load the parameters and persistent buffers of a submodule, recursively.

    A parameter shared with other modules (a tied head) becomes real in all of them. Parameters that are real already
    keep their values and only change dtype and device.

    Args:
        model: the skeleton.
        prefix: dotted name of the submodule; "" for the whole model.
        source: where the tensors are, by name in the model.
        dtype: of the floating-point parameters.
        device: where to put them. All buffers of the submodule are moved there, too.

    Raises:
        ModelError: a tensor is missing, has the wrong shape, or holds NaN or infinite values.
    """
    module = model.get_submodule(prefix)
    dot = f"{prefix}." if prefix else ""
    parameters = [dot + name for name, _ in module.named_parameters()]
    buffers = [dot + name for name, _ in module.named_buffers(remove_duplicate=False)]
    materialise_tensors(model, parameters, buffers, source, dtype, device)


def materialise_tensors(
    model: nn.Module,
    parameters: Sequence[str],
    buffers: Sequence[str],
    source: TensorSource,
    dtype: torch.dtype,
    device: torch.device | str,
) -> None:
    """`materialise` for parameters and buffers given by full name."""
    stored = set(source.names())
    owners = _owners(model)
    for name in parameters:
        parameter = model.get_parameter(name)
        aliases = owners[id(parameter)]
        names = [f"{path}.{key}" if path else key for path, _, key in aliases]
        wanted = torch.float32 if keeps_float32(model, names[0], dtype) else dtype
        if parameter.is_meta:
            found = next((alias for alias in (name, *names) if alias in stored), None)
            if found is None:
                raise ModelError(f"the checkpoint has no tensor for parameter {name!r}")
            value = _load(source, found, tuple(parameter.shape)).to(device)
            check_finite(found, value)  # there, where it is quick
        else:
            value = parameter.detach()
        _replace(aliases, parameter, _cast(value, wanted, device))
    persistent = set(persistent_buffers(model))
    for name in buffers:
        path, _, key = name.rpartition(".")
        buffer = value = model.get_buffer(name)
        if name in persistent and name in stored:
            value = _load(source, name, tuple(buffer.shape)).to(buffer.dtype)
            check_finite(name, value)
        elif buffer.is_meta:
            raise ModelError(f"the checkpoint has no tensor for buffer {name!r}")
        model.get_submodule(path)._buffers[key] = value.to(device)


def release(model: nn.Module, prefix: str) -> None:
    """Put the parameters of a submodule ("" = all) back on the meta device; shared parameters everywhere."""
    dot = f"{prefix}." if prefix else ""
    release_parameters(model, [dot + name for name, _ in model.get_submodule(prefix).named_parameters()])


def release_parameters(model: nn.Module, names: Sequence[str]) -> None:
    """`release` for parameters given by full name."""
    owners = _owners(model)
    for name in names:
        parameter = model.get_parameter(name)
        if not parameter.is_meta:
            _replace(owners[id(parameter)], parameter, torch.empty_like(parameter, device="meta"))


def load_dense(reference: ModelReference, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """The whole original model with its weights, in evaluation mode."""
    model = build_skeleton(reference, dtype)
    materialise(model, "", reference.source, dtype, device)
    return model


_Owner = tuple[str, nn.Module, str]


def _owners(model: nn.Module) -> dict[int, list[_Owner]]:
    """Every place that holds each parameter: id -> (module name, module, attribute)."""
    owners: dict[int, list[_Owner]] = {}
    for path, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((path, module, key))
    return owners


def _load(source: TensorSource, name: str, shape: tuple[int, ...]) -> Tensor:
    value = source.load(name)
    if tuple(value.shape) != shape:
        raise ModelError(f"tensor {name!r} has shape {tuple(value.shape)} in the checkpoint, {shape} in the model")
    return value


def _cast(value: Tensor, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    return value.to(device=device, dtype=dtype if value.is_floating_point() else value.dtype)


def _replace(owners: list[_Owner], old: nn.Parameter, value: Tensor) -> None:
    if value.data_ptr() == old.data_ptr() and value.dtype == old.dtype and value.device == old.device:
        return
    parameter = nn.Parameter(value, requires_grad=old.requires_grad)
    for _, module, key in owners:
        module._parameters[key] = parameter
