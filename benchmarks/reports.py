"""Where a benchmark's JSON goes: a file, or standard output if none is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_report(report: dict[str, Any], output: Path | None) -> None:
    """Write or print a report as indented JSON."""
    text = json.dumps(report, indent=1) + "\n"
    if output is None:
        print(text, end="")
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, encoding="utf-8")
