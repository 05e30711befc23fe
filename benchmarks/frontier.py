"""Stored bits against quality for every method, on one model: the figures the documentation quotes.

    python benchmarks/frontier.py --model smollm2-135m --output benchmarks/results/frontier-smollm2-135m.json

Each configuration (`configurations.py`) is compressed by `whit.compress`, reloaded from disk and measured beside the
original under one protocol (by --jobs worker processes). Configurations already in the output file are
kept, so the script can be stopped and started again; --only NAME repeats one.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from configurations import CONFIGURATIONS

import whit
from whit.api import data_limits
from whit.data.load import load_evaluation
from whit.evaluation.measure import evaluate_model
from whit.models.loading import load_directory
from whit.models.resolve import resolve_model
from whit.models.skeleton import load_dense
from whit.pipeline.recipe import recipe_from_json


class Bench:
    """What all configurations share, loaded once per process: the original model and the evaluation data."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device = torch.device(arguments.device)
        reference = resolve_model(arguments.model)
        limits = data_limits(reference.config)
        self.data = load_evaluation(
            arguments.evaluation,
            reference.load_tokenizer(),
            windows=arguments.evaluation_windows,
            window=arguments.window or min(2048, limits["max_positions"] or 2048),
            **limits,
        )
        self.original = load_dense(reference, torch.float32, self.device)

    def measure(self, name: str) -> None:
        """Compress one configuration, reload it, measure it, leave its row as JSON beside the folders."""
        arguments = self.arguments
        folder = _folder(arguments, name)
        options = whit.RunOptions(
            calibration=arguments.calibration,
            samples=arguments.samples,
            sequence_length=arguments.sequence_length,
            embedding_bits=arguments.embedding_bits,
            true_sequential=arguments.true_sequential,
            batch_size=arguments.batch_size,
            device=arguments.device,
            evaluate=False,
        )
        recipe = recipe_from_json({"step": CONFIGURATIONS[name].steps})
        stored = whit.compress(arguments.model, recipe, folder, options=options)
        assert isinstance(stored, whit.Result)
        model = load_directory(folder, dtype=torch.float32, device=self.device)
        started = time.perf_counter()
        after, before = evaluate_model(
            model, self.data, original=self.original, device=self.device, protocol_fields={"dtype": "float32"}
        )
        assert before is not None
        errors = [layer.error for layer in stored.layers if layer.block]
        row = {
            "family": CONFIGURATIONS[name].family,
            "method": stored.run["method"],
            "stored_bits_layers": stored.size.compressed_bits,
            "stored_bits_file": stored.size.file_bits,
            "file_bytes": stored.size.file_bytes,
            "mean_layer_error": sum(errors) / len(errors),
            "method_seconds": sum(layer.seconds for layer in stored.layers),
            "compression_seconds": stored.timings["compression"],
            "evaluation_seconds": time.perf_counter() - started,
            "device": str(stored.run["device_name"]),
            "metrics": {item.name: asdict(item) for item in after.metrics},
            "original": {item.name: asdict(item) for item in before.metrics},
        }
        shutil.rmtree(folder)
        path = _row_file(arguments, name)
        path.with_suffix(".partial").write_text(json.dumps(row), encoding="utf-8")
        path.with_suffix(".partial").replace(path)


def measure_share(arguments: argparse.Namespace, names: list[str]) -> None:
    """A worker process: its share of the configurations, one after another; one that fails does not stop the others."""
    torch.set_num_threads(arguments.threads)
    bench = Bench(arguments)
    for name in names:
        try:
            bench.measure(name)
        except whit.WhitError as error:
            print(f"{name}: {error}", flush=True)


def _folder(arguments: argparse.Namespace, name: str) -> Path:
    keep = "".join(letter if letter.isalnum() else "-" for letter in name.lower())
    work: Path = arguments.work
    return work / f"{Path(arguments.model).name}-{keep}"


def _row_file(arguments: argparse.Namespace, name: str) -> Path:
    folder = _folder(arguments, name)
    return folder.with_name(folder.name + ".row.json")


def measure_all(arguments: argparse.Namespace, names: list[str], report: dict[str, Any]) -> None:
    """Deal the configurations out to `--jobs` worker processes; the report is saved after each row."""
    arguments.work.mkdir(parents=True, exist_ok=True)
    shares = [share for number in range(arguments.jobs) if (share := names[number :: arguments.jobs])]
    workers = [subprocess.Popen([sys.executable, __file__, *sys.argv[1:], "--share", *share]) for share in shares]
    running = True
    while running:
        time.sleep(0.5)
        running = any(worker.poll() is None for worker in workers)
        for name in names:
            if _row_file(arguments, name).is_file():
                _add_row(arguments, name, report)


def _add_row(arguments: argparse.Namespace, name: str, report: dict[str, Any]) -> None:
    path = _row_file(arguments, name)
    row = json.loads(path.read_text(encoding="utf-8"))
    report["original"] = row.pop("original")
    report["rows"][name] = row
    shown = {key: round(item["value"], 4) for key, item in row["metrics"].items()}
    print(f"{name:32s} {row['stored_bits_layers']:6.3f} bits  {shown}", flush=True)
    save(arguments, report)
    path.unlink()


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--label", help="name of the model in the report; default: the last part of --model")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--calibration")
    parser.add_argument("--evaluation")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=0)
    parser.add_argument("--evaluation-windows", type=int, default=8)
    parser.add_argument("--window", type=int, default=0)
    parser.add_argument("--embedding-bits", type=int, default=8)
    parser.add_argument("--true-sequential", action="store_true")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("frontier-work"))
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS)
    parser.add_argument("--family", nargs="+", help="only configurations of these families")
    parser.add_argument("--share", nargs="+", choices=CONFIGURATIONS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.share:
        measure_share(arguments, arguments.share)
        return
    if arguments.jobs < 1:
        parser.error("--jobs must be at least 1")
    report = json.loads(arguments.output.read_text()) if arguments.output.is_file() else {"rows": {}}
    names = arguments.only or [
        name
        for name, configuration in CONFIGURATIONS.items()
        if name not in report["rows"] and (arguments.family is None or configuration.family in arguments.family)
    ]
    measure_all(arguments, names, report)


def save(arguments: argparse.Namespace, report: dict[str, Any]) -> None:
    """Write the report so far, rows in the order of CONFIGURATIONS."""
    ordered = {name: report["rows"][name] for name in CONFIGURATIONS if name in report["rows"]}
    report["rows"].clear()  # in place: the caller goes on filling this dict
    report["rows"].update(ordered)
    hidden = ("share", "only", "family", "work", "output", "jobs", "model", "label")
    report["model"] = arguments.label or Path(arguments.model).name
    report["setting"] = {key: value for key, value in vars(arguments).items() if key not in hidden}
    report["setting"]["seed"] = whit.RunOptions().seed
    for key in ("calibration", "evaluation"):
        if report["setting"][key]:
            report["setting"][key] = Path(report["setting"][key]).name
    report["hardware"] = {
        "processor": platform.processor() or platform.machine(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
    report["versions"] = {
        "whit": whit.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
