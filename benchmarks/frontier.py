"""Stored bits against quality for every method, on one model: the figures the documentation quotes.

    python benchmarks/frontier.py --model smollm2-135m --output benchmarks/results/frontier-smollm2-135m.json

Each configuration is compressed by `whit.compress` (several processes at a time with --jobs), then reloaded from disk
and measured beside the original under one protocol. Configurations already in the output file are kept, so the script
can be stopped and started again; --only NAME repeats one.
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

import whit
from whit.api import data_limits
from whit.data.load import load_evaluation
from whit.evaluation.measure import evaluate_model
from whit.models.loading import load_directory
from whit.models.resolve import resolve_model
from whit.models.skeleton import load_dense

#: name -> (method, knobs). The dull baselines come first.
CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "RTN 8 (g64)": ("rtn", {"bits": 8, "group_size": 64}),
    "RTN 4 (g64)": ("rtn", {"bits": 4, "group_size": 64}),
    "RTN 3 (g64)": ("rtn", {"bits": 3, "group_size": 64}),
    "RTN 2 (g64)": ("rtn", {"bits": 2, "group_size": 64}),
    "RTN 1 (g64, signs)": ("rtn", {"bits": 1, "group_size": 64, "symmetric": True}),
    "GPTQ 8 (g64)": ("gptq", {"bits": 8, "group_size": 64}),
    "GPTQ 4 (g64)": ("gptq", {"bits": 4, "group_size": 64}),
    "GPTQ 3 (g64)": ("gptq", {"bits": 3, "group_size": 64}),
    "GPTQ 2 (g64)": ("gptq", {"bits": 2, "group_size": 64}),
    "GPTQ 2 (g64, order, clip)": ("gptq", {"bits": 2, "group_size": 64, "act_order": True, "clip_steps": 20}),
    "GPTQ 3 (g64, order, clip)": ("gptq", {"bits": 3, "group_size": 64, "act_order": True, "clip_steps": 20}),
    "GPTQ 1 (g64, signs)": ("gptq", {"bits": 1, "group_size": 64, "symmetric": True}),
    "k-means 2 (128)": ("kmeans", {"bits": 2, "block_size": 128}),
    "k-means 2 (128, order)": ("kmeans", {"bits": 2, "block_size": 128, "act_order": True}),
    # As many bytes as "BiLLM whit" but its column marks: four free levels per row, the same order of rounding.
    "k-means 2 (row, order)": ("kmeans", {"bits": 2, "block_size": 0, "act_order": True}),
    "k-means 1 (128)": ("kmeans", {"bits": 1, "block_size": 128}),
    "BiLLM official": ("billm", {"variant": "official"}),
    "BiLLM paper": ("billm", {"variant": "paper"}),
    "BiLLM whit": ("billm", {}),
    "BiLLM whit (128)": ("billm", {"block_size": 128}),
    "BiLLM whit, damping 0.01": ("billm", {"damping": 0.01}),
}


def compress_one(arguments: argparse.Namespace, name: str) -> None:
    """Child process: one configuration into its own folder."""
    torch.set_num_threads(arguments.threads)
    method, knobs = CONFIGURATIONS[name]
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
    whit.compress(arguments.model, method, _folder(arguments, name), options=options, **knobs)


def _folder(arguments: argparse.Namespace, name: str) -> Path:
    keep = "".join(letter if letter.isalnum() else "-" for letter in name.lower())
    work: Path = arguments.work
    return work / f"{Path(arguments.model).name}-{keep}"


def compress_all(arguments: argparse.Namespace, names: list[str]) -> None:
    """Run child processes, `--jobs` at a time."""
    waiting, running = list(names), {}
    while waiting or running:
        while waiting and len(running) < arguments.jobs:
            name = waiting.pop(0)
            command = [sys.executable, __file__, *sys.argv[1:], "--child", name]
            running[name] = (subprocess.Popen(command), time.perf_counter())
        time.sleep(0.5)
        for name, (process, start) in list(running.items()):
            if process.poll() is not None:
                del running[name]
                print(f"{name}: exit {process.returncode} after {time.perf_counter() - start:.0f} s", flush=True)


def evaluate_all(arguments: argparse.Namespace, names: list[str], report: dict[str, Any]) -> None:
    """Measure every compressed folder beside the original; the report is saved after each."""
    rows = report["rows"]
    device = torch.device(arguments.evaluation_device)
    reference = resolve_model(arguments.model)
    limits = data_limits(reference.config)
    data = load_evaluation(
        arguments.evaluation,
        reference.load_tokenizer(),
        windows=arguments.evaluation_windows,
        window=arguments.window or min(2048, limits["max_positions"] or 2048),
        **limits,
    )
    original = load_dense(reference, torch.float32, device)
    for name in names:
        folder = _folder(arguments, name)
        if not (folder / "result.json").is_file():
            print(f"{name}: no result in {folder}", flush=True)
            continue
        stored = whit.Result.load(folder / "result.json")
        model = load_directory(folder, dtype=torch.float32, device=device)
        after, measured = evaluate_model(
            model, data, original=original, device=device, protocol_fields={"dtype": "float32"}
        )
        assert measured is not None
        report["original"] = {item.name: asdict(item) for item in measured.metrics}
        errors = [layer.error for layer in stored.layers if layer.block]
        rows[name] = {
            "method": stored.run["method"],
            "stored_bits_layers": stored.size.compressed_bits,
            "stored_bits_file": stored.size.file_bits,
            "file_bytes": stored.size.file_bytes,
            "mean_layer_error": sum(errors) / len(errors),
            "method_seconds": sum(layer.seconds for layer in stored.layers),
            "compression_seconds": stored.timings["compression"],
            "metrics": {item.name: asdict(item) for item in after.metrics},
        }
        shown = {key: round(item["value"], 4) for key, item in rows[name]["metrics"].items()}
        print(f"{name:28s} {stored.size.compressed_bits:6.3f} bits  {shown}", flush=True)
        del model
        save(arguments, report)
        shutil.rmtree(folder)


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
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
    parser.add_argument("--evaluation-device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("frontier-work"))
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS)
    parser.add_argument("--phase", choices=("both", "compress", "evaluate"), default="both")
    parser.add_argument("--child", choices=CONFIGURATIONS)
    arguments = parser.parse_args()
    if arguments.child:
        compress_one(arguments, arguments.child)
        return
    report = json.loads(arguments.output.read_text()) if arguments.output.is_file() else {"rows": {}}
    names = arguments.only or [name for name in CONFIGURATIONS if name not in report["rows"]]
    if arguments.phase != "evaluate":
        compress_all(arguments, names)
    if arguments.phase == "compress":
        return
    evaluate_all(arguments, names, report)


def save(arguments: argparse.Namespace, report: dict[str, Any]) -> None:
    """Write the report so far, rows in the order of CONFIGURATIONS."""
    ordered = {name: report["rows"][name] for name in CONFIGURATIONS if name in report["rows"]}
    report["rows"].clear()  # in place: the caller goes on filling this dict
    report["rows"].update(ordered)
    hidden = ("child", "only", "work", "output", "jobs", "phase", "model")
    report["model"] = Path(arguments.model).name
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
