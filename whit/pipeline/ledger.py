"""Append-only JSON lines that survive a power cut, and the files they speak of: how a pass remembers what is done."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from whit.formats.base import TensorSpec
from whit.models.write import LazyTensor, atomic_file, sync_folder, write_safetensors

Kept = tuple[str, str]  # file name in the folder, sha256 of its content


class Ledger:
    """Lines of one pass in the working folder of a run.

    Attributes:
        lines: complete lines in order; a line torn by a crash, and all after it, are dropped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[dict[str, Any]] = []
        content = path.read_bytes() if path.exists() else b""
        good = b""
        for line in content.splitlines(keepends=True):
            entry = _parse(line)
            if entry is None:
                break
            self.lines.append(entry)
            good += line
        if good != content:
            with atomic_file(path) as file:
                file.write(good)

    def append(self, entry: dict[str, Any]) -> None:
        """Add a line. When this returns it survives a power cut."""
        with self.path.open("ab") as file:
            file.write(json.dumps(entry).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        sync_folder(self.path.parent)
        self.lines.append(entry)

    def clear(self) -> None:
        """Forget everything."""
        self.path.unlink(missing_ok=True)
        self.lines.clear()


def keep_tensors(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> Kept:
    """Write tensors to a safetensors file, flushed to disk."""
    write_safetensors(
        folder / name,
        {
            key: LazyTensor(TensorSpec(tuple(value.shape), value.dtype), lambda value=value: value)  # type: ignore[misc]
            for key, value in tensors.items()
        },
    )
    return name, sha256_of(folder / name)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict


def sha256_of(path: Path) -> str:
    """Hash of a file's content, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and line.endswith(b"\n") else None
