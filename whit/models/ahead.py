"""Weights read before they are asked for: the file and the bus are busy while the device computes."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from whit.models.source import TensorSource


class ReadAhead:
    """A source whose next tensors are read, and brought to a device, by a thread of its own.

    Only what `expect` names is read ahead. `load` hands such a tensor over once, already on the device; any other
    tensor is read there and then, as the inner source does it. `close` ends the thread.

    Args:
        inner: where the tensors are. device: where they will be used, a CUDA device.
    """

    def __init__(self, inner: TensorSource, device: torch.device) -> None:
        self._inner = inner
        self._device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="whit-read-ahead")
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._coming: dict[str, Future[Tensor]] = {}

    def expect(self, names: Iterable[str]) -> None:
        """Begin to read these tensors, in this order; others that were expected, but never asked for, are dropped."""
        for future in self._coming.values():
            future.cancel()
        self._coming = {name: self._pool.submit(self._read, name) for name in names}

    def close(self) -> None:
        """Stop reading."""
        self.expect(())
        self._pool.shutdown()

    def _read(self, name: str) -> Tensor:
        value = self._inner.load(name)
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            moved = value.to(self._device)
            self._stream.synchronize()
        return moved

    @property
    def stored_bytes(self) -> int:
        """Bytes of the inner source's files."""
        return self._inner.stored_bytes

    def names(self) -> list[str]:
        """Every tensor name, sorted."""
        return self._inner.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._inner.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor."""
        return self._inner.dtype(name)

    def load(self, name: str) -> Tensor:
        """A tensor; an expected one is on the device."""
        future = self._coming.pop(name, None)
        if future is None or future.cancelled():
            return self._inner.load(name)
        try:
            value = future.result()
        except torch.OutOfMemoryError:  # there was no room beside the block before, which is gone by now
            return self._inner.load(name)
        # It was allocated for the reading stream: its memory must not be used again before this stream is done with it.
        value.record_stream(torch.cuda.current_stream(self._device))
        return value

    def fingerprint(self) -> str:
        """As the inner source."""
        return self._inner.fingerprint()
