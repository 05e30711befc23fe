"""Vector quantisation of neighbouring groups of columns as one kernel per block of groups; on a GPU with NVRTC.

Groups of a row are taken in turn, rows never meet. With the errors E of the groups before, B the columns of a group and
the codeword c nearest to t, that is of least ||(t - a c) T||^2,

    feedback:  t_B = w_B - E U_before,B,                        E_B = (t_B - a c) T,   T = U_BB^-1
    descent:   t_B = q_B + (g_B - E H_before,B) H_BB^-1,         E_B = a c - q_B,       T T^T = H_BB

The loops of `whit.methods.group_feedback` are the plain meaning.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from whit.kernels import nvrtc
from whit.kernels.columns import nvrtc_found

THREADS, LANES = 128, 8
WIDEST = 16
MOST_GROUPS = 12
_KIND = "loops over groups of columns"


def available(device: torch.device, width: int) -> bool:
    """Whether the kernel takes groups of that many columns there."""
    return device.type == "cuda" and width <= WIDEST and nvrtc_found() and not nvrtc.failed(_KIND)


def attempted(launch: Callable[..., object], *arguments: object) -> bool:
    """Call `Words.take`; False, and nothing changed, if the kernel cannot be compiled."""
    return not nvrtc.failed(_KIND) and nvrtc.attempted(_KIND, launch, *arguments)


@dataclass(frozen=True)
class Words:
    """A codebook prepared for the groups of a matrix.

    Args:
        words: float32 (K/2, d).
        scales: of the rows, float32 (rows,).
        metric: T of each group, float32 (groups, d, d), zeros where a group is narrower.
        bounds: first column of each group, and the end, int32 (groups + 1,).
        inverse: H_BB^-1 of each group for descent, as `metric`; None for feedback.
    """

    words: Tensor
    scales: Tensor
    metric: Tensor
    bounds: Tensor
    inverse: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("words", "scales", "metric", "inverse"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else value.contiguous())
        rotated = (self.words @ self.metric).contiguous()
        object.__setattr__(self, "_rotated", rotated)
        object.__setattr__(self, "_lengths", rotated.square().sum(2))

    def take(
        self,
        first: int,
        count: int,
        values: Tensor,
        gradient: Tensor,
        inner: Tensor,
        codes: Tensor,
        errors: Tensor,
        results: Tensor,
    ) -> None:
        """Round some groups, with feedback or (if there is an `inverse`) by descent.

        Args:
            first, count: numbers of the groups, at most `MOST_GROUPS`.
            values: w, or q for descent, float32 (rows, columns of the groups).
            gradient: g, (rows, columns); any tensor for feedback.
            inner: U, or H, between these columns.
            codes: int64 (rows, count), written.
            errors: E, (rows, columns), written.
            results: t, or the new q for descent, (rows, columns), written. All with neighbouring columns side by side.
        """
        rows = len(values)
        inner = inner.contiguous()  # a small part of a matrix
        tensors = (values, gradient, inner, codes, errors, results)
        if count > MOST_GROUPS or any(tensor.stride(1) != 1 for tensor in tensors if tensor.shape[1] > 1):
            raise ValueError(f"the group kernel takes {MOST_GROUPS} groups of contiguous rows, got {count}")
        if not rows:
            return
        half, width = self.words.shape
        rotated, lengths = self.__dict__["_rotated"][first:], self.__dict__["_lengths"][first:]
        inverse = self.metric if self.inverse is None else self.inverse
        tables = (self.metric[first:], inverse[first:], rotated, lengths, self.words, self.scales, self.bounds[first:])
        given = (values, gradient, inner, *tables, codes, errors, results)
        numbers = (rows, count, *(item.stride(0) for item in (values, gradient, inner, codes, errors, results)))
        arguments: list[ctypes._SimpleCData[Any] | ctypes.Structure] = []
        arguments += [ctypes.c_void_p(tensor.data_ptr()) for tensor in given]
        arguments += [ctypes.c_int(number) for number in numbers]
        device = values.device.index
        with torch.cuda.device(device):
            options = cuda_options(width, half, self.inverse is not None)
            run = nvrtc.kernel(cuda_source(), "round_groups", options, device)
            run.launch(-(-rows * LANES // THREADS), THREADS, 0, arguments)


@lru_cache(maxsize=1)
def cuda_source() -> str:
    """CUDA C++ of the kernel; what `cuda_options` defines it needs."""
    return (files("whit.kernels") / "cuda" / "groups.cu").read_text(encoding="utf-8")


def cuda_options(width: int, words: int, descend: bool) -> tuple[str, ...]:
    """Definitions that choose one of the loops."""
    chosen = {"WIDTH": width, "COUNT": words, "DESCEND": descend, "THREADS": THREADS, "LANES": LANES}
    chosen["MOST"] = MOST_GROUPS * width
    return tuple(f"-D{name}={int(value)}" for name, value in chosen.items())
