"""Several processes with a device each work on one model: who they are, and what they tell each other.

`torchrun --nproc-per-node 2 -m whit compress ...` starts them; a Python program that is started so, or has called
`torch.distributed.init_process_group` itself, gets the same from `whit.compress`. Every process does the same in the
same order; whatever they exchange goes through `Ranks`, which alone, in a single process, has nothing to do.
"""

from __future__ import annotations

import atexit
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from whit.errors import KnobError, ResourceError, WhitError

# How long a process waits for another: one may measure a large model while the others have nothing to do.
CPU = torch.device("cpu")
LONGEST_WAIT = timedelta(days=7)


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, as one of them sees them.

    Attributes:
        rank: number of this process, from 0; the first alone writes files and reports progress.
        count: how many there are.
        device: of this process; where tensors lie while they are exchanged.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = CPU

    @property
    def first(self) -> bool:
        """Whether this process writes and reports."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """The JSON value of every process, by rank.

        Raises:
            WhitError: what went wrong elsewhere, if another process fails instead (see `telling`).
        """
        if self.count == 1:
            return [value]
        answers = self._exchange([value, None])
        for rank, (_, failure) in enumerate(answers):
            if failure is not None:
                raise _known(WhitError(f"process {rank} of {self.count} failed: {failure}"))
        return [answer for answer, _ in answers]

    def _exchange(self, value: Any) -> list[Any]:
        text = json.dumps(value).encode()
        with self._in_touch():
            sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.count)]
            distributed.all_gather(sizes, torch.tensor([len(text)], device=self.device))
            longest = int(torch.cat(sizes).max())
            padded = torch.frombuffer(bytearray(text.ljust(longest)), dtype=torch.uint8).to(self.device)
            parts = [torch.empty_like(padded) for _ in range(self.count)]
            distributed.all_gather(parts, padded)
            return [json.loads(bytes(part.tolist())) for part in parts]

    def wait(self) -> None:
        """Until every process is here."""
        self.gather(None)

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Copy a contiguous tensor on `device` from one process to all others, in place.

        All have it at hand: nothing may fail in one of them since they last met in `gather` or `together`.
        """
        if self.count > 1 and tensor.numel():
            with self._in_touch():
                distributed.broadcast(tensor.view(-1).view(torch.uint8), source)

    @contextmanager
    def _in_touch(self) -> Iterator[None]:
        """What the library says of a process that is gone names sockets; what ended it is said by that process."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise _known(
                WhitError(
                    f"process {self.rank} of {self.count} lost touch with the others: see the error of the one that "
                    "ended first, and run the same command again to continue"
                )
            ) from error

    @contextmanager
    def telling(self) -> Iterator[None]:
        """An error inside is told to the others where they next meet this process, in `gather`, and raised there, too.

        Afterwards all are at the same place again, and can work on something else. The others must be about to meet:
        inside, or right behind it.
        """
        try:
            yield
        except Exception as error:
            if self.count > 1 and not getattr(error, _KNOWN, False):
                with suppress(WhitError):  # nobody is left to be told
                    self._exchange([None, (str(error).splitlines() or [type(error).__name__])[0]])
            _known(error)
            raise

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is done inside fails in every process if it fails in one: none waits for one that is gone.

        Raises:
            WhitError: what went wrong elsewhere.
        """
        with self.telling():
            yield
        self.gather(None)


_KNOWN = "_whit_known_to_all"


def _known(error: Exception) -> Exception:
    """The error, marked as one that every process knows of, or can no longer be told."""
    setattr(error, _KNOWN, True)
    return error


ALONE = Ranks()


def join(device: torch.device) -> Ranks:
    """The processes that this one belongs to; joins those that torchrun started together.

    Args:
        device: that was asked for; with several processes each takes the CUDA device of its own number.

    Raises:
        KnobError: several processes, but one particular device. ResourceError: more processes than CUDA devices.
    """
    kind = device.type
    started = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "TORCHELASTIC_RUN_ID" in os.environ
    ours = started and distributed.is_available() and not _initialised()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if kind == "cuda" and (ours or _initialised()):
        if ":" in str(device):
            raise KnobError(f"device {str(device)!r} cannot be shared by several processes: say cuda, or auto")
        if local >= torch.cuda.device_count():
            raise ResourceError(
                f"process {local} has no CUDA device of its own, there are {torch.cuda.device_count()}: start as many "
                "processes as devices (--nproc-per-node)"
            )
        torch.cuda.set_device(local)
    if ours:
        # Stays until the process ends: what torchrun started can only meet once. Both backends, for both devices.
        distributed.init_process_group(timeout=LONGEST_WAIT)
        atexit.register(distributed.destroy_process_group)
    if not _initialised():
        return ALONE
    place = torch.device("cuda", local) if kind == "cuda" else CPU
    return Ranks(distributed.get_rank(), distributed.get_world_size(), place)


def _initialised() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def is_helper() -> bool:
    """Whether torchrun started this process, and not as the first: it has nothing to show."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("RANK", "0") != "0"


def spread(costs: Sequence[float], count: int) -> list[int]:
    """Which of `count` processes does each piece of work: the dearest first, each to the one with least to do."""
    loads = [0.0] * count
    owners = [0] * len(costs)
    for place in sorted(range(len(costs)), key=lambda index: -costs[index]):
        owners[place] = loads.index(min(loads))
        loads[owners[place]] += costs[place]
    return owners
