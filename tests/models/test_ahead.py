"""Reading ahead may fail for want of room; then the tensor is read when it is asked for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from whit.models.ahead import ReadAhead
from whit.models.source import InMemorySource


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> ReadAhead:
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    return ReadAhead(InMemorySource({"weight": torch.arange(3.0)}), torch.device("cuda", 0))


def test_a_device_without_room_for_two_blocks_reads_the_second_when_the_first_is_gone(
    ahead: ReadAhead, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(name: str) -> Tensor:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(ahead, "_read", full)
    ahead.expect(["weight"])
    assert torch.equal(ahead.load("weight"), torch.arange(3.0))
    ahead.close()


def test_other_failures_are_raised_where_the_tensor_is_asked_for(
    ahead: ReadAhead, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str) -> Tensor:
        raise OSError("disk")

    monkeypatch.setattr(ahead, "_read", broken)
    ahead.expect(["weight"])
    with pytest.raises(OSError, match="disk"):
        ahead.load("weight")
    ahead.close()
