"""CUDA versions of the packed product, for float16 and bfloat16 inputs on compute capability 8.0 and above.

    one vector          `cuda/gemv.cu`    bit planes on the binary or integer tensor cores
    2 to 32 vectors     `cuda/small.cu`   codes expanded in registers for the 16-bit tensor cores
    2 and more          `cuda/wide.cu`    codes expanded in registers for the warpgroup tensor cores (Hopper)
    otherwise           `cuda/decode.cu`  the weight decoded to 16 bits, then the library's matrix product

Stored tensors are read as they are: no second copy of a weight is kept. The ops are functional, have fake
implementations (torch.compile) and neither synchronise nor allocate anything but their result and, where the weight is
decoded, that weight for the time of the product.

Bounds, with u the unit roundoff of the type of x (2^-11, 2^-8), against the product in exact arithmetic:
    gemv           |error| <= u |y| + 2^-15.99 sum_blocks max|x_b| sum_j |w_ij| + 2^-18 sum_j |w_ij x_j|
                   (blocks of 128 columns, or of 256 where the group is a multiple of them or the whole row)
    otherwise      |error| <= u |y| + (u + 2^-18) sum_j |w_ij x_j|      (the u is the plain meaning's own rounding of w)
    after decoding, one u more of the same sum: the library's product may round parts of it
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from functools import lru_cache

import torch
from torch import Tensor

from whit.formats.base import Packed
from whit.kernels.calling import call, unobserved
from whit.kernels.cuda_layout import Layout, layout_of
from whit.kernels.cuda_ops import (
    FEW,
    choice,
    has_warpgroups,
    layout_fields,
    size_class,
)
from whit.kernels.cuda_products import (
    DecodedProduct,
    Stored,
    decode_weight,
    decoded_weight,
    multiply_packed,
    packed_product,
    product_of,
)
from whit.kernels.cuda_wide import WideShape, wide_supports
from whit.kernels.driver import on_device
from whit.kernels.linear import Implementation, Run, register_implementation
from whit.kernels.nvrtc import CompilationError, kernel

_ADDRESSED = 2**31  # bytes of a tensor that the kernels' 32-bit offsets reach


@lru_cache(maxsize=16)
def _compiles(index: int) -> bool:
    try:
        with torch.cuda.device(index):
            kernel('extern "C" __global__ void probe() {}', "probe", (), index)
    except (CompilationError, OSError) as error:
        warnings.warn(f"packed layers run in their plain version on CUDA device {index}: {error}", stacklevel=2)
        return False
    return True


def works(index: int) -> bool:
    """Whether kernels can be compiled for a device and loaded; says once why not."""
    if torch.version.cuda is None or torch.cuda.get_device_capability(index) < (8, 0):
        return False
    return torch.compiler.is_compiling() or _compiles(index)  # tracing cannot look for libraries


def usable(x: Tensor, packed: Packed) -> Layout | None:
    """The layout that a kernel reads the weight in, None where no kernel can take this call."""
    if not x.is_cuda or x.dtype not in (torch.float16, torch.bfloat16) or x.shape[-1:] != (packed.columns,):
        return None
    if x.requires_grad and torch.is_grad_enabled():  # the plain version has a derivative
        return None
    if not unobserved(x):
        return _readable(x.device, packed)
    answers = packed.memory.of(packed.tensors)
    question = ("layout", x.get_device())
    if question not in answers:
        answers[question] = _readable(x.device, packed)
    found: Layout | None = answers[question]
    return found


def _readable(device: torch.device, packed: Packed) -> Layout | None:
    """The layout of a weight that kernels on a device can read."""
    if min(packed.rows, packed.columns) == 0:
        return None
    if any(tensor.device != device or not tensor.is_contiguous() for tensor in packed.tensors.values()):
        return None
    if any(tensor.numel() * tensor.element_size() >= _ADDRESSED for tensor in packed.tensors.values()):
        return None
    return layout_of(packed.format, packed.columns) if works(device.index) else None


def vectors_of(x: Tensor) -> int:
    """How many vectors (..., columns) holds."""
    return x.numel() // x.shape[-1]


def _supports_one(x: Tensor, packed: Packed) -> bool:
    layout = usable(x, packed)
    return layout is not None and layout.multiplies and vectors_of(x) == 1


def _supports_few(x: Tensor, packed: Packed) -> bool:
    layout = usable(x, packed)
    return layout is not None and layout.expands and 2 <= vectors_of(x) <= FEW


def _supports_wide(x: Tensor, packed: Packed) -> bool:
    layout = usable(x, packed)
    if layout is None or vectors_of(x) < (2 if layout.multiplies else 1):
        return False
    index = x.device.index
    if not (has_warpgroups(index) and wide_supports(layout, packed.columns)):
        return False
    if torch.compiler.is_compiling():  # tracing cannot look into files of launch shapes; the op itself can
        return True
    tokens = size_class(layout, vectors_of(x))
    return isinstance(choice(layout, packed.rows, packed.columns, tokens, index), WideShape)


def _supports_many(x: Tensor, packed: Packed) -> bool:
    return usable(x, packed) is not None


def op_arguments(packed: Packed) -> tuple[list[Tensor], list[int]]:
    """Tensors and layout of a weight as the ops take them."""
    layout = layout_of(packed.format, packed.columns)
    assert layout is not None
    return [packed.tensors[name] for name in layout.names if name], layout_fields(layout)


ProductArguments = tuple[Tensor, list[Tensor], Tensor | None, list[int], int, int]


def product_arguments(x: Tensor, packed: Packed, bias: Tensor | None) -> ProductArguments:
    """What every op of a product takes: x (vectors, columns), tensors, bias in the type of x, layout, rows, columns."""
    tensors, layout = op_arguments(packed)
    flat = x.reshape(-1, packed.columns).contiguous()
    bias = None if bias is None else bias.detach().to(x.dtype).contiguous()
    return flat, tensors, bias, layout, packed.rows, packed.columns


def stored_of(packed: Packed, layout: Layout) -> Stored | None:
    """A weight that `usable` accepts as its kernels take it; None if a tensor must be copied for them at each call."""
    tensors = [packed.tensors[name] for name in layout.names if name]
    if any(tensor.data_ptr() % 16 for tensor in tensors):
        return None
    return Stored(layout, tensors, packed.rows, packed.columns, tensors[0].device.index)


def prepared(
    x: Tensor, packed: Packed, question: tuple[Hashable, ...], make: Callable[[Stored], Run | None]
) -> Run | None:
    """What `make` gives for a weight, run with its device as the current one.

    Args:
        x: inputs that `usable` accepts.
        question: what `make` depends on beside the weight and the type of x; asked once.
    """
    layout = usable(x, packed)
    stored = None if layout is None else stored_of(packed, layout)
    if stored is None:
        return None
    answers, index = packed.memory.of(packed.tensors), stored.index
    question = (*question, x.dtype)
    if question not in answers:
        with on_device(index):
            answers[question] = make(stored)
    product: Run | None = answers[question]
    if product is None:
        return None

    def run(x: Tensor, bias: Tensor | None) -> Tensor:
        with on_device(index):
            return product(x, bias)

    return run


def _product(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    out = call(x, multiply_packed, packed_product, *product_arguments(x, packed, bias))
    return out.reshape(*x.shape[:-1], packed.rows)


def _prepare_product(x: Tensor, packed: Packed) -> Run | None:
    vectors, layout = vectors_of(x), usable(x, packed)
    tokens = 0 if layout is None else size_class(layout, vectors)
    return prepared(x, packed, ("product", tokens), lambda stored: product_of(stored, vectors, x.dtype))


def _decoded_product(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    tensors, layout = op_arguments(packed)
    weight = call(x, decode_weight, decoded_weight, tensors, layout, packed.rows, packed.columns, x.dtype)
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _prepare_decoded(x: Tensor, packed: Packed) -> Run | None:
    return prepared(x, packed, ("decoded",), lambda stored: DecodedProduct(stored, x.dtype))


for _name, _supports in (("cuda warpgroup product", _supports_wide), ("cuda bit-plane gemv", _supports_one)):
    register_implementation("signed-levels", Implementation(_name, _supports, _product, _prepare_product))
# The last one registered is asked first.
for _format in ("binary-residual", "level-table", "grouped-integer", "vector-codebook", "structured-binary"):
    register_implementation(
        _format, Implementation("cuda decode + matmul", _supports_many, _decoded_product, _prepare_decoded)
    )
    register_implementation(
        _format, Implementation("cuda tensor-core product", _supports_few, _product, _prepare_product)
    )
    register_implementation(
        _format, Implementation("cuda warpgroup product", _supports_wide, _product, _prepare_product)
    )
    register_implementation(_format, Implementation("cuda bit-plane gemv", _supports_one, _product, _prepare_product))
