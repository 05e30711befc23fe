"""2:4 sparse layers on NVIDIA's sparse tensor cores, through torch's semi-structured kernels.

The stored index and values are converted once into the layout of cuSPARSELt (or, on compute capability 8, of CUTLASS)
and kept as long as the stored tensors live; what is saved does not change. The plan of a run counts the copy (`BITS`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from whit.formats.base import Format, Packed
from whit.formats.dense import Dense
from whit.formats.sparse_nm import SparseNM
from whit.kernels.linear import Implementation, register_implementation

# Shapes that both libraries take for 16-bit values.
_ROWS, _COLUMNS = 32, 64
_HALVES = (torch.float16, torch.bfloat16)
BITS = 9
"""Of the converted copy per weight: half of the values in 16 bits, and two bits for each that says where it was."""

Convert = Callable[[Tensor], Tensor]


def library(device: torch.device) -> str | None:
    """The library that multiplies 2:4 matrices on a device: "cusparselt", "cutlass", or None."""
    if device.type != "cuda":
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability >= (8, 0) and torch.backends.cusparselt.is_available():
        return "cusparselt"
    return "cutlass" if capability[0] == 8 else None


def to_semi_structured(weight: Tensor) -> Tensor:
    """A dense 16-bit 2:4 weight (rows, columns) in the layout of the device's library."""
    if library(weight.device) == "cusparselt":
        return torch.sparse.SparseSemiStructuredTensorCUSPARSELT.from_dense(weight)
    return torch.sparse.SparseSemiStructuredTensorCUTLASS.from_dense(weight)


@dataclass(frozen=True)
class _Converted:
    """A converted weight and the state of the stored tensors that it was made from."""

    weight: Tensor
    dtype: torch.dtype
    sources: tuple[tuple[weakref.ref[Tensor], int], ...]

    def stands_for(self, packed: Packed, dtype: torch.dtype) -> bool:
        """Whether it is of these very tensors, not written to since."""
        current = tuple(packed.tensors.values())
        return self.dtype == dtype and all(
            source() is tensor and version == _version(tensor)
            for (source, version), tensor in zip(self.sources, current, strict=True)
        )


@dataclass
class SemiStructured:
    """The implementation and the converted weights that it keeps, by stored index tensor (weakly)."""

    convert: Convert = to_semi_structured
    _kept: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)

    def supports(self, x: Tensor, packed: Packed) -> bool:
        """Half-precision inputs without gradient, at most 2 of 4 dense values kept, on a GPU that has the kernels."""
        return library(x.device) is not None and fits(x, packed)

    def linear(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        """y = x W^T + b in the dtype of x."""
        weight = self.converted(packed, x.dtype)
        flat = x.reshape(-1, packed.columns)
        out = torch.nn.functional.linear(flat, weight, None if bias is None else bias.to(x.dtype))
        return out.reshape(*x.shape[:-1], packed.rows)

    def converted(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        """The weight as the kernels take it; made anew when a stored tensor was replaced or written to."""
        index = packed.tensors["index"]
        found: _Converted | None = self._kept.get(index)  # type: ignore[no-untyped-call]
        if found is None or not found.stands_for(packed, dtype):
            sources = tuple((weakref.ref(tensor), _version(tensor)) for tensor in packed.tensors.values())
            found = _Converted(self.convert(packed.unpack().to(dtype)), dtype, sources)
            self._kept[index] = found
        return found.weight

    def implementation(self) -> Implementation:
        """What is registered."""
        return Implementation("semi-structured 2:4", self.supports, self.linear)


def fits(x: Tensor, packed: Packed) -> bool:
    """Whether layout, shapes and dtypes are those of the kernels, whatever the device."""
    return (
        x.numel() > 0
        and not (x.requires_grad and torch.is_grad_enabled())
        and _fits(packed.format, packed.rows, packed.columns, x.dtype)
    )


def _fits(layout: Format, rows: int, columns: int, dtype: torch.dtype) -> bool:
    return (
        isinstance(layout, SparseNM)
        and layout.m == 4
        and layout.n <= 2
        and isinstance(layout.values, Dense)
        and dtype in _HALVES
        and rows % _ROWS == 0
        and columns % _COLUMNS == 0
    )


def converted_bytes(layout: Format, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> int:
    """Bytes of the converted copy that products of a weight with inputs of a type keep on a device; 0 without one."""
    if not _fits(layout, rows, columns, dtype) or library(device) is None:
        return 0
    return rows * columns * BITS // 8


def _version(tensor: Tensor) -> int:
    """Counts in-place writes; tensors made under inference mode are not counted by torch, nor written to in place."""
    return 0 if tensor.is_inference() else tensor._version


register_implementation(SparseNM.name, SemiStructured().implementation())
