"""8-bit layers as the CUDA kernel of few vectors takes them (`cuda/eight.cu`)."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from whit.formats.base import Packed
from whit.formats.outlier_int8 import OutlierInt8
from whit.formats.quantised_inputs import QuantisedInputs
from whit.formats.scaled_codes import ScaledCodes
from whit.kernels.eight_shapes import AS_THEY_ARE, FOUND, LISTED, NO_OUTLIERS, TO_E4M3, TO_INT8, FewKind
from whit.kernels.quantised_inputs import E4M3, E5M2, LARGEST_SUM

CODES = {torch.int8: 0, E4M3: 1, E5M2: 2}
ROUNDED = {torch.int8: TO_INT8, E4M3: TO_E4M3}


@dataclass(frozen=True)
class EightBit:
    """A packed layer as the kernel takes it; `threshold` of outliers, `maximum` of the numbers of the inputs."""

    kind: FewKind
    codes: Tensor
    scales: Tensor
    input_scale: Tensor | None = None
    index: Tensor | None = None
    cached: Tensor | None = None
    threshold: float = 0.0
    maximum: float = 1.0

    def arguments(self, bias: Tensor | None) -> tuple[Any, ...]:
        """What the op takes behind the inputs."""
        tensors = (self.codes, self.scales, self.input_scale, self.index, self.cached, bias)
        return (*tensors, [int(value) for value in astuple(self.kind)], self.threshold, self.maximum)


def eight_bit_of(packed: Packed, bfloat: bool) -> EightBit | None:
    """The layer, None where the kernel does not know it."""
    layout, tensors = packed.format, packed.tensors
    if isinstance(layout, OutlierInt8):
        index, cached = tensors.get("outlier_index"), tensors.get("outlier_weight")
        if layout.compat or layout.granularity == "tensor":
            return None
        if cached is not None and (cached.dtype == torch.bfloat16) != bfloat:
            return None
        found = FOUND if layout.outliers == "dynamic" else NO_OUTLIERS if index is None else LISTED
        kind = FewKind(0, bfloat, TO_INT8, found, llm=True, placed=0 if cached is None else layout.stored_columns)
        return EightBit(kind, tensors["codes"], tensors["absmax"], None, index, cached, layout.threshold)
    rounded, maximum, inputs = AS_THEY_ARE, 1.0, layout
    if isinstance(layout, QuantisedInputs):
        if not isinstance(layout.weight, ScaledCodes) or layout.group_size > 0:
            return None
        inputs, maximum = layout.weight, layout.numbers.maximum
        tensors = layout.inner(tensors, packed.rows, packed.columns).tensors
        native = layout.numbers.native
        if native not in ROUNDED:
            return None
        rounded = ROUNDED[native]
    if not isinstance(inputs, ScaledCodes) or inputs.group_size > 0 or inputs.numbers.native not in CODES:
        return None
    whole = inputs.numbers.native == torch.int8
    if rounded and (rounded == TO_INT8) != whole:
        return None
    if rounded == TO_INT8 and packed.columns > LARGEST_SUM:
        return None
    kind = FewKind(
        CODES[inputs.numbers.native], bfloat, rounded, scales_bfloat=tensors["scales"].dtype != torch.float32
    )
    return EightBit(kind, tensors["codes"], tensors["scales"], packed.tensors.get("input_scales"), maximum=maximum)
