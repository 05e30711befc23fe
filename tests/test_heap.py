"""Freed memory: kept by the process for a while, and given back."""

import platform
import resource
import subprocess
import sys

import pytest

from whit import heap

FAULTS = """
import resource, torch
from whit.heap import freed_memory_kept

def faults():
    layer = lambda: [torch.empty(size).fill_(1) for size in (3_000_000, 20_000_000, 3_000_000)]
    for _ in range(3):  # until the holes that were there before are filled
        layer()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        layer()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with freed_memory_kept() as kept:
    assert kept
    during = faults()
print(during, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_logits_reuse_the_pages_of_those_before():
    run = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    during, after = map(int, run.stdout.split())
    logits = 20 * 20_000_000 * 4 // resource.getpagesize()
    assert during * 10 < logits
    assert during < after


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    heap._function.cache_clear()
    with heap.freed_memory_kept() as kept:
        assert not kept
    heap.return_freed_memory()
    monkeypatch.undo()
    heap._function.cache_clear()
