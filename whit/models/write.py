"""Writing the final files: safetensors streamed tensor by tensor, byte-identical to what `save_pretrained` writes.

A compressed model may be larger than memory, so tensors are pulled one at a time from wherever they are (the finished
shards of a run). The byte layout is that of the safetensors library: an 8-byte little-endian header length, a JSON
header padded with spaces to a multiple of eight, tensors ordered by descending alignment, then by name.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from whit.formats.base import TensorSpec

# Names and ranks of the dtypes in the file format; tensors are written by descending rank, as the library does.
DTYPES: dict[torch.dtype, tuple[str, int]] = {
    torch.bool: ("BOOL", 0),
    torch.uint8: ("U8", 1),
    torch.int8: ("I8", 2),
    torch.float8_e5m2: ("F8_E5M2", 3),
    torch.float8_e4m3fn: ("F8_E4M3", 4),
    torch.int16: ("I16", 5),
    torch.float16: ("F16", 7),
    torch.bfloat16: ("BF16", 8),
    torch.int32: ("I32", 9),
    torch.float32: ("F32", 11),
    torch.float64: ("F64", 13),
    torch.int64: ("I64", 14),
}
MAX_SHARD_BYTES = 50 * 10**9  # what save_pretrained uses by default


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read when it is written."""

    spec: TensorSpec
    load: Callable[[], Tensor]


def encode_header(specs: Mapping[str, TensorSpec]) -> tuple[list[str], bytes]:
    """Names in the order of the file, and the bytes that precede the data (length field included)."""
    order = sorted(specs, key=lambda name: (-DTYPES[specs[name].dtype][1], name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        spec = specs[name]
        end = offset + spec.bytes
        header[name] = {
            "dtype": DTYPES[spec.dtype][0],
            "shape": list(spec.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    return order, struct.pack("<Q", len(encoded)) + encoded


def safetensors_bytes(specs: Mapping[str, TensorSpec]) -> int:
    """Exact size of the file that holds tensors of these shapes and dtypes."""
    return len(encode_header(specs)[1]) + sum(spec.bytes for spec in specs.values())


def write_safetensors(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Write one file, atomically: temporary file, flush to disk, rename. A failed write leaves nothing behind."""
    order, header = encode_header({name: item.spec for name, item in tensors.items()})
    with atomic_file(path) as file:
        file.write(header)
        for tensor in _loaded([tensors[name] for name in order]):
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")


def _loaded(tensors: Sequence[LazyTensor]) -> Iterator[Tensor]:
    """Each tensor on the CPU, contiguous; one is read by a thread while the one before it is written."""

    def load(item: LazyTensor) -> Tensor:
        return item.load().detach().cpu().contiguous()

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="whit-load") as pool:
        coming = pool.submit(load, tensors[0]) if tensors else None
        for following in [*tensors[1:], None]:
            if coming is None:
                return
            tensor = coming.result()
            coming = None if following is None else pool.submit(load, following)
            yield tensor


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name complete and safe on disk, or not at all."""
    temporary = path.with_name(path.name + ".partial")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # on a full disk its space is needed
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to disk, so that a rename or a new file survives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_model(directory: Path, tensors: Mapping[str, LazyTensor], max_shard_bytes: int = MAX_SHARD_BYTES) -> int:
    """Write `model.safetensors`, or shards and their index when larger than `max_shard_bytes`.

    Args:
        tensors: in the order of the model's state dict (it decides which shard a tensor goes to).

    Returns:
        bytes of all files written.
    """
    meta = {name: torch.empty(item.spec.shape, dtype=item.spec.dtype, device="meta") for name, item in tensors.items()}
    split = split_torch_state_dict_into_shards(
        meta, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_bytes
    )
    written = []
    for file_name, names in split.filename_to_tensors.items():
        write_safetensors(directory / file_name, {name: tensors[name] for name in names})
        written.append(directory / file_name)
    if split.is_sharded:
        index = {"metadata": dict(split.metadata), "weight_map": split.tensor_to_filename}
        path = directory / "model.safetensors.index.json"
        with atomic_file(path) as file:
            file.write((json.dumps(index, indent=2, sort_keys=True) + "\n").encode())
        written.append(path)
    return sum(path.stat().st_size for path in written)
