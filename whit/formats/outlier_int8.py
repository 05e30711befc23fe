"""INT8 weights and INT8 inputs; inputs that are too large for that are multiplied in 16 bit.

    weights   c_ij = rint(127 w_ij / a_i)                     a_i = max_j |w_ij|                 stored: c, a
    inputs    d_tj = rint(127 x_tj / s_t), 0 for j in O       s_t = max_{j not in O} |x_tj|      anew in each call
    output    y_ti = s_t a_i / 127^2  sum_j d_tj c_ij  +  sum_{j in O} x_tj v_ij  +  b_i

O is the set of outlier inputs: those that reach the threshold for some token of the call ("dynamic"), a stored list
("static"), or empty ("none"). v_ij is the weight of an outlier input: a stored 16-bit value, else a_i c_ij / 127.
Source: Dettmers, Lewis, Belkada, Zettlemoyer, "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale",
arXiv 2208.07339, sections 2 and 3; the paper's v is the original 16-bit weight.

The sum of integers is exact (|sum| <= 127^2 columns: 32 bits hold it up to 133 000 columns). Everything after it is
computed in float64 and rounded once, to the dtype of the inputs. A faster integer product therefore changes no bit,
and without "dynamic" a token gets the same output whatever it is batched with. (`whit.kernels.outlier_int8`, for 16-bit
inputs on a GPU, keeps codes and integer sums and has float32 after that, within a bound stated there.)

Stored bits per weight: 8 + 32 / columns, and (16 + 32 / rows) per stored column / columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from whit.formats.base import Format, TensorSpec, register_format
from whit.formats.straight_through import straight_through

OUTLIERS = ("dynamic", "static", "none")
GRANULARITIES = ("vector", "row", "tensor")
DTYPES = {"int8": torch.int8, "float16": torch.float16, "bfloat16": torch.bfloat16}
LEVELS = 127
# Below this a row counts as zero: 127 divided by it must be finite in float32.
SMALLEST = 2.0**-100
# Outputs that are held in float64 at a time.
OUTPUTS_AT_ONCE = 2**24
WEIGHT_ROWS_AT_ONCE = 1024

IntegerProduct = Callable[[Tensor, Tensor], Tensor]
"""(tokens, columns) int8 and (rows, columns) int8 -> (tokens, rows), exact, of any dtype that holds it."""


@dataclass(frozen=True)
class SplitInputs:
    """Inputs divided into what is rounded and what is not.

    Attributes:
        codes: int8 (tokens, columns), 0 in outlier columns.
        absmax: float32 (tokens, 1), or (1, 1) with granularity "tensor".
        outliers: int64 indices of the outlier columns, ascending.
    """

    codes: Tensor
    absmax: Tensor
    outliers: Tensor


@register_format
@dataclass(frozen=True)
class OutlierInt8(Format):
    """Layout and meaning of an LLM.int8() layer.

    Attributes:
        threshold: |x| from which an input is an outlier; 0 unless `outliers` is "dynamic".
        outliers: "dynamic", "static" or "none".
        stored_columns: outlier columns known beforehand: those with 16-bit weights, or all there are if "static".
        stored_dtype: of their weights: "float16" or "bfloat16", or "int8" where the codes serve.
        granularity: "vector": a constant per token and per weight row; "row": per token, one for the whole weight;
            "tensor": one for all inputs of a call, one for the whole weight.
        compat: round as bitsandbytes does: inputs pass through float16, small values of outlier columns count in s_t,
            the two parts of the output and dequantised weights are rounded to the dtype of the inputs.
    """

    name: ClassVar[str] = "outlier-int8"
    changes_inputs: ClassVar[bool] = True
    threshold: float
    outliers: str
    stored_columns: int = 0
    stored_dtype: str = "int8"
    granularity: str = "vector"
    compat: bool = False

    def __post_init__(self) -> None:
        for field, value, known in (
            ("outliers", self.outliers, OUTLIERS),
            ("granularity", self.granularity, GRANULARITIES),
            ("stored_dtype", self.stored_dtype, tuple(DTYPES)),
        ):
            if value not in known:
                raise ValueError(f"{field} must be one of {', '.join(known)}, got {value!r}")
        if self.outliers == "dynamic" and not self.threshold > 0:
            raise ValueError(f"threshold must be positive, got {self.threshold}")
        if self.stored_columns < 0 or (self.stored_columns and self.outliers == "none"):
            raise ValueError(f"stored_columns is {self.stored_columns} with outliers {self.outliers!r}")
        if self.stored_columns and self.outliers == "dynamic" and self.stored_dtype == "int8":
            raise ValueError(
                "columns found at run time need no list: stored_columns must be 0 with stored_dtype 'int8'"
            )

    def specs(self, rows: int, columns: int) -> dict[str, TensorSpec]:
        """codes int8 (rows, columns), absmax float32 (rows,) or (1,); for k stored columns: outlier_index int32 (k,)
        and, unless their weights are the codes, outlier_weight (rows, k) in 16 bit."""
        count = rows if self.granularity == "vector" else 1
        out = {"codes": TensorSpec((rows, columns), torch.int8), "absmax": TensorSpec((count,), torch.float32)}
        if self.stored_columns:
            out["outlier_index"] = TensorSpec((self.stored_columns,), torch.int32)
            if self.stored_dtype != "int8":
                out["outlier_weight"] = TensorSpec((rows, self.stored_columns), DTYPES[self.stored_dtype])
        return out

    def unpack(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        """float32 (rows, columns): a_i c_ij / 127, or the 16-bit value where one is stored."""
        out = dequantise(tensors["codes"], tensors["absmax"])
        if "outlier_weight" in tensors:
            out[:, tensors["outlier_index"].long()] = tensors["outlier_weight"].float()
        return out

    def unpack_rows(self, tensors: Mapping[str, Tensor], rows: int, columns: int, index: Tensor) -> Tensor:
        """Only the asked rows are decoded."""
        return self.unpack(self._rows(tensors, index), len(index), columns)

    def linear(
        self, inputs: Tensor, tensors: Mapping[str, Tensor], rows: int, columns: int, bias: Tensor | None = None
    ) -> Tensor:
        """y of the top of this file, with the integers summed in float64 (exact up to 2^53)."""
        return self.linear_with(float64_product, inputs, tensors, rows, columns, bias)

    def linear_with(
        self,
        product: IntegerProduct,
        inputs: Tensor,
        tensors: Mapping[str, Tensor],
        rows: int,
        columns: int,
        bias: Tensor | None = None,
    ) -> Tensor:
        """The same by another exact product of INT8 matrices: the same bits. Gradients pass straight through."""

        def run(inputs: Tensor, bias: Tensor | None) -> Tensor:
            flat = inputs.reshape(-1, columns)
            split = self.split(flat, tensors)
            large = flat[:, split.outliers].double()
            out = torch.empty(len(flat), rows, dtype=inputs.dtype, device=inputs.device)
            step = max(8, OUTPUTS_AT_ONCE // max(1, len(flat)) // 8 * 8)  # multiples of 8, which GPUs ask for
            for start in range(0, rows, step):
                part = slice(start, start + step)
                of_rows = self._rows(tensors, part)
                sums = product(split.codes, of_rows["codes"]).double()
                small = sums.mul_(split.absmax.double() / LEVELS).mul_(of_rows["absmax"].double() / LEVELS)
                if bias is not None:
                    small += bias[part].to(inputs.dtype)
                weights = self._outlier_weights(of_rows, split.outliers)
                if self.compat:
                    small, weights = small.to(inputs.dtype).double(), weights.to(inputs.dtype)
                out[:, part] = small.addmm_(large, weights.double().T)
            return out.reshape(*inputs.shape[:-1], rows)

        return straight_through(run, lambda: self.unpack(tensors, rows, columns), inputs, bias)

    def split(self, inputs: Tensor, tensors: Mapping[str, Tensor]) -> SplitInputs:
        """Find the outlier columns of (tokens, columns) and round the rest; the inputs are not changed.

        Statistics and codes are computed in float32. Rows that hold NaN have absmax NaN, and so does their output. Only
        "dynamic" waits for the device (it must know how many columns there are).
        """
        values = (inputs.half() if self.compat else inputs).float()
        magnitude = values.abs()
        if self.outliers == "dynamic":
            crossing = magnitude >= self.threshold
            outliers = crossing.any(0).nonzero().squeeze(1)
            if self.compat:
                magnitude.masked_fill_(crossing, 0)
        else:
            stored = tensors.get("outlier_index")
            outliers = torch.empty(0, dtype=torch.int64, device=inputs.device) if stored is None else stored.long()
        if not self.compat:
            magnitude.index_fill_(1, outliers, 0)
        absmax = magnitude.amax(1, keepdim=True)
        if self.granularity == "tensor" and len(absmax):
            absmax = absmax.amax(0, keepdim=True)
        return SplitInputs(quantise(values, absmax).index_fill_(1, outliers, 0), absmax, outliers)

    def _rows(self, tensors: Mapping[str, Tensor], index: Tensor | slice) -> dict[str, Tensor]:
        """The tensors of some rows of the weight."""
        shared = {"outlier_index"} if self.granularity == "vector" else {"outlier_index", "absmax"}
        return {name: tensor if name in shared else tensor[index] for name, tensor in tensors.items()}

    def _outlier_weights(self, tensors: Mapping[str, Tensor], outliers: Tensor) -> Tensor:
        """v of the outlier columns (k,): float32 (rows, k)."""
        if self.outliers == "static" and "outlier_weight" in tensors:
            return tensors["outlier_weight"].float()
        decoded = dequantise(tensors["codes"].index_select(1, outliers), tensors["absmax"])
        if "outlier_weight" not in tensors:
            return decoded
        index = tensors["outlier_index"].long()
        place = torch.searchsorted(index, outliers).clamp_(max=self.stored_columns - 1)
        return torch.where(index[place] == outliers, tensors["outlier_weight"][:, place].float(), decoded)


def quantise(values: Tensor, absmax: Tensor) -> Tensor:
    """rint(127 values / absmax), halves to even, as int8: |code| <= 127, and 0 where absmax is 0.

    Args:
        values: float32 (k, m).
        absmax: float32 (k, 1) or (1, 1), no smaller than the magnitudes it is for; others are clamped.
    """
    return (values * (LEVELS / absmax.clamp(min=SMALLEST))).round_().clamp_(-LEVELS, LEVELS).to(torch.int8)


def dequantise(codes: Tensor, absmax: Tensor) -> Tensor:
    """absmax codes / 127: float32 (rows, m) from int8 (rows, m) and float32 (rows,) or (1,)."""
    return codes.float() * (absmax / LEVELS).unsqueeze(1)


def float64_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right.T of int8 matrices as float64: exact, and the oracle of every other product."""
    wide = left.double()
    parts = [wide @ part.double().T for part in torch.split(right, WEIGHT_ROWS_AT_ONCE)]
    return torch.cat(parts, 1)
