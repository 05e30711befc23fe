"""The whole quick start on a CPU: this checkout against another one, in turns on the same machine.

    git worktree add ../whit-first 7fe6360
    python benchmarks/quickstart.py --before ../whit-first

Runs `whit compress` with nothing but an output, as the README's first command does, in a process of its own per
checkout: a busy machine slows both alike. Installation is not part of it. Needs the extras `cpu` and `llm` and the
package that holds the default model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from compression_cpu import commit

ROOT = Path(__file__).parents[1]


def turn(checkout: Path) -> dict[str, Any]:
    """One run: seconds of the process, what the run says of itself, and a hash of the weights it wrote."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        command = [sys.executable, "-m", "whit", "compress", "--output", str(output)]
        environment = os.environ | {"PYTHONPATH": str(checkout.resolve())}
        start = time.perf_counter()
        subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        result = json.loads((output / "result.json").read_text(encoding="utf-8"))
        written = hashlib.sha256((output / "model.safetensors").read_bytes()).hexdigest()
    found = {name: result[name] for name in ("timings", "peak_host_bytes")}
    found |= {name: result["run"][name] for name in ("versions", "seed", "calibration_dtype") if name in result["run"]}
    metrics = {item["name"]: item["value"] for item in result["compressed"]["metrics"]}
    return {"process": seconds, "sha256": written, "metrics": metrics} | found


def main() -> None:
    """Measure, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="checkout to compare with")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/quickstart.json"))
    parser.add_argument("--turns", type=int, default=2)
    arguments = parser.parse_args()
    checkouts = {"after": ROOT} | ({"before": arguments.before} if arguments.before else {})
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in checkouts}
    for _ in range(arguments.turns):
        for name, checkout in checkouts.items():
            turns[name].append(turn(checkout))
            print(name, {key: round(value, 1) for key, value in turns[name][-1]["timings"].items()}, flush=True)
    totals = {name: statistics.median(item["timings"]["total"] for item in items) for name, items in turns.items()}
    report = {
        "command": "whit compress --output DIR",
        "commits": {name: commit(checkout) for name, checkout in checkouts.items()},
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "median_seconds": totals,
        "ratio": totals["before"] / totals["after"] if arguments.before else None,
        "turns": turns,
    }
    arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(totals, report["ratio"])


if __name__ == "__main__":
    main()
