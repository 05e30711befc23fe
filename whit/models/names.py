"""Checkpoint names against model names.

Checkpoints of a headless model lack the prefix of the headed one (`h.0.ln_1.weight` for `transformer.h.0.ln_1.weight`)
and the other way round; old TensorFlow conversions call a layer norm's parameters gamma and beta. Anything further
(fused or split weights) is left to `from_pretrained`, see `resolve.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from whit.models.source import TensorSource

_LEGACY_ENDINGS = ((".weight", ".gamma"), (".bias", ".beta"))


@dataclass(frozen=True)
class Match:
    """What matching found.

    Attributes:
        mapping: model name -> checkpoint name; tied names that the checkpoint stores only once appear once.
        missing: model parameters with no tensor in the checkpoint.
        mismatched: (model name, shape in the checkpoint, shape in the model).
        unused: checkpoint names no parameter or buffer asked for.
    """

    mapping: dict[str, str]
    missing: list[str]
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]]
    unused: list[str]

    @property
    def complete(self) -> bool:
        """Every parameter has a tensor of its shape."""
        return not self.missing and not self.mismatched

    def problems(self, limit: int = 5) -> str:
        """Up to `limit` missing or mismatched names, with both shapes, on one line."""
        lines = [f"{name} is {found} in the file, {wanted} in the model" for name, found, wanted in self.mismatched]
        lines += [f"{name} is not in the file" for name in self.missing]
        more = len(lines) - limit
        return "; ".join(lines[:limit]) + (f"; and {more} more" if more > 0 else "")


def tied_groups(model: nn.Module) -> list[list[str]]:
    """Parameter names that share one Parameter: one list per Parameter, in the order of the model."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return list(groups.values())


def persistent_buffers(model: nn.Module) -> Iterator[str]:
    """Names of the buffers that belong to the model's state dict."""
    for prefix, module in model.named_modules():
        for name in module._buffers:
            if module._buffers[name] is not None and name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name


def match_names(model: nn.Module, source: TensorSource) -> Match:
    """Find the checkpoint tensor of every parameter and persistent buffer of a model (which may be on meta)."""
    stored = set(source.names())
    prefix = str(getattr(model, "base_model_prefix", "") or "")
    mapping: dict[str, str] = {}
    missing: list[str] = []
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []

    def take(name: str, shape: tuple[int, ...]) -> bool:
        found = next((candidate for candidate in _candidates(name, prefix) if candidate in stored), None)
        if found is None:
            return False
        if source.shape(found) != shape:
            mismatched.append((name, source.shape(found), shape))
        mapping[name] = found
        return True

    for group in tied_groups(model):
        shape = tuple(model.get_parameter(group[0]).shape)
        found = [take(name, shape) for name in group]  # every name is asked for, not only the first that is there
        if not any(found):
            missing.append(group[0])
    for name in persistent_buffers(model):
        take(name, tuple(model.get_buffer(name).shape))
    unused = sorted(stored - set(mapping.values()))
    return Match(mapping, missing, mismatched, unused)


def _candidates(name: str, prefix: str) -> Iterator[str]:
    yield from _spellings(name)
    if prefix:
        yield from _spellings(f"{prefix}.{name}")
        if name.startswith(f"{prefix}."):
            yield from _spellings(name.removeprefix(f"{prefix}."))


def _spellings(name: str) -> Iterable[str]:
    yield name
    for new, old in _LEGACY_ENDINGS:
        if name.endswith(new):
            yield name.removesuffix(new) + old
