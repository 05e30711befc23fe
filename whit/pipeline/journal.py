"""Never losing work: every finished unit is a safetensors shard plus one journal line, both flushed to disk.

The working folder lies inside the output directory until the run is complete. `run.json` says which run it belongs to;
running the same command again continues after the last complete line. A line torn by a crash is dropped.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from whit.errors import OutputError
from whit.formats.base import TensorSpec
from whit.models.safetensors_header import DTYPES
from whit.models.write import LazyTensor, atomic_file, sync_folder, write_safetensors
from whit.report.record import LayerRecord

WORK_FOLDER = ".whit-run"
JOURNAL_FILE = "journal.jsonl"


class JournalReader:
    """What is in the journal of a run that this process, or another one, is working on in `directory`.

    Attributes:
        units: finished units (block names; "" for what lies outside the blocks) and their layers.
        seconds: time each unit took.
        notes: units whose shard was damaged or missing, so that they must be compressed again.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.folder = directory / WORK_FOLDER
        self.units: dict[str, list[LayerRecord]] = {}
        self.seconds: dict[str, float] = {}
        self.notes: list[str] = []
        self._shards: dict[str, Path] = {}

    def read(self) -> tuple[bytes, bytes]:
        """Take over every line whose shard is intact; returns the whole journal, and only those lines."""
        path = self.folder / JOURNAL_FILE
        content = path.read_bytes() if path.exists() else b""
        good = b""
        for line in content.splitlines(keepends=True):
            entry = _parse(line)
            if entry is None:
                continue
            unit, shard = entry["unit"], self.folder / entry["shard"]
            if unit in self.units:  # read before
                good += line
                continue
            if not shard.is_file() or _sha256(shard) != entry["sha256"]:
                state = "damaged" if shard.is_file() else "missing"
                self.notes.append(f"shard {shard.name!r} of {unit or 'the embeddings'!r} is {state}: compressed again")
                continue
            good += line
            self.units[unit] = entry["layers"]
            self._shards[unit] = shard
            self.seconds[unit] = entry["seconds"]
        return content, good

    def load(self, unit: str) -> dict[str, Tensor]:
        """All tensors of a finished unit."""
        with safe_open(self._shards[unit], framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict

    def lazy_tensors(self) -> dict[str, LazyTensor]:
        """Every stored tensor of every unit, read when written."""
        out: dict[str, LazyTensor] = {}
        for shard in self._shards.values():
            with safe_open(shard, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    part = file.get_slice(name)
                    spec = TensorSpec(tuple(part.get_shape()), DTYPES[part.get_dtype()])
                    out[name] = LazyTensor(spec, lambda shard=shard, name=name: _load_one(shard, name))  # type: ignore[misc]
        return out


class Journal(JournalReader):
    """The journal of one run in `directory`.

    Args:
        directory: output directory; created if missing.
        run: JSON value that identifies the run: model, method, options, data, versions.

    Raises:
        OutputError: the directory holds something else, another run, or is in use by another process.
    """

    def __init__(self, directory: Path, run: dict[str, Any]) -> None:
        super().__init__(directory)
        self._run = json.loads(json.dumps(run))
        check_directory(directory, self._run)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            check_directory(directory, self._run)  # nobody else can have begun another run here in the meantime
            run_file = self.folder / "run.json"
            if not run_file.exists():
                with atomic_file(run_file) as file:
                    file.write((json.dumps(self._run, indent=1, sort_keys=True) + "\n").encode())
                sync_folder(directory)
            content, good = self.read()
            if good != content:  # drop lines of damaged shards, and what a crash left half written
                with atomic_file(self.folder / JOURNAL_FILE) as file:
                    file.write(good)
        except BlockingIOError:
            self._lock.close()
            raise OutputError(
                f"another whit process is working in {str(directory)!r}: wait for it, or use -o"
            ) from None
        except BaseException:
            self._lock.close()
            raise

    def write(self, unit: str, tensors: dict[str, Tensor], layers: list[LayerRecord], seconds: float) -> None:
        """Store a finished unit. When this returns it survives a power cut."""
        used = set(self._shards.values())
        names = (self.folder / f"unit-{number:05d}.safetensors" for number in range(len(used) + 1))
        shard = next(path for path in names if path not in used)
        lazy = {name: LazyTensor(TensorSpec(tuple(t.shape), t.dtype), lambda t=t: t) for name, t in tensors.items()}  # type: ignore[misc]
        write_safetensors(shard, lazy)
        entry = {
            "unit": unit,
            "shard": shard.name,
            "sha256": _sha256(shard),
            "seconds": seconds,
            "layers": [asdict(record) for record in layers],
        }
        with (self.folder / JOURNAL_FILE).open("ab") as file:
            file.write(json.dumps(entry).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        sync_folder(self.folder)
        self.units[unit] = layers
        self._shards[unit] = shard
        self.seconds[unit] = seconds

    def close(self) -> None:
        """Release the lock."""
        self._lock.close()

    def remove(self) -> None:
        """Delete the working folder: the run is complete. The lock is held until nothing is left to protect."""
        shutil.rmtree(self.folder)
        self.close()


def check_directory(directory: Path, run: dict[str, Any]) -> None:
    """Refuse a directory this run must not write to.

    Raises:
        OutputError: as said in `Journal`.
    """
    shown = str(directory)
    file = next((path for path in (directory, *directory.parents) if path.is_file()), None)
    if file is not None:
        inside = "" if file == directory else f" lies under {str(file)!r}, which"
        raise OutputError(f"output {shown!r}{inside} is a file: choose a directory with -o")
    if not directory.exists():
        return
    run_file = directory / WORK_FOLDER / "run.json"
    if run_file.exists():
        try:
            found = json.loads(run_file.read_text(encoding="utf-8"))
        except ValueError:
            raise OutputError(f"{str(run_file)!r} is damaged: delete that folder to start again") from None
        differing = sorted(key for key in set(found) | set(run) if found.get(key) != run.get(key))
        if differing:
            key = differing[0]
            raise OutputError(
                f"output {shown!r} holds an unfinished run with another {', '.join(differing)} "
                f"({key}: {_short(found.get(key))}, now {_short(run.get(key))}): repeat that command, "
                f"choose another directory with -o, or delete {WORK_FOLDER!r} in it"
            )
        return
    others = sorted(path.name for path in directory.iterdir() if path.name != WORK_FOLDER)
    if others:
        raise OutputError(
            f"output {shown!r} already holds {', '.join(others[:3])}{', ...' if len(others) > 3 else ''}: "
            "choose another directory with -o, or empty this one"
        )


def finished_units(directory: Path) -> set[str]:
    """Units that an interrupted run left in `directory`, by its journal alone (shards are not read)."""
    path = directory / WORK_FOLDER / JOURNAL_FILE
    if not path.is_file():
        return set()
    entries = (_parse(line) for line in path.read_bytes().splitlines(keepends=True))
    return {entry["unit"] for entry in entries if entry is not None}


def _parse(line: bytes) -> dict[str, Any] | None:
    """A journal line with its layers as records, or None if it is torn or damaged."""
    try:
        entry = json.loads(line)
        entry["layers"] = [LayerRecord(**record) for record in entry["layers"]]
        whole = all(isinstance(entry[key], str) for key in ("unit", "shard", "sha256"))
        whole = whole and isinstance(entry["seconds"], float) and Path(entry["shard"]).name == entry["shard"]
    except (ValueError, TypeError, KeyError):
        return None
    return entry if whole and line.endswith(b"\n") else None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _load_one(shard: Path, name: str) -> Tensor:
    with safe_open(shard, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor
