"""Compression on a CPU, phase by phase: this checkout against another one, in turns on the same machine.

    git worktree add ../whit-before <commit>
    python benchmarks/compression_cpu.py --before ../whit-before --output compression_cpu.json

Every turn is a process of its own per checkout, so that a busy machine slows both alike; the medians of the turns are
divided. The default model, its default calibration text and BiLLM, on a few blocks and one evaluation window.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


class Clock:
    """Wall seconds and processor seconds (all threads) by phase."""

    def __init__(self) -> None:
        self.phases: dict[str, dict[str, float]] = {}

    def run(self, phase: str, call: Any) -> Any:
        """Time one call."""
        wall, busy = time.perf_counter(), time.process_time()
        out = call()
        entry = self.phases.setdefault(phase, {"wall": 0.0, "cpu": 0.0})
        entry["wall"] += time.perf_counter() - wall
        entry["cpu"] += time.process_time() - busy
        return out


def child(threads: int, samples: int, blocks: int, method: str) -> dict[str, Any]:
    """One turn in the checkout that PYTHONPATH names."""
    clock = Clock()
    clock.run("import", lambda: __import__("whit.pipeline.compress"))
    import torch

    from whit.evaluation.measure import evaluate_model
    from whit.methods import make_method
    from whit.models.outside import materialise_outside
    from whit.models.skeleton import load_dense
    from whit.pipeline.engine import Run, _catch
    from whit.pipeline.events import Listener
    from whit.pipeline.options import RunOptions
    from whit.pipeline.prepare import prepare

    torch.set_num_threads(threads)
    options = RunOptions(samples=samples, evaluation_windows=1)
    chosen = make_method(method, {})
    with tempfile.TemporaryDirectory() as folder:
        job = clock.run("prepare", lambda: prepare(None, chosen, Path(folder) / "out", options))
    dtype = getattr(job, "calibration_dtype", job.compute_dtype)
    run = Run(
        model=job.skeleton, source=job.reference.source, stacks=job.stacks, assignment=job.assignment,
        journal=None, listener=Listener(), batches=job.calibration.batches, dense_dtype=job.dense_dtype,
        compute_dtype=dtype, device=job.device, true_sequential=False,
    )  # fmt: skip
    names = [name for stack in job.stacks for name in stack.blocks]
    materialise_outside(run.model, names, run.source, dtype, run.device)
    caught, _ = clock.run("catch", lambda: _catch(run, run.stacks[0], [], []))
    errors = run_blocks(run, caught, names[: blocks + 1], clock)
    model = clock.run("load", lambda: load_dense(job.reference, torch.float32, run.device))
    fields = {"dtype": "float32"}
    window = {"device": run.device, "protocol_fields": fields}
    evaluate = lambda: evaluate_model(model, job.evaluation, original=model, **window)  # noqa: E731
    clock.run("evaluation window", evaluate)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"phases": clock.phases, "errors": errors, "peak_bytes": peak, "calibration_dtype": str(dtype)}


def run_blocks(run: Any, caught: Any, names: list[str], clock: Clock) -> dict[str, float]:
    """Compress the first blocks, all but the very first under the clock; layer errors by name."""
    from whit.models.skeleton import materialise, release
    from whit.pipeline import block as block_module

    hidden, errors = [item.hidden for item in caught], {}
    # Where the layers of a block are compressed, in this version and in those before it.
    divided = importlib.util.find_spec("whit.pipeline.team") is not None
    layer_module = importlib.import_module("whit.pipeline.team") if divided else block_module
    plain = layer_module.compress_layer
    seconds = {"wall": 0.0, "cpu": 0.0}

    def timed(*arguments: Any, **keywords: Any) -> Any:
        wall, busy = time.perf_counter(), time.process_time()
        out = plain(*arguments, **keywords)
        seconds["wall"] += time.perf_counter() - wall
        seconds["cpu"] += time.process_time() - busy
        errors[out[1].name] = out[1].error
        return out

    layer_module.compress_layer = timed
    for number, name in enumerate(names):
        module = run.model.get_submodule(name)
        materialise(run.model, name, run.source, run.compute_dtype, run.device)
        streams = block_module.Streams(hidden, [[item.calls[number]] for item in caught])
        swaps = layer_module.Swaps(module, name)

        def compress(module: Any = module, name: str = name, streams: Any = streams, swaps: Any = swaps) -> None:
            block_module.compress_block(
                module, run.assignment.of_block(name), name, run.source, streams,
                true_sequential=False, done=lambda record: None, swaps=swaps,
            )  # fmt: skip

        def onward(module: Any = module, streams: Any = streams) -> None:
            block_module.propagate(module, streams)

        # The first block warms everything up (and compiles what is compiled, once per machine).
        clock.run("statistics and method" if number else "first block", compress)
        clock.run("propagation" if number else "first block", onward)
        if not number:
            seconds = dict.fromkeys(seconds, 0.0)
        release(run.model, name)
    both = clock.phases.pop("statistics and method")
    clock.phases["statistics"] = {key: both[key] - seconds[key] for key in both}
    clock.phases["method"] = seconds
    return errors


def turn(checkout: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """A child process in one checkout."""
    command = [sys.executable, __file__, "--child", "--threads", str(arguments.threads)]
    command += ["--samples", str(arguments.samples), "--blocks", str(arguments.blocks), "--method", arguments.method]
    environment = os.environ | {"PYTHONPATH": str(checkout.resolve()), "OMP_NUM_THREADS": str(arguments.threads)}
    answer = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return found


def commit(checkout: Path) -> str:
    """What was measured."""
    return subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="checkout to compare with")
    parser.add_argument("--output", type=Path, default=Path("compression_cpu.json"))
    parser.add_argument("--method", default="billm")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(arguments.threads, arguments.samples, arguments.blocks, arguments.method)))
        return
    checkouts = {"after": ROOT} | ({"before": arguments.before} if arguments.before else {})
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in checkouts}
    for _ in range(arguments.turns):
        for name, checkout in checkouts.items():
            turns[name].append(turn(checkout, arguments))
    report: dict[str, Any] = {
        "what": vars(arguments) | {"before": None, "output": None},
        "commits": {name: commit(checkout) for name, checkout in checkouts.items()},
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "python": platform.python_version(),
        "calibration_dtype": {name: items[0]["calibration_dtype"] for name, items in turns.items()},
        "load_average": os.getloadavg(),
        "phases": {},
    }
    for phase in turns["after"][0]["phases"]:
        row = {
            f"{name}_{kind}": statistics.median(item["phases"][phase][kind] for item in items)
            for name, items in turns.items()
            for kind in ("wall", "cpu")
        }
        if arguments.before:
            row["wall_ratio"] = row["before_wall"] / row["after_wall"]
            row["cpu_ratio"] = row["before_cpu"] / row["after_cpu"]
        report["phases"][phase] = row
        print(phase, {key: round(value, 3) for key, value in row.items()})
    if arguments.before:
        old, new = turns["before"][0]["errors"], turns["after"][0]["errors"]
        report["layer_error_ratio"] = {name: new[name] / old[name] for name in new if old[name] > 0}
    arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
