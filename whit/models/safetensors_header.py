"""A strict reader of safetensors headers: a file that lies about itself is refused before anything is allocated.

Layout (https://github.com/huggingface/safetensors, "Format"): 8 bytes little-endian header length N, N bytes of JSON
`{name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {str: str}}`, then the data. The offsets are
relative to the data and must tile it: no overlap, no hole, nothing left over.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from whit.errors import ModelError

_LARGEST_HEADER = 100_000_000  # the limit of the reference implementation

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: dtype, shape, first byte and number of bytes in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    bytes: int


@dataclass(frozen=True)
class Header:
    """Tensors of one file by name, and its free-form metadata."""

    tensors: dict[str, Entry]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file.

    Raises:
        ModelError: the file is unreadable or truncated, the header length or the JSON is wrong, or the tensors do not
            tile the data.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(8)
            if len(first) < 8:
                raise _broken(path, f"is {size} bytes long, a safetensors file has at least 8")
            (length,) = struct.unpack("<Q", first)
            if length > min(size - 8, _LARGEST_HEADER):
                raise _broken(path, f"claims a header of {length:,} bytes in a file of {size:,}")
            text = file.read(length)
    except OSError as error:
        raise ModelError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    fields = _parse(path, text)
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise _broken(path, "has a __metadata__ that is not a JSON object")
    data = size - 8 - length
    tensors = {name: _entry(path, name, item, 8 + length, data) for name, item in fields.items()}
    _check_tiling(path, tensors, 8 + length, data)
    return Header(tensors, {str(key): str(value) for key, value in metadata.items()})


def _broken(path: Path, what: str) -> ModelError:
    return ModelError(f"{str(path)!r} {what} (the file is damaged or incomplete: copy or download it again)")


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            raise ValueError("a name occurs twice")
        return out

    try:
        fields = json.loads(text.decode("utf-8"), object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"has a header that is not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise _broken(path, "has a header that is not a JSON object")
    return fields


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _entry(path: Path, name: str, item: Any, start: int, data: int) -> Entry:
    where = f"describes tensor {name!r}"
    if not isinstance(item, dict) or not {"dtype", "shape", "data_offsets"} <= set(item):
        raise _broken(path, f"{where} without dtype, shape and data_offsets")
    if item["dtype"] not in DTYPES:
        raise ModelError(
            f"{str(path)!r} {where} with dtype {item['dtype']!r}, which is not one of {', '.join(DTYPES)} "
            "(save the model again in float32, bfloat16 or float16)"
        )
    shape, offsets = item["shape"], item["data_offsets"]
    if not isinstance(shape, list) or not all(_is_count(size) for size in shape):
        raise _broken(path, f"{where} with shape {shape!r}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(offset) for offset in offsets):
        raise _broken(path, f"{where} with data_offsets {offsets!r}")
    begin, end = offsets
    if begin > end or end > data:
        raise _broken(path, f"{where} at bytes {begin:,} to {end:,} of {data:,}")
    dtype = DTYPES[item["dtype"]]
    needed = math.prod(shape) * dtype.itemsize
    if end - begin != needed:
        raise _broken(path, f"{where} with {end - begin:,} bytes, its shape {shape} needs {needed:,}")
    return Entry(dtype, tuple(shape), start + begin, needed)


def _check_tiling(path: Path, tensors: dict[str, Entry], start: int, data: int) -> None:
    position, previous = start, "the start of the data"
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].bytes)):
        if entry.start != position:
            kind = "overlaps" if entry.start < position else "leaves a hole after"
            raise _broken(path, f"has a tensor {name!r} that {kind} {previous!r}")
        position, previous = entry.start + entry.bytes, name
    if position != start + data:
        raise _broken(path, f"has {start + data - position:,} bytes that belong to no tensor")
