"""The CUDA driver, by ctypes: loading compiled kernels, launching them, and what its errors mean."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, TypeAlias

import torch

from whit.errors import WhitError

_MAX_DYNAMIC_SHARED_MEMORY = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_CLUSTER_DIMENSION = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


_UINT16, _PROMOTION_256 = 1, 3  # CUtensorMapDataType, CUtensorMapL2promotion
_SWIZZLES = {128: 3, 64: 2, 32: 1}  # CUtensorMapSwizzle, by bytes

Argument: TypeAlias = "ctypes._SimpleCData[Any] | ctypes.Structure"
"""Of a kernel."""


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: a number, padding, and a value of 64 bytes of which the first three ints are used."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 3), ("rest", ctypes.c_byte * 52))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", ctypes.c_uint),
    )


class TensorMap(ctypes.Structure):
    """CUtensorMap: what the tensor copy engine must know of an array; made by `tensor_map`."""

    _fields_ = (("words", ctypes.c_uint64 * 16),)


class CompilationError(WhitError):
    """A CUDA kernel could not be compiled, loaded or launched on this machine; nothing has run, another version can."""


class DeviceError(WhitError, RuntimeError):
    """The CUDA driver failed in a way that no other version of a kernel would mend."""


_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY
_NO_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT
_REFUSED = frozenset({1, 200, 209, 218, 221, 222, 223, 300, 301, 302, 303, 500, 701, 720, 801, 912})
"""Statuses by which a driver refuses this code or this launch and has done nothing: values out of range (1), images
without code for the device (200, 209), assembly it cannot compile (218 to 223), sources and symbols (300 to 303, 500),
more registers, blocks or cluster members than there are (701, 720, 912), and what the device has not (801)."""
_BROKEN = frozenset({214, 220, 226, 700, 702, 709, 710, *range(714, 720), 721})
"""Statuses after which nothing runs in this process's context: faults of memory, of a link or of a kernel before."""


@lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")


def _in_context(call: Callable[[], int]) -> int:
    """Status of a call to the driver, in the context that torch uses on the current device.

    A thread is in it after its first call of torch's that needs one, which taking kept memory or asking for the stream
    is not; a thread that has come to none yet is brought there.
    """
    status = call()
    if status != _NO_CONTEXT:
        return status
    driver, device, context = _driver(), ctypes.c_int(), ctypes.c_void_p()
    steps: tuple[Callable[[], int], ...] = (
        lambda: driver.cuDeviceGet(ctypes.byref(device), torch.cuda.current_device()),
        lambda: driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device),
        lambda: driver.cuCtxSetCurrent(context),
    )
    failed = next((status for step in steps if (status := step())), 0)
    return failed or call()


def _check(status: int, action: str) -> None:
    """Raise what a status of the driver means.

    Raises:
        torch.OutOfMemoryError: the device has no memory left.
        CompilationError: the driver refuses this kernel or launch; another may do.
        DeviceError: anything else, above all errors that leave nothing to launch with.
    """
    if not status:
        return
    found = ctypes.c_char_p()
    _driver().cuGetErrorString(status, ctypes.byref(found))
    message = f"CUDA driver could not {action}: {(found.value or b'unknown error').decode()}"
    if status == _OUT_OF_MEMORY:
        raise torch.OutOfMemoryError(
            f"{message} (end other programs on the device, give it less at once, or free what PyTorch keeps with "
            "torch.cuda.empty_cache())"
        )
    if status in _REFUSED:
        raise CompilationError(message)
    remedy = f"status {status}, which no other kernel would mend: see that nvidia-smi finds the device well"
    if status in _BROKEN:
        remedy = "nothing more runs on it in this process: start again; CUDA_LAUNCH_BLOCKING=1 shows which call it was"
    raise DeviceError(f"{message} ({remedy})")


@lru_cache(maxsize=8192)
def tensor_map(
    address: int, rows: int, columns: int, box_rows: int, box_columns: int, *, swizzled: bool = True
) -> TensorMap:
    """A matrix of 16-bit values (rows, columns), contiguous, to be copied in boxes.

    Args:
        address: of the matrix, a multiple of 16; a row must be one too, in bytes.
        rows: of the matrix; boxes that reach beyond are filled with zeros.
        columns: of the matrix.
        box_rows: at most 256.
        box_columns: a multiple of 8; swizzled 64, 32 or 16, the 128, 64 or 32 bytes of the swizzle.
        swizzled: pieces of 16 bytes change places with the rows, so that they meet fewer banks of shared memory.
    """
    room = (ctypes.c_uint8 * 192)()
    map_address = -(-ctypes.addressof(room) // 64) * 64
    status = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(map_address),
        _UINT16,
        2,
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * 2)(columns, rows),
        (ctypes.c_uint64 * 1)(columns * 2),
        (ctypes.c_uint32 * 2)(box_columns, box_rows),
        (ctypes.c_uint32 * 2)(1, 1),
        0,  # no interleaving
        _SWIZZLES[2 * box_columns] if swizzled else 0,
        _PROMOTION_256,
        0,  # zeros beyond the edges
    )
    _check(status, f"describe a matrix of {rows} x {columns}")
    return TensorMap.from_buffer_copy((ctypes.c_uint8 * 128).from_address(map_address))


_NO_CHANGE: AbstractContextManager[None] = nullcontext()


def on_device(index: int) -> AbstractContextManager[object]:
    """The context in which device number `index` is the current one; free where it is already."""
    return _NO_CHANGE if torch.cuda.current_device() == index else torch.cuda.device(index)


class Kernel:
    """One compiled function on one device."""

    MOST_KEPT = 64
    """Descriptions of launches kept, above which they are made anew."""

    def __init__(self, code: bytes, name: str) -> None:
        """Load `name` from machine code into the current device's context."""
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        self._code = code
        self._shared = 0
        self._configs: dict[tuple[int, ...], tuple[Any, ctypes.Array[_Attribute]]] = {}
        driver = _driver()
        _check(_in_context(lambda: driver.cuModuleLoadData(ctypes.byref(self._module), code)), "load a kernel")
        found = driver.cuModuleGetFunction(ctypes.byref(self._function), self._module, name.encode())
        _check(found, f"find the kernel {name!r}")

    def launch(
        self,
        grid: int,
        threads: int,
        shared: int,
        arguments: Sequence[Argument],
        *,
        early: bool = False,
        cluster: int = 1,
    ) -> None:
        """Enqueue on the current stream; returns at once.

        Args:
            grid: thread blocks.
            threads: per block.
            shared: bytes of dynamic shared memory per block.
            arguments: ctypes values in the order of the kernel's parameters.
            cluster: consecutive blocks that run together and read each other's shared memory (needs Hopper).
            early: let it start while the kernel before it ends (the kernel then waits by itself; needs Hopper).
        """
        pointers = (ctypes.c_void_p * len(arguments))(*[ctypes.addressof(value) for value in arguments])
        self.enqueue(grid, threads, shared, pointers, early=early, cluster=cluster)

    def enqueue(self, grid: int, threads: int, shared: int, pointers: Any, *, early: bool, cluster: int) -> None:
        """`launch` with what ctypes passes as a pointer to the addresses of the arguments."""
        if shared > self._shared:
            driver = _driver()
            status = _in_context(lambda: driver.cuFuncSetAttribute(self._function, _MAX_DYNAMIC_SHARED_MEMORY, shared))
            _check(status, f"reserve {shared} bytes of shared memory")
            self._shared = shared
        key = (grid, threads, shared, early, cluster, current_stream())
        kept = self._configs.get(key)
        if kept is None:
            if len(self._configs) >= Kernel.MOST_KEPT:
                self._configs = {}
            kept = self._configs[key] = _config(*key)
        start, function = _driver().cuLaunchKernelEx, self._function
        status = start(kept[0], function, pointers, None)
        if status == _NO_CONTEXT:
            status = _in_context(lambda: int(start(kept[0], function, pointers, None)))
        if status:
            _check(status, "launch a kernel")


# What torch's own compiled programs ask for the stream: a tenth of the time of making a `Stream`.
_RAW_STREAM: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def current_stream() -> int:
    """The handle of torch's current stream on the current device."""
    if _RAW_STREAM is None:
        return int(torch.cuda.current_stream().cuda_stream)
    return _RAW_STREAM(torch.cuda.current_device())


def _config(
    grid: int, threads: int, shared: int, early: bool, cluster: int, stream: int
) -> tuple[Any, ctypes.Array[_Attribute]]:
    """A reference to a launch's description, which the driver only reads, and the array that it points to."""
    attributes = (_Attribute * 2)()
    count = 0
    for wanted, number, value in (
        (early, _PROGRAMMATIC_STREAM_SERIALIZATION, (1, 0, 0)),
        (cluster > 1, _CLUSTER_DIMENSION, (cluster, 1, 1)),
    ):
        if wanted:
            attributes[count] = _Attribute(id=number, value=value)
            count += 1
    config = _Config(grid, 1, 1, threads, 1, 1, shared, stream, attributes, count)
    return ctypes.byref(config), attributes


class PreparedLaunch:
    """A launch of which only the grid and some arguments change from call to call; threads may share it.

    Args:
        kernel: what is launched.
        threads, shared, early, cluster: as of `Kernel.launch`.
        arguments: in the order of the kernel's parameters; None for one that every call gives.
    """

    __slots__ = ("_cluster", "_early", "_fixed", "_kernel", "_places", "_shared", "_template", "_threads")

    def __init__(
        self,
        kernel: Kernel,
        threads: int,
        shared: int,
        arguments: Sequence[Argument | None],
        *,
        early: bool = False,
        cluster: int = 1,
    ) -> None:
        self._kernel, self._threads, self._shared = kernel, threads, shared
        self._early, self._cluster = early, cluster
        self._fixed = list(arguments)  # kept: the addresses below are theirs
        opened = [place for place, value in enumerate(arguments) if value is None]
        addresses = [0 if value is None else ctypes.addressof(value) for value in arguments]
        count = len(opened)  # numbers, and behind them the addresses of all arguments
        self._template = (ctypes.c_uint64 * (count + len(arguments)))(*[0] * count, *addresses)
        self._places = [(number, count + place) for number, place in enumerate(opened)]

    def start(self, grid: int, *given: int | ctypes.Structure) -> None:
        """Enqueue on the current stream of the kernel's device, which must be the current one; returns at once.

        Args:
            grid: thread blocks.
            given: the arguments left open, in order: numbers and addresses of at most 8 bytes (the kernel reads as many
                of the lowest as its parameter has), or structures.
        """
        template, places = self._template, self._places
        room = type(template).from_buffer_copy(template)
        own = ctypes.addressof(room)
        for (number, place), value in zip(places, given, strict=True):
            if isinstance(value, int):
                room[number] = value
                room[place] = own + 8 * number
            else:
                room[place] = ctypes.addressof(value)
        pointers = ctypes.byref(room, 8 * len(places))
        self._kernel.enqueue(grid, self._threads, self._shared, pointers, early=self._early, cluster=self._cluster)
