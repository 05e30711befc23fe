"""Products of a packed weight on CUDA with all that does not change from call to call worked out, and their ops.

A product is made once for a weight, the type of x and a class of numbers of vectors (`whit.kernels.cuda_linear` keeps
it with the weight); a call allocates the result, fills in addresses and launches.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from whit.kernels.cuda_decode import SHAPE, decode_grid, decode_shared
from whit.kernels.cuda_layout import Layout
from whit.kernels.cuda_ops import (
    Weight,
    address_of,
    aligned,
    choice,
    compiled,
    decoder,
    device_limits,
    layout_from,
    operand_of,
    size_class,
    starts_early,
    weight_of,
)
from whit.kernels.cuda_plan import Launch
from whit.kernels.cuda_wide import BOX, Decode, WideShape, shared_bytes, stages_codes
from whit.kernels.driver import Argument, Kernel, PreparedLaunch, TensorMap, on_device, tensor_map


@dataclass(frozen=True)
class Stored:
    """A packed weight on a device as its kernels take it.

    Attributes:
        layout: what the kernels are compiled for.
        tensors: those that the layout names, in its order, each at a multiple of 16 bytes.
        rows, columns: of the weight.
        index: number of the device.
        settled: no kernel that may still run writes the tensors.
    """

    layout: Layout
    tensors: list[Tensor]
    rows: int
    columns: int
    index: int
    settled: bool = True

    @classmethod
    def given(cls, layout: list[int], tensors: list[Tensor], rows: int, columns: int) -> Stored:
        """What an op was given, copied where a tensor lies elsewhere."""
        mine, index = aligned(tensors), tensors[0].device.index
        settled = all(own is item for own, item in zip(mine, tensors, strict=True))
        return cls(layout_from(layout), mine, rows, columns, index, settled)

    @property
    def early(self) -> bool:
        """Whether a kernel may read the weight while the kernel before it still runs."""
        return self.settled and starts_early(self.index)

    def weight(self) -> Weight:
        """The argument of kernels."""
        return weight_of(self.layout, self.tensors, self.rows, self.columns)


Product = Callable[[Tensor, Tensor | None], Tensor]
"""(x (m, columns), bias), both contiguous, of one type, on the current device -> (m, rows)."""


class OneLaunch:
    """By one launch of a kernel that takes x, the weight, a bias and the result, and then numbers.

    Args:
        stored: the weight.
        run: the kernel.
        grid, threads, shared, cluster: as of `Kernel.launch`.
        numbers: the last arguments.
        operand: the weight as this kernel takes it; default: as most do.
        counted: the number of vectors stands before `numbers`.
    """

    def __init__(
        self,
        stored: Stored,
        run: Kernel,
        grid: int,
        threads: int,
        shared: int,
        numbers: Sequence[int],
        *,
        cluster: int = 1,
        operand: Argument | None = None,
        counted: bool = False,
    ) -> None:
        self._stored, self._grid, self._counted = stored, grid, counted
        opened = [None] * (2 + counted)
        arguments = [None, operand or stored.weight(), *opened, *(ctypes.c_int(number) for number in numbers)]
        self._launch = PreparedLaunch(run, threads, shared, arguments, early=stored.early, cluster=cluster)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See `Product`."""
        x = x if x.data_ptr() % 16 == 0 else x.clone()
        vectors = x.shape[0]
        out = x.new_empty(vectors, self._stored.rows)
        given = (x.data_ptr(), address_of(bias), out.data_ptr())
        self._launch.start(self._grid, *given, *((vectors,) if self._counted else ()))
        return out


def few_product(stored: Stored, launch: Launch, tokens: int, bfloat: bool) -> OneLaunch:
    """By `gemv` or `small`."""
    run = compiled(stored.layout, launch, tokens, bfloat, stored.index)
    operand = operand_of(stored.layout, launch.shape, stored.tensors, stored.rows, stored.columns)
    geometry, numbers = (launch.grid, launch.shape.threads, launch.shared), (launch.chunk, launch.tiles)
    return OneLaunch(stored, run, *geometry, numbers, cluster=launch.shape.share, operand=operand, counted=tokens > 1)


class WideProduct:
    """By `wide`, whose tiles depend on the number of vectors."""

    MOST_COUNTS = 64

    def __init__(self, stored: Stored, launch: WideShape, tokens: int, bfloat: bool) -> None:
        self._stored, self._shape, self._tokens, self._bfloat = stored, launch, tokens, bfloat
        self._weight = stored.weight()
        self._codes: TensorMap | None = None
        if stages_codes(stored.layout, launch):
            lines = 64 * launch.row_groups
            self._codes = tensor_map(stored.tensors[0].data_ptr(), stored.rows, stored.layout.width // 2, lines, BOX)
        self._launches: dict[WideShape, PreparedLaunch] = {}
        self._parts: dict[int, list[tuple[PreparedLaunch, int, int]]] = {}

    def _launch(self, shape: WideShape) -> PreparedLaunch:
        stored = self._stored
        run = compiled(stored.layout, shape, self._tokens, self._bfloat, stored.index)
        arguments = [None, None, self._weight, None, None, None, None]
        shared = shared_bytes(stored.layout, shape)
        return PreparedLaunch(run, shape.threads, shared, arguments, early=stored.early, cluster=shape.splits)

    def _parts_of(self, vectors: int) -> list[tuple[PreparedLaunch, int, int]]:
        """Launches, their thread blocks and their first tiles."""
        found, stored = list[tuple[PreparedLaunch, int, int]](), self._stored
        for shape, first, tiles in self._shape.parts(stored.rows, vectors, device_limits(stored.index)[1]):
            launch = self._launches.get(shape)
            if launch is None:
                launch = self._launches[shape] = self._launch(shape)
            found.append((launch, tiles * shape.splits, first))
        if len(self._parts) >= self.MOST_COUNTS:
            self._parts = {}
        self._parts[vectors] = found
        return found

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See `Product`."""
        x = x if x.data_ptr() % 16 == 0 else x.clone()
        vectors, columns = x.shape
        out = x.new_empty(vectors, self._stored.rows)
        boxes = tensor_map(x.data_ptr(), vectors, columns, self._shape.tokens, BOX)
        given = (boxes, self._codes or boxes, address_of(bias), out.data_ptr(), vectors)
        for launch, grid, first in self._parts.get(vectors) or self._parts_of(vectors):
            launch.start(grid, *given, first)
        return out


class Decoder:
    """By `decode`, several weights of one layout and width into one dense matrix (sum of rows, columns)."""

    def __init__(self, weights: Sequence[Stored], dtype: torch.dtype) -> None:
        first, self._dtype = weights[0], dtype
        layout, columns, index = first.layout, first.columns, first.index
        self._tensors = [stored.tensors for stored in weights]
        self._like, self._shape = first.tensors[0], (sum(stored.rows for stored in weights), columns)
        run = decoder(layout, columns, dtype == torch.bfloat16, index)
        self._launches: list[tuple[PreparedLaunch, int, int]] = []
        offset, shared = 0, decode_shared(layout, columns)
        for stored in weights:
            grid = decode_grid(layout, stored.rows, columns, device_limits(index)[1])
            launch = PreparedLaunch(run, SHAPE.threads, shared, [stored.weight(), None], early=stored.early)
            self._launches.append((launch, grid, offset))
            offset += stored.rows * columns * dtype.itemsize

    def __call__(self) -> Tensor:
        """The dense matrix, on the current device."""
        out = self._like.new_empty(self._shape, dtype=self._dtype)
        address = out.data_ptr()
        for launch, grid, offset in self._launches:
            launch.start(grid, address + offset)
        return out


class DecodedProduct:
    """By a library's product with the decoded weight."""

    def __init__(self, stored: Stored, dtype: torch.dtype) -> None:
        self._decode = Decoder([stored], dtype)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See `Product`."""
        return torch.nn.functional.linear(x, self._decode(), bias)


def product_of(stored: Stored, vectors: int, dtype: torch.dtype) -> Product:
    """What multiplies a weight by `vectors` vectors, on the current device.

    Raises:
        CompilationError: the kernel cannot be compiled here.
    """
    bfloat, tokens = dtype == torch.bfloat16, size_class(stored.layout, vectors)
    launch = choice(stored.layout, stored.rows, stored.columns, tokens, stored.index)
    if isinstance(launch, Decode):
        return DecodedProduct(stored, dtype)
    if isinstance(launch, WideShape):
        return WideProduct(stored, launch, tokens, bfloat)
    return few_product(stored, launch, tokens, bfloat)


def multiply_packed(
    x: Tensor, tensors: list[Tensor], bias: Tensor | None, layout: list[int], rows: int, columns: int
) -> Tensor:
    """x (m, columns), contiguous, times the packed weight: (m, rows). See `whit/kernels/cuda_linear.py`."""
    with on_device(x.device.index):
        return product_of(Stored.given(layout, tensors, rows, columns), len(x), x.dtype)(x, bias)


packed_product = torch.library.custom_op("whit::packed_product", multiply_packed, mutates_args=(), device_types="cuda")


@packed_product.register_fake
def _(x: Tensor, tensors: list[Tensor], bias: Tensor | None, layout: list[int], rows: int, columns: int) -> Tensor:
    return x.new_empty(x.shape[0], rows)


def decode_weight(tensors: list[Tensor], layout: list[int], rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """The dense weight (rows, columns) in float16 or bfloat16: `unpack().to(dtype)`, value for value."""
    with on_device(tensors[0].device.index):
        return Decoder([Stored.given(layout, tensors, rows, columns)], dtype)()


decoded_weight = torch.library.custom_op("whit::decoded_weight", decode_weight, mutates_args=(), device_types="cuda")


@decoded_weight.register_fake
def _(tensors: list[Tensor], layout: list[int], rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return tensors[0].new_empty(rows, columns, dtype=dtype)
