"""Where weights come from: something that knows every tensor's name, shape and dtype, and reads them one by one.

A source never holds the model: `load` reads one tensor from its file into memory of its own. Names are those of the
model's `state_dict`, whatever the file calls them (see `names.py` and `RenamedSource`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from whit.errors import ModelError, nearest
from whit.finite import all_finite
from whit.models.safetensors_header import Entry, read_header

_CHUNK = 1 << 22
HASHED_AT_A_TIME = 16


class TensorSource(Protocol):
    """Named tensors that can be read one at a time."""

    @property
    def stored_bytes(self) -> int:
        """Bytes of the weight files as given."""

    def names(self) -> list[str]:
        """Every tensor name, sorted."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""

    def dtype(self, name: str) -> torch.dtype:
        """Dtype that `load` returns."""

    def load(self, name: str) -> Tensor:
        """Read a tensor: on the CPU, contiguous, memory of its own (never a view of the file)."""

    def fingerprint(self) -> str:
        """sha256 (hexadecimal) over names, shapes, dtypes and contents."""


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse a weight with NaN or infinite values.

    Raises:
        ModelError: says how many values are not finite.
    """
    if not all_finite(tensor):
        bad = int((~torch.isfinite(tensor.float())).sum())
        raise ModelError(
            f"weight {name!r} has {bad:,} of {tensor.numel():,} values that are NaN or infinite "
            "(the checkpoint is damaged, or its training diverged: use another one)"
        )


def hash_file(path: Path) -> str:
    """sha256 (hexadecimal) of a file's contents, streamed."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_lines(lines: Iterable[str]) -> str:
    """sha256 (hexadecimal) of text lines."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


def describe(source: TensorSource) -> Iterator[str]:
    """One line per tensor: name, dtype, shape. What every fingerprint starts with."""
    for name in source.names():
        yield f"{name} {source.dtype(name)} {source.shape(name)}"


def read_bytes(path: Path, start: int, count: int) -> Tensor:
    """`count` bytes of a file from `start`, as a uint8 tensor of its own.

    Raises:
        ModelError: the file cannot be read or has become shorter.
    """
    out = torch.empty(count, dtype=torch.uint8)
    view = out.numpy().data
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            filled = 0
            while filled < count:
                read = file.readinto(view[filled : filled + _CHUNK * 16])
                if not read:
                    raise ModelError(f"{str(path)!r} ended early (it was truncated while whit was reading it)")
                filled += read
    except OSError as error:
        raise ModelError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    return out


class SafetensorsSource:
    """Tensors of one or more safetensors files."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._files = sorted(files)
        self._entries: dict[str, tuple[Path, Entry]] = {}
        for path in self._files:
            for name, entry in read_header(path).tensors.items():
                if name in self._entries:
                    raise ModelError(f"tensor {name!r} is in {self._entries[name][0].name!r} and in {path.name!r}")
                self._entries[name] = (path, entry)
        self._fingerprint: str | None = None

    @property
    def stored_bytes(self) -> int:
        """Bytes of the files."""
        return sum(path.stat().st_size for path in self._files)

    def names(self) -> list[str]:
        """Every tensor name, sorted."""
        return sorted(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._entry(name)[1].shape

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of a tensor."""
        return self._entry(name)[1].dtype

    def load(self, name: str) -> Tensor:
        """Read one tensor."""
        path, entry = self._entry(name)
        return read_bytes(path, entry.start, entry.bytes).view(entry.dtype).reshape(entry.shape)

    def fingerprint(self) -> str:
        """sha256 over names, shapes, dtypes and the files."""
        if self._fingerprint is None:
            # Hashing a file leaves the interpreter free, so the files of a large model are read side by side.
            with ThreadPoolExecutor(max_workers=HASHED_AT_A_TIME) as pool:
                self._fingerprint = hash_lines([*describe(self), *pool.map(hash_file, self._files)])
        return self._fingerprint

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._entry(name)[0]

    def _entry(self, name: str) -> tuple[Path, Entry]:
        if name not in self._entries:
            raise ModelError(f"the checkpoint has no tensor {name!r}{nearest(name, self._entries)}")
        return self._entries[name]


class InMemorySource:
    """Tensors of a state dict; for tests and for formats that must be converted whole."""

    def __init__(self, tensors: Mapping[str, Tensor], stored_bytes: int | None = None) -> None:
        self._tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        total = sum(tensor.numel() * tensor.element_size() for tensor in self._tensors.values())
        self._stored_bytes = total if stored_bytes is None else stored_bytes

    @property
    def stored_bytes(self) -> int:
        """Bytes of the tensors, or of the file they came from."""
        return self._stored_bytes

    def names(self) -> list[str]:
        """Every tensor name, sorted."""
        return sorted(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._tensor(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor."""
        return self._tensor(name).dtype

    def load(self, name: str) -> Tensor:
        """A copy of one tensor."""
        return self._tensor(name).cpu().clone(memory_format=torch.contiguous_format)

    def fingerprint(self) -> str:
        """sha256 over names, shapes, dtypes and values."""
        return hash_lines([*describe(self), *(hash_tensor(self.load(name)) for name in self.names())])

    def _tensor(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise ModelError(f"the checkpoint has no tensor {name!r}{nearest(name, self._tensors)}")
        return self._tensors[name]


def hash_tensor(tensor: Tensor) -> str:
    """sha256 (hexadecimal) of the bytes of a contiguous CPU tensor."""
    flat = tensor.reshape(-1)
    raw = flat.view(torch.uint8) if flat.numel() else torch.empty(0, dtype=torch.uint8)
    return hashlib.sha256(raw.numpy().data).hexdigest()


class RenamedSource:
    """Another source under the names of `mapping` (new name -> name in the inner source); the rest is hidden."""

    def __init__(self, inner: TensorSource, mapping: Mapping[str, str]) -> None:
        self._inner = inner
        self._mapping = dict(mapping)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the inner source's files."""
        return self._inner.stored_bytes

    def names(self) -> list[str]:
        """Every new name, sorted."""
        return sorted(self._mapping)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._inner.shape(self._name(name))

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor."""
        return self._inner.dtype(self._name(name))

    def load(self, name: str) -> Tensor:
        """Read one tensor."""
        return self._inner.load(self._name(name))

    def fingerprint(self) -> str:
        """sha256 over the inner fingerprint and the names."""
        pairs = (f"{new} {old}" for new, old in sorted(self._mapping.items()))
        return hash_lines([self._inner.fingerprint(), *pairs])

    def _name(self, name: str) -> str:
        if name not in self._mapping:
            raise ModelError(f"the checkpoint has no tensor {name!r}{nearest(name, self._mapping)}")
        return self._mapping[name]


def main_dtype(source: TensorSource) -> torch.dtype:
    """The floating dtype that holds most values (float32 if there is none)."""
    counts: dict[torch.dtype, int] = {}
    for name in source.names():
        dtype = source.dtype(name)
        if dtype.is_floating_point:
            counts[dtype] = counts.get(dtype, 0) + math.prod(source.shape(name))
    return max(counts, key=lambda dtype: counts[dtype]) if counts else torch.float32
