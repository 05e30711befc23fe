"""A strict and fast reader of GGUF headers: metadata and where each tensor lies.

Layout, little-endian (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): magic "GGUF", u32 version, u64
tensors, u64 metadata entries; per entry: key, u32 type, value; per tensor: name, u32 rank, u64 dimensions (innermost
first), u32 type, u64 offset from the data, which starts at the next multiple of `general.alignment`. A string is a u64
length and its bytes; an array is a u32 type, a u64 length and its values.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whit.errors import ModelError

MAGIC = b"GGUF"
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LARGEST_RANK = 4


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor: name, shape (outermost first), number of its type, first byte in the file."""

    name: str
    shape: tuple[int, ...]
    type_number: int
    start: int


@dataclass(frozen=True)
class GGUFHeader:
    """Metadata (arrays as lists) and tensors in the order of the file."""

    metadata: dict[str, Any]
    tensors: list[GGUFTensor]


class _Cursor:
    """Reads values from a buffer and never past its end."""

    def __init__(self, buffer: mmap.mmap) -> None:
        self.buffer = buffer
        self.position = 0

    def take(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self.buffer):
            raise EOFError(f"byte {end:,} of {len(self.buffer):,}")
        out = self.buffer[self.position : end]
        self.position = end
        return out

    def scalars(self, code: str, count: int = 1) -> tuple[Any, ...]:
        if count * struct.calcsize(code) > len(self.buffer):
            raise EOFError(f"{count:,} values in {len(self.buffer):,} bytes")
        layout = f"<{count}{code}"
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def string(self) -> str:
        return self.take(self.scalars("Q")[0]).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            (inner,), (count,) = self.scalars("I"), self.scalars("Q")
            if inner in _SCALARS:
                return list(self.scalars(_SCALARS[inner], count))
            return [self.value(inner) for _ in range(min(count, len(self.buffer)))]
        if kind not in _SCALARS:
            raise ValueError(f"metadata type {kind}")
        return self.scalars(_SCALARS[kind])[0]


def read_gguf_header(path: Path) -> GGUFHeader:
    """Read the header of a GGUF file.

    Raises:
        ModelError: the file is unreadable, not GGUF, of an unknown version, truncated or damaged.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(4)
            if magic != MAGIC:
                raise ModelError(f"{str(path)!r} is not a GGUF file (it starts with {magic!r}, not {MAGIC!r})")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
                return _parse(_Cursor(buffer), path)
    except OSError as error:
        raise ModelError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    except (EOFError, ValueError, struct.error, RecursionError) as error:
        raise ModelError(f"{str(path)!r} is a damaged or incomplete GGUF file ({error}): download it again") from error


def _parse(cursor: _Cursor, path: Path) -> GGUFHeader:
    cursor.position = len(MAGIC)
    (version,) = cursor.scalars("I")
    if version not in (2, 3):
        raise ModelError(f"{str(path)!r} is GGUF version {version} (or big-endian); whit reads versions 2 and 3")
    tensors, entries = cursor.scalars("Q", 2)
    metadata: dict[str, Any] = {}
    for _ in range(entries):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.scalars("I")[0])
    found = []
    for _ in range(tensors):
        name = cursor.string()
        (rank,) = cursor.scalars("I")
        if rank > _LARGEST_RANK:
            raise ValueError(f"tensor {name!r} has {rank} dimensions")
        shape = tuple(reversed(cursor.scalars("Q", rank)))
        kind, offset = cursor.scalars("I")[0], cursor.scalars("Q")[0]
        found.append(GGUFTensor(name, shape, kind, offset))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0:
        raise ValueError(f"general.alignment is {alignment!r}")
    data = -(-cursor.position // alignment) * alignment
    placed = [GGUFTensor(item.name, item.shape, item.type_number, data + item.start) for item in found]
    return GGUFHeader(metadata, placed)
