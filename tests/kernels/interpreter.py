"""Triton's interpreter, in which kernels run on a CPU: started as a process of its own, and tried once beforehand.

Triton reads its environment when it is imported, so the process that runs the other tests cannot turn it on. Some
versions of the interpreter do not work with the NumPy that is installed; then there is a reason to skip.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import numpy
import pytest

from whit.kernels.launching import interpreted

needs_interpreter = pytest.mark.skipif(
    not interpreted(), reason="runs in Triton's interpreter, started by another test of this file"
)
ROOT = Path(__file__).resolve().parents[2]


def assert_interpreted_tests_pass(file: str) -> None:
    """Run the tests of a file whose names hold "interpreted", in the interpreter; skip if it does not work here."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    command = ["-m", "pytest", "-x", "-p", "no:cacheprovider", "-k", "interpreted", str(Path(file).resolve())]
    done = _start(command)
    assert done.returncode == 0, done.stdout[-2000:]
    assert " passed" in done.stdout


@lru_cache(maxsize=1)
def why_not() -> str:
    """Why the interpreter cannot be used, "" if it can: a tiny kernel is run in it."""
    if importlib.util.find_spec("triton") is None:
        return "needs triton"
    done = _start(["-m", "tests.kernels.tiny_kernels"])
    if done.returncode == 0:
        return ""
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return f"Triton's interpreter does not work with NumPy {numpy.__version__}: {last}"


def _start(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
