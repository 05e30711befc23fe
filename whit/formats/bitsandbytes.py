"""INT8 weights as bitsandbytes keeps them in state dicts: `weight` int8, `SCB` float32 per row, `weight_format` 0.

The numbers are those of `whit.formats.outlier_int8` (w = SCB code / 127), so nothing is rounded on the way. A module of
bitsandbytes finds its outlier columns in every call and has no 16-bit weights for them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from whit.errors import ModelError
from whit.formats.base import Packed
from whit.formats.outlier_int8 import LEVELS, OutlierInt8

ROW_MAJOR = 0


def to_bitsandbytes(packed: Packed) -> dict[str, Tensor]:
    """State dict of a `Linear8bitLt` that holds the same weight (to be loaded with `has_fp16_weights=False`).

    Args:
        packed: of format "outlier-int8", without 16-bit columns.

    Returns:
        weight int8 (rows, columns), SCB float32 (rows,), weight_format uint8 scalar.

    Raises:
        ModelError: the weight is of another format, or has 16-bit columns.
    """
    if not isinstance(packed.format, OutlierInt8):
        raise ModelError(
            f"bitsandbytes cannot hold format {packed.format.name!r}, only 'outlier-int8': compress with llm-int8"
        )
    if "outlier_weight" in packed.tensors:
        raise ModelError(
            f"bitsandbytes cannot hold {packed.format.stored_columns} outlier columns in {packed.format.stored_dtype}: "
            "compress with outlier_weights=int8"
        )
    return {
        "weight": packed.tensors["codes"],
        "SCB": packed.tensors["absmax"].expand(packed.rows).contiguous(),
        "weight_format": torch.tensor(ROW_MAJOR, dtype=torch.uint8),
    }


def from_bitsandbytes(tensors: Mapping[str, Tensor], *, threshold: float = 6.0, compat: bool = False) -> Packed:
    """The packed weight in the state dict of a `Linear8bitLt`.

    Args:
        tensors: weight int8 (rows, columns), SCB float32 (rows,), and if present weight_format.
        threshold: the module's, 0 for no outlier columns (bitsandbytes does not store it; transformers' default is 6).
        compat: also round inputs and outputs as bitsandbytes does.

    Raises:
        ModelError: a tensor is missing, of another kind, or in a layout of an old bitsandbytes.
    """
    missing = [name for name in ("weight", "SCB") if name not in tensors]
    if missing:
        raise ModelError(f"the state dict lacks {missing[0]!r}, it holds {sorted(tensors)}: is it of a Linear8bitLt?")
    weight, absmax = tensors["weight"], tensors["SCB"]
    if weight.dtype != torch.int8 or weight.dim() != 2 or bool((weight < -LEVELS).any()):
        raise ModelError(
            f"'weight' must be int8 (rows, columns) with codes from -127, got {weight.dtype} {tuple(weight.shape)}"
        )
    layout = tensors.get("weight_format")
    if layout is not None and int(layout) != ROW_MAJOR:
        raise ModelError(
            f"'weight_format' is {int(layout)}, not {ROW_MAJOR} (row-major): save with bitsandbytes 0.45 on"
        )
    decomposed = OutlierInt8(float(threshold), "dynamic" if threshold > 0 else "none", compat=compat)
    rows, columns = weight.shape
    return Packed(decomposed, rows, columns, {"codes": weight, "absmax": absmax.float().reshape(-1)})
