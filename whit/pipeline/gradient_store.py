"""Sums of squared gradients on disk, block by block, and how far the pass that makes them has come.

Memory holds the sums of one block at a time. Each line of the ledger is one finished step of the backward pass: a block
for some sequences, with the sums over all sequences so far, and the gradients that flow on into the block before it.
An interrupted pass takes up after the last line; sums and order are the same, so the bytes are, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from whit.errors import ModelError
from whit.finite import all_finite
from whit.pipeline.ledger import Kept, Ledger, keep_tensors, read_tensors, sha256_of
from whit.pipeline.loss import without_gradients

LEDGER = "gradients.jsonl"
PREFIX = "gradients-"


@dataclass(frozen=True)
class Progress:
    """Where the pass stands.

    Attributes:
        start, end: sequences of the last chunk; `start` = `end` = 0 before anything is done.
        block: block of that chunk that was finished last; None if the chunk is complete.
    """

    start: int
    end: int
    block: str | None


class GradientStore:
    """The gradients of one run, in its working folder.

    Args:
        folder: the working folder.

    Attributes:
        notes: what was found damaged, so that it is computed again.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ledger = Ledger(folder / LEDGER)
        self._files: dict[str, Kept] = {}
        self._stream: Kept | None = None
        self.notes: list[str] = []
        self._serial = 0
        if not self._intact():
            self.notes.append("a file of the gradient pass is damaged or missing: gradients are computed again")
            self._ledger.clear()
            self._files.clear()
            self._stream = None
        self._sweep()

    def _intact(self) -> bool:
        """Take over what the ledger says; whether every file it speaks of last is what was written."""
        try:
            for line in self._ledger.lines:
                Progress(line["start"], line["end"], line["block"])
                self._take(line["files"], line["stream"])
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):
            return False
        kept = [*self._files.values(), *([self._stream] if self._stream else [])]
        return all((self._folder / name).is_file() and sha256_of(self._folder / name) == sha for name, sha in kept)

    @property
    def progress(self) -> Progress:
        """The last finished step."""
        if not self._ledger.lines:
            return Progress(0, 0, None)
        line = self._ledger.lines[-1]
        return Progress(line["start"], line["end"], line["block"])

    def complete(self, sequences: int) -> bool:
        """Whether the gradients of that many sequences are all there."""
        progress = self.progress
        return progress.block is None and progress.end == sequences

    def sums(self, block: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Sums of squared gradients of a block's layers over the sequences done so far, float32 (rows, columns)."""
        if block not in self._files:
            return {}
        return {name: value.to(device) for name, value in read_tensors(self._folder / self._files[block][0]).items()}

    def stream(self) -> list[Tensor]:
        """Gradients that flow into the block before the last finished one, for each sequence of the chunk."""
        assert self._stream is not None
        stored = read_tensors(self._folder / self._stream[0])
        return [stored[str(index)] for index in range(len(stored))]

    def write(
        self,
        start: int,
        end: int,
        sums: Mapping[str, Mapping[str, Tensor]],
        flowing: tuple[str, Sequence[Tensor]] | None = None,
    ) -> None:
        """Store a finished step. When this returns it survives a power cut, and what it replaces is deleted.

        Args:
            start, end: sequences of the chunk.
            sums: block -> layer -> sums over all sequences up to `end`.
            flowing: the block just finished and the gradients that flow on from it; None completes the chunk.

        Raises:
            ModelError: a sum is not finite.
        """
        for layers in sums.values():
            for name, value in layers.items():
                if not all_finite(value):
                    raise ModelError(
                        f"the gradient of the loss with respect to {name!r} is NaN or Inf: check the model's weights, "
                        f"or {without_gradients()}"
                    )
        files = {block: keep_tensors(self._folder, self._name(), layers) for block, layers in sums.items()}
        block, stream = None, None
        if flowing is not None:
            block = flowing[0]
            stream = keep_tensors(
                self._folder, self._name(), {str(index): value for index, value in enumerate(flowing[1])}
            )
        self._ledger.append({"start": start, "end": end, "block": block, "files": files, "stream": stream})
        self._take(files, stream)
        self._sweep()

    def gradients(self, block: str) -> dict[str, Tensor]:
        """G = sqrt(sum of squares) of a block's layers, float32 (rows, columns); without layers never reached."""
        return {name: value.sqrt_() for name, value in self.sums(block).items()}

    def _name(self) -> str:
        self._serial += 1
        taken = {path.name for path in self._folder.glob(f"{PREFIX}*")}
        while (name := f"{PREFIX}{self._serial:05d}.safetensors") in taken:
            self._serial += 1
        return name

    def _take(self, files: Mapping[str, Sequence[str]], stream: Sequence[str] | None) -> None:
        self._files |= {block: (kept[0], kept[1]) for block, kept in files.items()}
        self._stream = (stream[0], stream[1]) if stream is not None else None

    def _sweep(self) -> None:
        """Delete files that no line speaks of any more."""
        used = {name for name, _ in self._files.values()} | ({self._stream[0]} if self._stream else set())
        for path in self._folder.glob(f"{PREFIX}*"):
            if path.name not in used:
                path.unlink()
