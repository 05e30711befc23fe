"""What sources of tensors in a single file share, whatever its layout."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor

from whit.errors import ModelError, nearest
from whit.models.source import describe, hash_file, hash_lines

Entry = TypeVar("Entry")


class OneFileSource(ABC, Generic[Entry]):
    """A `TensorSource` of one file, by model name; a subclass knows what an entry says of a tensor.

    Attributes:
        path: of the file. entries: where each tensor lies.
    """

    def __init__(self, path: Path, entries: Mapping[str, Entry]) -> None:
        self.path = path
        self.entries = dict(entries)
        self._fingerprint: str | None = None

    @property
    def stored_bytes(self) -> int:
        """Bytes of the file."""
        return self.path.stat().st_size

    def names(self) -> list[str]:
        """Every model name, sorted."""
        return sorted(self.entries)

    def entry(self, name: str) -> Entry:
        """Where a tensor lies.

        Raises:
            ModelError: there is none of this name.
        """
        if name not in self.entries:
            raise ModelError(f"{self.path.name!r} has no tensor {name!r}{nearest(name, self.entries)}")
        return self.entries[name]

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Dtype that `load` returns."""

    @abstractmethod
    def load(self, name: str) -> Tensor:
        """Read one tensor."""

    def fingerprint(self) -> str:
        """sha256 over names, shapes, dtypes and the file."""
        if self._fingerprint is None:
            self._fingerprint = hash_lines([*describe(self), hash_file(self.path)])
        return self._fingerprint
