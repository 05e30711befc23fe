"""How packed layouts are said in compressed-tensors: a quantisation scheme, and the tensors that go with it.

The format (https://github.com/vllm-project/compressed-tensors; read from its descriptions and files, nothing imported)
stores per module, with n rows, m columns, G column groups and b bits:

    pack-quantized    weight_packed int32 (n, ceil(m b / 32)): unsigned codes, consecutive bits, lowest first
                      weight_scale (n, G), weight_shape int64 (2,)
                      asymmetric: weight_zero_point int32 (ceil(n b / 32), G): packed along the rows

and reads w = scale * (code - zero), zero = 2**(b - 1) when symmetric. That is the meaning of whit's grouped integers,
and the bits lie in the same order, so nothing is rounded but, possibly, the scale: a loader casts it to the model's
dtype. A layout of whit's becomes one entry here, registered under its format name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from whit.exporters.base import CannotHoldError
from whit.exporters.source import PackedLayer
from whit.formats.base import TensorSpec
from whit.formats.bits import pack_codes, unpack_codes
from whit.formats.grouped_integer import GroupedInteger

#: Widths whose packing is the same in every version of the format and that inference engines have kernels for.
INTEGER_BITS = (4, 8)


@dataclass(frozen=True)
class Arguments:
    """One `weights` or `input_activations` entry of a scheme, with the field names of the format."""

    num_bits: int
    type: str
    symmetric: bool
    strategy: str
    group_size: int | None = None
    dynamic: bool = False


@dataclass(frozen=True)
class Scheme:
    """A quantisation scheme: how modules are stored (`format`), their weights, and inputs if those are rounded."""

    format: str
    weights: Arguments
    inputs: Arguments | None = None

    def to_json(self, targets: list[str]) -> dict[str, Any]:
        """One entry of `config_groups`, for the modules in `targets`."""
        return {
            "targets": targets,
            "format": self.format,
            "weights": asdict(self.weights),
            "input_activations": None if self.inputs is None else asdict(self.inputs),
            "output_activations": None,
        }


#: What is stored for a layer: name -> how to make the tensor (only then are the packed tensors read).
Parts = dict[str, Callable[[], Tensor]]
#: (layer, its packed tensors, dtype of scales) -> scheme and parts; raises CannotHoldError.
Holder = Callable[[PackedLayer, Mapping[str, Tensor], torch.dtype], tuple[Scheme, Parts]]

_HOLDERS: dict[str, Holder] = {}


def holds(format_name: str) -> Callable[[Holder], Holder]:
    """Decorator: the function says how layers of that packed format are stored."""

    def register(holder: Holder) -> Holder:
        _HOLDERS[format_name] = holder
        return holder

    return register


def hold(layer: PackedLayer, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[Scheme, Parts]:
    """Scheme and tensors of a packed layer.

    Args:
        tensors: of the layer; only read when a part is made.
        dtype: of the scales.

    Raises:
        CannotHoldError: there is no scheme for this layout.
    """
    if layer.format.name not in _HOLDERS:
        raise CannotHoldError(layer.name, f"it holds {', '.join(sorted(_HOLDERS))} layers only")
    return _HOLDERS[layer.format.name](layer, tensors, dtype)


def part_specs(layer: PackedLayer, dtype: torch.dtype) -> dict[str, TensorSpec]:
    """Shape and dtype of every part, found by making the parts of a layer without data."""
    specs = layer.format.specs(layer.rows, layer.columns)
    empty = {name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for name, spec in specs.items()}
    _, parts = hold(layer, empty, dtype)
    made = {name: make() for name, make in parts.items()}
    return {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in made.items()}


@holds("grouped-integer")
def _grouped_integer(layer: PackedLayer, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[Scheme, Parts]:
    layout, rows, columns = layer.format, layer.rows, layer.columns
    assert isinstance(layout, GroupedInteger)
    bits, groups = layout.bits, layout.groups(columns)
    if bits not in INTEGER_BITS:
        raise CannotHoldError(
            layer.name, f"it holds integers of {' or '.join(map(str, INTEGER_BITS))} bits, not {bits}"
        )
    scheme = Scheme("pack-quantized", integer_arguments(layer, layout))
    parts: Parts = {
        "weight_packed": lambda: words(tensors["codes"], columns, bits),
        "weight_scale": lambda: tensors["scales"].to(dtype),
        "weight_shape": lambda: torch.tensor([rows, columns]),
    }
    if not layout.symmetric:
        parts["weight_zero_point"] = lambda: pack_rows(
            unpack_codes(tensors["zeros"], bits, rows * groups).reshape(rows, groups), bits
        )
    return scheme, parts


def integer_arguments(layer: PackedLayer, layout: GroupedInteger) -> Arguments:
    """Arguments of an integer weight: one scale per row ("channel") or per column group.

    Raises:
        CannotHoldError: the last column group is smaller than the others, which the format does not know.
    """
    if layout.groups(layer.columns) == 1:
        return Arguments(layout.bits, "int", layout.symmetric, "channel")
    if layer.columns % layout.group_size:
        raise CannotHoldError(
            layer.name, f"its groups all have one size, and {layer.columns} columns are not a multiple of "
            f"{layout.group_size}"
        )  # fmt: skip
    return Arguments(layout.bits, "int", layout.symmetric, "group", layout.group_size)


def words(packed: Tensor, columns: int, bits: int) -> Tensor:
    """Rows of packed codes, uint8 (n, packed), as int32 words (n, ceil(columns * bits / 32)), little-endian."""
    count = -(-columns * bits // 32)
    padded = functional.pad(packed, (0, max(0, count * 4 - packed.shape[1])))
    return padded[:, : count * 4].reshape(-1).view(torch.int32).reshape(-1, count)


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Codes (n, G) packed along the rows: int32 (ceil(n * bits / 32), G)."""
    return words(pack_codes(codes.T.contiguous(), bits), codes.shape[0], bits).T.contiguous()
