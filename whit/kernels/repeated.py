"""Launching a Triton kernel again without what Triton works out at every call.

Triton compiles a kernel for the types of its arguments, for integers that are 1 or multiples of 16, for addresses that
are multiples of 16, and for constants; finding the compiled one again takes the host some 40 microseconds (Triton 3.6).
Here all but the addresses is said once; a launch looks at those and starts what was compiled, as Triton's documentation
does with a kernel compiled ahead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from whit.kernels.calling import unobserved


def followed(tensor: Tensor) -> bool:
    """Whether an ordinary call with this tensor reaches a GPU: nobody traces it, and it is not interpreted."""
    return tensor.is_cuda and unobserved(tensor)


class Repeated:
    """`kernel[grid](*tensors, *numbers, **constants, **options)` with other tensors of the same types on one device.

    Args:
        kernel: made by `triton.jit`, with parameters in this order: tensors, numbers, constants.
    """

    __slots__ = ("_constants", "_grid", "_keeps", "_kernel", "_numbers", "_options", "_rest", "_start")

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        numbers: tuple[int | float, ...],
        constants: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> None:
        self._kernel, self._grid, self._numbers = kernel, grid, numbers
        self._constants, self._options = constants, options
        self._start: Any = None
        self._rest: tuple[Any, ...] = ()
        self._keeps = True

    def launch(self, *tensors: Tensor) -> None:
        """Enqueue on the current stream of the tensors' device, which must be the current one."""
        aligned = self._keeps and followed(tensors[0])
        if aligned:
            meeting = 0
            for tensor in tensors:
                meeting |= tensor.data_ptr()
            aligned = meeting % 16 == 0
        if aligned and self._start is not None:
            try:
                self._start(*tensors, *self._rest)
                return
            except TypeError:  # a version of Triton that wants other arguments; it has launched nothing
                self._keeps = aligned = False
        compiled = self._kernel[self._grid](*tensors, *self._numbers, **self._constants, **self._options)
        if aligned and compiled is not None:
            names = self._kernel.arg_names[len(tensors) + len(self._numbers) :]
            self._rest = (*self._numbers, *(self._constants[name] for name in names))
            self._start = compiled[(*self._grid, 1, 1)[:3]]
