"""The command line that makes the same run again, from its record."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from whit.pipeline.options import RunOptions
from whit.report.record import Result


def command_line(result: Result) -> str:
    """`whit compress MODEL --method NAME ...` with every knob, and the options that differ from their defaults.

    A recipe of several steps lies beside the result as `recipe.json`.
    """
    words = ["whit", "compress", str(result.model.get("label", ""))]
    method: Mapping[str, Any] = result.run.get("method", {})
    if "step" in method:
        words += ["--recipe", "recipe.json"]
    else:
        words += ["--method", str(method.get("method"))]
        for name, value in method.items():
            if name != "method":
                words += _words(name, value)
    defaults = json.loads(json.dumps(dataclasses.asdict(RunOptions())))
    for name, value in result.run.get("options", {}).items():
        if value != defaults.get(name):
            words += _words(name, value)
    return shlex.join(words)


def _words(name: str, value: Any) -> Iterator[str]:
    dashed = name.replace("_", "-")
    if isinstance(value, bool):
        yield f"--{dashed}" if value else f"--no-{dashed}"
    elif isinstance(value, list | tuple):
        for item in value:
            yield from (f"--{dashed}", str(item))
    elif value is not None:
        yield from (f"--{dashed}", str(value))
