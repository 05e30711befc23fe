"""What a packed weight is: a `Format` (the layout, a small frozen value) and its plain tensors.

A format knows shapes, dtypes, packing and the meaning of the bits; it knows no algorithm. Everything a format stores
is a plain tensor, so files are safetensors and nothing is ever pickled. A new layout is one file in this folder with
one `@register_format` dataclass; files are found by walking the package.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from whit.discovery import Registry
from whit.errors import ModelError, nearest
from whit.formats.memory import Memory

_FORMATS: Registry[Format] = Registry("formats", "whit.formats")
FormatType = TypeVar("FormatType", bound="type[Format]")


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Stored bytes of this tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Format(ABC):
    """A layout for one weight matrix of `rows` outputs and `columns` inputs.

    Subclasses are frozen dataclasses whose fields are JSON values (they go into the model's config), with a class
    variable `name`. They declare the tensors they store and what those tensors mean.
    """

    name: ClassVar[str]
    changes_inputs: ClassVar[bool] = False
    """Whether `linear` does more to its inputs than multiply them (rounds or splits them): running the dequantised
    weight instead would then not be the same model."""

    @abstractmethod
    def specs(self, rows: int, columns: int) -> dict[str, TensorSpec]:
        """Every tensor this layout stores for a (rows, columns) weight: exact shapes and dtypes."""

    @abstractmethod
    def unpack(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        """The weight the tensors stand for: float32 (rows, columns), on their device. Exact: no further rounding."""

    def unpack_rows(self, tensors: Mapping[str, Tensor], rows: int, columns: int, index: Tensor) -> Tensor:
        """Rows `index` (k,) of the weight: float32 (k, columns). Formats stored row by row override it to be cheap."""
        return self.unpack(tensors, rows, columns)[index]

    def transform(self, inputs: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """What happens to the inputs (..., columns) before the product; identity unless a format rotates them."""
        return inputs

    def linear(
        self, inputs: Tensor, tensors: Mapping[str, Tensor], rows: int, columns: int, bias: Tensor | None = None
    ) -> Tensor:
        """The plain meaning of the layer: (..., columns) -> (..., rows) in the dtype of `inputs`.

        By default y = transform(x) W^T + b with the unpacked weight; formats that also round their inputs override it
        and set `changes_inputs`.
        """
        weight = self.unpack(tensors, rows, columns).to(inputs.dtype)
        return torch.nn.functional.linear(
            self.transform(inputs, tensors), weight, None if bias is None else bias.to(inputs.dtype)
        )

    def to_json(self) -> dict[str, Any]:
        """`{"format": name, **fields}`, formats inside formats likewise: what the config of a saved model holds."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        nested = {key: value.to_json() if isinstance(value, Format) else value for key, value in fields.items()}
        return {"format": self.name, **nested}

    def bytes(self, rows: int, columns: int) -> int:
        """Stored bytes of a (rows, columns) weight in this layout, all tensors counted."""
        return sum(spec.bytes for spec in self.specs(rows, columns).values())


def register_format(cls: FormatType) -> FormatType:
    """Class decorator that makes a format loadable by its name."""
    return _FORMATS.add(cls)


def format_from_json(fields: Mapping[str, Any]) -> Format:
    """Inverse of `Format.to_json`.

    Raises:
        ModelError: the name is unknown (a newer whit wrote the file) or the fields do not fit.
    """
    known = _FORMATS.known()
    name = fields.get("format")
    if name not in known:
        raise ModelError(
            f"packed format {name!r} is not known to this version of whit{nearest(str(name), known)} "
            "(upgrade with: pip install -U whit)"
        )
    values = {
        key: format_from_json(value) if isinstance(value, Mapping) else value
        for key, value in fields.items()
        if key != "format"
    }
    try:
        return known[name](**values)
    except (TypeError, ValueError) as error:
        raise ModelError(f"packed format {name!r} cannot be read from {dict(fields)!r}: {error}") from error


def nested_specs(prefix: str, inner: Format, rows: int, columns: int) -> dict[str, TensorSpec]:
    """The tensors of a format inside another, named `<prefix>_<name>`."""
    return {f"{prefix}_{key}": spec for key, spec in inner.specs(rows, columns).items()}


def nested_tensors(prefix: str, inner: Format, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Packed:
    """The packed weight of a format inside another, from the outer format's tensors (shared, not copied)."""
    names = inner.specs(rows, columns)
    return Packed(inner, rows, columns, {key: tensors[f"{prefix}_{key}"] for key in names})


@dataclass(frozen=True)
class Packed:
    """One compressed weight: layout, logical shape, stored tensors."""

    format: Format
    rows: int
    columns: int
    tensors: dict[str, Tensor]

    def __post_init__(self) -> None:
        expected = self.format.specs(self.rows, self.columns)
        if set(expected) != set(self.tensors):
            raise ModelError(
                f"packed format {self.format.name!r} stores {sorted(expected)}, got {sorted(self.tensors)}"
            )
        for name, spec in expected.items():
            tensor = self.tensors[name]
            if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
                raise ModelError(
                    f"packed tensor {name!r} of format {self.format.name!r} must be {spec.shape} {spec.dtype}, "
                    f"got {tuple(tensor.shape)} {tensor.dtype}"
                )

    @cached_property
    def memory(self) -> Memory:
        """What kernels have worked out for this weight; no part of it."""
        return Memory()

    def unpack(self) -> Tensor:
        """The weight: float32 (rows, columns), exactly what the stored bits mean."""
        return self.format.unpack(self.tensors, self.rows, self.columns)

    def linear(self, inputs: Tensor, bias: Tensor | None = None) -> Tensor:
        """The plain meaning of the layer (`Format.linear`): (..., columns) -> (..., rows)."""
        return self.format.linear(inputs, self.tensors, self.rows, self.columns, bias)

    def stored_bytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def stored_bits(self) -> float:
        """Stored bytes x 8 / weights."""
        return self.stored_bytes() * 8 / (self.rows * self.columns)

    def to(self, device: torch.device | str) -> Packed:
        """The same weight on another device."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return dataclasses.replace(self, tensors=moved)
