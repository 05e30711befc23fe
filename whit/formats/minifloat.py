"""Number systems of 2 to 8 bits: small floats of any exponent and mantissa width, and symmetric integers.

A small float with e exponent and m mantissa bits, bias b = 2^(e-1) - 1, exponent code E and mantissa code M is

    E = 0:  (-1)^s 2^(1-b) M / 2^m         E > 0:  (-1)^s 2^(E-b) (1 + M / 2^m)

Names follow the field (ml_dtypes, torch): `e4m3` reserves the largest exponent code for infinity and NaN as IEEE 754
does (maximum 240), `e4m3fn` uses it (maximum 448; its one all-ones code stays NaN, as the OCP 8-bit specification
wants). The other `fn` systems use every code. `int8` is two's complement without -128. Codes of e4m3, e4m3fn and e5m2
are the bytes of torch's float8 types, codes of int8 those of torch.int8.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from whit.errors import nearest

MENUS: dict[int, tuple[str, ...]] = {
    8: ("int8", "e3m4", "e4m3", "e2m5", "e5m2"),
    6: ("int6", "e2m3", "e3m2"),
    4: ("int4", "e1m2", "e2m1", "e3m0"),
}
"""The systems of each width in the order in which ties are decided. Zhang et al. 2023, arXiv 2310.13513."""

_NATIVE = {
    "int8": torch.int8,
    "e4m3": torch.float8_e4m3fn,  # its codes up to 240 are those of the OCP type
    "e4m3fn": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class NumberSystem(ABC):
    """A finite set of numbers, symmetric about zero, and their codes of `bits` bits.

    Attributes:
        name: "int8", "e4m3fn", ...
        bits: width of a code, sign included.
    """

    name: str
    bits: int

    @property
    @abstractmethod
    def is_integer(self) -> bool:
        """Whether multiplying needs integer hardware (a flexible unit may forbid mixing it with floats)."""

    @property
    @abstractmethod
    def maximum(self) -> float:
        """The largest number."""

    @property
    @abstractmethod
    def smallest(self) -> float:
        """The least positive number, of which every number is a whole multiple."""

    @abstractmethod
    def code_values(self) -> list[float]:
        """What each of the 2**bits codes stands for; NaN or infinite for those that are never written."""

    @abstractmethod
    def encode(self, values: Tensor) -> Tensor:
        """Codes, uint8 of the same shape, of the numbers nearest to finite `values`; beyond the maximum it saturates.

        Half way between two numbers the even mantissa (or integer) is taken.
        """

    @abstractmethod
    def round(self, values: Tensor) -> Tensor:
        """The numbers that `encode` chooses, float32; NaN stays NaN."""

    @abstractmethod
    def spacing(self, values: Tensor) -> Tensor:
        """Distance between neighbouring numbers at the magnitude of each value, float32."""

    @property
    def native(self) -> torch.dtype | None:
        """The torch dtype whose bytes the codes are, or None."""
        return _NATIVE.get(self.name)

    def decode(self, codes: Tensor) -> Tensor:
        """float32 numbers of uint8 codes, exactly."""
        if self.native == torch.int8:
            return codes.view(torch.int8).float()
        table = _table(self, codes.device)
        return table.index_select(0, codes.reshape(-1).int()).reshape(codes.shape)

    def numbers(self) -> Tensor:
        """Every number of the system once, ascending, float32."""
        values = torch.tensor(self.code_values(), dtype=torch.float32)
        distinct: Tensor = torch.unique(values[values.abs() <= self.maximum] + 0.0)  # + 0 makes -0 and 0 one
        return distinct

    def multiplier(self, dtype: torch.dtype) -> float | None:
        """A power of two k for which k times every number is exact in `dtype` (a float8 type or int8), or None.

        It is how a product of this system runs on hardware that knows only `dtype`: e2m1 weights as float8_e4m3fn,
        or e2m5 numbers (whole multiples, up to 126, of 1/32) as int8.
        """
        return _multiplier(self, dtype)


@dataclass(frozen=True)
class Minifloat(NumberSystem):
    """A small float. `unused` codes at the top of each sign stand for infinity or NaN."""

    exponent_bits: int
    mantissa_bits: int
    unused: int

    @property
    def is_integer(self) -> bool:
        """False."""
        return False

    @property
    def bias(self) -> int:
        """What is subtracted from the exponent code: 2^(e-1) - 1."""
        return int(2 ** (self.exponent_bits - 1)) - 1

    @property
    def largest_code(self) -> int:
        """Code of the maximum."""
        return int(2 ** (self.bits - 1)) - 1 - self.unused

    @property
    def maximum(self) -> float:
        """The number of the largest code."""
        return self._value(self.largest_code)

    @property
    def smallest(self) -> float:
        """The subnormal spacing 2^(1-bias-m)."""
        return float(2.0 ** (self._lowest - self.mantissa_bits))

    @property
    def _lowest(self) -> int:
        """Exponent of the smallest normal numbers; subnormals have the same spacing."""
        return 1 - self.bias

    def _value(self, code: int) -> float:
        exponent, mantissa = divmod(code, 1 << self.mantissa_bits)
        if exponent == 0:
            return float(mantissa * self.smallest)
        return float((2**self.mantissa_bits + mantissa) * 2.0 ** (exponent - self.bias - self.mantissa_bits))

    def code_values(self) -> list[float]:
        """By the equation at the top of this file; unused codes are infinite (mantissa 0, if all are) or NaN."""
        top = 1 << self.mantissa_bits
        ieee = self.unused == top
        values = []
        for code in range(2 ** (self.bits - 1)):
            unused = torch.inf if ieee and code % top == 0 else torch.nan
            values.append(self._value(code) if code <= self.largest_code else unused)
        return values + [-value for value in values]

    def _split(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Whole significands, and exponents of their binades, of the nearest numbers to |values|."""
        magnitude = values.float().abs().clamp(max=self.maximum)
        exponent = self._exponent(magnitude)
        return torch.round(magnitude / _power_of_two(exponent - self.mantissa_bits)), exponent

    def _exponent(self, magnitude: Tensor) -> Tensor:
        # The exponent field of the float32 itself: log2 misplaces exact powers of two, frexp gives zero the exponent 0.
        highest = max(self.largest_code >> self.mantissa_bits, 1) - self.bias
        return ((magnitude.view(torch.int32) >> 23) - 127).clamp_(self._lowest, highest)

    def encode(self, values: Tensor) -> Tensor:
        """A significand of 2^(m+1) is the next binade's 2^m, and the sum of the fields carries by itself."""
        significand, exponent = self._split(values)
        code = significand.int() + ((exponent - self._lowest) << self.mantissa_bits)
        return (code | (torch.signbit(values).int() << (self.bits - 1))).to(torch.uint8)

    def round(self, values: Tensor) -> Tensor:
        """Significand times spacing, with the sign of the value."""
        significand, exponent = self._split(values)
        return torch.copysign(significand * _power_of_two(exponent - self.mantissa_bits), values.float())

    def spacing(self, values: Tensor) -> Tensor:
        """2^(exponent - m); that of the subnormals below the smallest normal number."""
        return _power_of_two(self._exponent(values.float().abs().clamp(max=self.maximum)) - self.mantissa_bits)


@dataclass(frozen=True)
class SymmetricInteger(NumberSystem):
    """Whole numbers -(2^(bits-1) - 1) .. 2^(bits-1) - 1; codes are two's complement."""

    @property
    def is_integer(self) -> bool:
        """True."""
        return True

    @property
    def maximum(self) -> float:
        """127 for 8 bits."""
        return float(2 ** (self.bits - 1) - 1)

    @property
    def smallest(self) -> float:
        """One."""
        return 1.0

    def code_values(self) -> list[float]:
        """Two's complement; the most negative code is never written."""
        half = 2 ** (self.bits - 1)
        return [float(code if code < half else code - 2 * half) for code in range(2 * half)]

    def encode(self, values: Tensor) -> Tensor:
        """Round half to even, saturate, keep the low bits."""
        codes: Tensor = self.round(values).to(torch.int16) & (2**self.bits - 1)
        return codes.to(torch.uint8)

    def round(self, values: Tensor) -> Tensor:
        """Round half to even and saturate."""
        return torch.round(values.float()).clamp_(-self.maximum, self.maximum)

    def spacing(self, values: Tensor) -> Tensor:
        """One everywhere."""
        return torch.ones_like(values, dtype=torch.float32)


@lru_cache(maxsize=64)
def number_system(name: str) -> NumberSystem:
    """The number system of a name: `int2` to `int8`, or `e<exponent bits>m<mantissa bits>` with or without `fn`.

    Raises:
        ValueError: no such name, more than 8 bits, or a system without a finite number besides zero.
    """
    match = re.fullmatch(r"int([2-8])|e([1-5])m([0-6])(fn)?", name)
    known = (*(item for menu in MENUS.values() for item in menu), "e4m3fn", "e2m1fn")
    if match is None:
        raise ValueError(f"unknown number system {name!r}{nearest(name, known)} (for example: {', '.join(known)})")
    if match[1]:
        return SymmetricInteger(name, int(match[1]))
    exponent_bits, mantissa_bits = int(match[2]), int(match[3])
    bits = 1 + exponent_bits + mantissa_bits
    if bits > 8:
        raise ValueError(f"number system {name!r} has {bits} bits: at most 8 can be stored")
    unused = 2**mantissa_bits if not match[4] else int(name == "e4m3fn")
    if 2 ** (bits - 1) - 1 - unused < 1:
        raise ValueError(f"number system {name!r} has no finite number besides zero: use {name + 'fn'!r}")
    return Minifloat(name, bits, exponent_bits, mantissa_bits, unused)


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent, float32, for int32 exponents from -126 to 127: exact on every device, being the bits themselves."""
    power: Tensor = ((exponent + 127) << 23).view(torch.float32)
    return power


@lru_cache(maxsize=64)
def _table(system: NumberSystem, device: torch.device) -> Tensor:
    return torch.tensor(system.code_values(), dtype=torch.float32, device=device)


@lru_cache(maxsize=256)
def _multiplier(system: NumberSystem, dtype: torch.dtype) -> float | None:
    factor = 1 / system.smallest if dtype == torch.int8 else 1.0
    scaled = system.numbers() * factor
    exact = scaled.abs().max() <= 127 if dtype == torch.int8 else bool((scaled.to(dtype).float() == scaled).all())
    return factor if exact else None
