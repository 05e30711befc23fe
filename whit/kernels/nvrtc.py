"""Compile CUDA C++ at first use with NVRTC (it comes with PyTorch's CUDA builds; no toolkit is needed).

Compiled kernels are kept in `$XDG_CACHE_HOME/whit/kernels` (default `~/.cache`; `$WHIT_CACHE/kernels` if that is set),
named by a hash of source, options and the CUDA version of PyTorch, so that only the first process on a machine waits.
What loads and launches them (`whit.kernels.driver`) is at hand here, too.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import warnings
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

import torch

from whit.cache import cache_directory, whole_file
from whit.formats.memory import Memory
from whit.kernels.driver import Argument, CompilationError, DeviceError, Kernel, TensorMap, tensor_map

__all__ = [
    "Argument",
    "CompilationError",
    "DeviceError",
    "Kernel",
    "Source",
    "TensorMap",
    "attempted",
    "cache_folder",
    "cached_cubin",
    "compile_cubin",
    "compile_together",
    "compiler_library",
    "device_options",
    "failed",
    "give_up",
    "kernel",
    "tensor_map",
]

MOST_COMPILERS = 16
"""Kernels compiled at once, in threads: the compiler lets them run beside each other."""

_FAILED: set[Hashable] = set()
"""Kinds of kernels that could not be compiled or launched in this process."""


def failed(kind: Hashable) -> bool:
    """Whether kernels of a kind have failed here before, so that a slower version is to be taken."""
    return bool(_FAILED) and kind in _FAILED


def attempted(kind: str, launch: Callable[..., object], *arguments: object) -> bool:
    """Launch a kernel; False if it cannot be compiled or launched here: nothing has run, and the caller falls back.

    Args:
        kind: of kernels that need not be tried again after that (see `failed`), as the warning names it.
        launch: called with `arguments`; raises `CompilationError` before a kernel has changed anything.
    """
    try:
        launch(*arguments)
    except CompilationError as error:
        give_up(kind, kind, error)
        return False
    return True


def give_up(kind: Hashable, name: str, error: CompilationError) -> None:
    """Remember that a kind has failed, and warn the first time."""
    if kind not in _FAILED:
        _FAILED.add(kind)
        Memory.forget_all()
        warnings.warn(f"{name} run in a slower version: {error}", stacklevel=3)


def compiler_library() -> ctypes.CDLL:
    """The NVRTC that belongs to this PyTorch.

    Raises:
        CompilationError: it is not installed.
    """
    major = (torch.version.cuda or "").split(".")[0]
    site = Path(torch.__file__).parent.parent
    beside = sorted(site.glob(f"nvidia/*/lib/libnvrtc.so.{major}"))
    for name in (f"libnvrtc.so.{major}", *map(str, beside), "libnvrtc.so", f"nvrtc64_{major}0_0.dll"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise CompilationError(
        f"no NVRTC library for CUDA {torch.version.cuda} was found (install a CUDA build of torch with pip)"
    )


def compile_cubin(source: str, options: Sequence[str]) -> bytes:
    """Machine code of a CUDA C++ source.

    Args:
        source: self-contained; NVRTC is given no include directory.
        options: as for nvcc, among them `--gpu-architecture=sm_XY`.

    Raises:
        CompilationError: with the first line of the compiler's log.
    """
    nvrtc = compiler_library()
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"whit.cu", 0, None, None)
    arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    status = nvrtc.nvrtcCompileProgram(program, len(options), arguments)
    size = ctypes.c_size_t()
    if status:
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
        first = next((line for line in log.value.decode().splitlines() if "error" in line), f"NVRTC status {status}")
        raise CompilationError(f"CUDA kernel did not compile: {first}")
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    code = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetCUBIN(program, code)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return code.raw


def cache_folder() -> Path:
    """Where compiled kernels are kept.

    Raises:
        FileNotFoundError: as `whit.cache.cache_directory`.
    """
    return cache_directory() / "kernels"


Source: TypeAlias = tuple[str, tuple[str, ...], bool]
"""What a kernel is compiled from: CUDA C++, options, and whether they need this very architecture."""


def compile_together(sources: Iterable[Source], device: int) -> None:
    """Compile kernels side by side and keep them, for `kernel` to find; those that do not compile are passed over.

    Args:
        device: number of the device.
    """
    capability = torch.cuda.get_device_capability(device)

    def one(item: Source) -> None:
        source, options, specific = item
        with suppress(CompilationError):  # said where the kernel is wanted
            cached_cubin(source, device_options(capability, options, specific=specific))

    with ThreadPoolExecutor(min(MOST_COMPILERS, os.cpu_count() or 1), "whit-compiler") as pool:
        list(pool.map(one, dict.fromkeys(sources)))


def cached_cubin(source: str, options: Sequence[str]) -> bytes:
    """`compile_cubin`, kept on disk with its hash; a folder that cannot be written only costs the next process time."""
    key = hashlib.sha256("\0".join([source, *options, str(torch.version.cuda)]).encode()).hexdigest()[:32]
    try:
        path = cache_folder() / f"{key}.cubin"
    except OSError:
        return compile_cubin(source, options)
    code = _kept(path)
    if code is None:
        code = compile_cubin(source, options)
        with suppress(OSError), whole_file(path) as file:
            file.write(hashlib.sha256(code).digest() + code)
    return code


def _kept(path: Path) -> bytes | None:
    """The code in a file, None if there is none or the file is damaged: the driver would read beyond its end."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    size = hashlib.sha256().digest_size
    return content[size:] if content[:size] == hashlib.sha256(content[size:]).digest() else None


def device_options(capability: tuple[int, int], options: Sequence[str], *, specific: bool = False) -> tuple[str, ...]:
    """All options of a compilation for devices of a compute capability.

    `specific` allows the instructions that only this very architecture has (sm_90a).
    """
    major, minor = capability
    return (f"--gpu-architecture=sm_{major}{minor}{'a' * specific}", "--std=c++17", *options)


@lru_cache(maxsize=512)
def kernel(source: str, name: str, options: tuple[str, ...], device: int, *, specific: bool = False) -> Kernel:
    """The function `name` of a source, compiled for device number `device` (which must be the current one)."""
    capability = torch.cuda.get_device_capability(device)
    return Kernel(cached_cubin(source, device_options(capability, options, specific=specific)), name)
