"""Tokens per second and resident memory of a compressed language model on a CPU, beside the original.

    python benchmarks/cpu_decode.py --directories BILLM GPTQ RTN --output benchmarks/results/cpu_decode.json

DIRECTORIES are outputs of `whit compress` of one model. Each variant lives in a fresh process and computes as
`whit generate` does (float32 unless named otherwise). The original decodes as transformers does, with torch's products,
and in float32 also as one compiled program, as compressed models do: what is left then is the smaller weight.

The processes take turns, one round after the other, while the others wait; each round times a short and a long greedy
continuation (end-of-text ignored), and `seconds_per_token` is the difference of the two divided by the difference of
their tokens: the decoding alone. Medians over rounds; ratios are medians of the ratios within a round. Processor
seconds (`cpu_seconds_per_token`, all threads) are given beside wall time, for machines that others use too; on such a
machine set OMP_WAIT_POLICY=passive, or torch's threads spend their time waiting for each other. `resident_bytes` is
what the process holds after loading and one continuation beyond what it held before, libraries imported.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy
import psutil
import torch
import transformers
from reports import write_report

import whit
from whit.evaluation.sample import sample_text
from whit.kernels import explain
from whit.models.loading import load_directory, load_tokenizer
from whit.models.packed import packed_modules
from whit.models.resolve import resolve_model
from whit.models.skeleton import load_dense
from whit.pipeline.memory import peak_host_bytes

PROMPT = "The history of Rome began"
SHORT, LONG = 10, 42  # both long enough for every way of decoding
ORIGINALS = {
    "original bfloat16": (torch.bfloat16, "library"),
    "original float32": (torch.float32, "library"),
    "original float32, compiled": (torch.float32, "compiled"),
}


def serve(variant: str, model: str | None, threads: int) -> None:
    """Load one variant, say what it takes, then time a round for each line on standard input."""
    torch.set_num_threads(threads)
    torch.nn.functional.linear(torch.ones(64, 64), torch.ones(64, 64))
    before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    if variant in ORIGINALS:
        reference, (dtype, way) = resolve_model(model), ORIGINALS[variant]
        loaded: Any = load_dense(reference, dtype, torch.device("cpu"))
        tokenizer = reference.load_tokenizer()
    else:
        loaded, tokenizer, way = load_directory(variant, dtype=torch.float32), load_tokenizer(variant), "auto"
    seconds = time.perf_counter() - start
    for holder in (loaded.generation_config, loaded.config):
        holder.eos_token_id = None
    start = time.perf_counter()
    text = sample_text(loaded, tokenizer, PROMPT, LONG, way=way)
    first = time.perf_counter() - start
    gc.collect()
    tensors = {item.data_ptr(): item for item in [*loaded.parameters(), *loaded.buffers()] if item.numel()}
    packed = [module.packed for module in packed_modules(loaded).values()]
    answer(
        {
            "load_seconds": seconds,
            "first_answer_seconds": first,
            "tensor_bytes": sum(item.numel() * item.element_size() for item in tensors.values()),
            "resident_bytes": psutil.Process().memory_info().rss - before,
            "resident_bytes_of_process": psutil.Process().memory_info().rss,
            "peak_bytes_of_process": peak_host_bytes(),
            "kernels": sorted({explain(torch.zeros(1, item.columns), item) for item in packed}),
            "text": text,
        }
    )
    for _ in sys.stdin:
        short, long = (timed(loaded, tokenizer, count, way) for count in (SHORT, LONG))
        wall, processor = ((more - less) / (LONG - SHORT) for less, more in zip(short, long, strict=True))
        answer({"wall": wall, "cpu": processor, "answer": long[0]})


def timed(model: Any, tokenizer: Any, count: int, way: str) -> tuple[float, float]:
    """Wall and processor seconds of one continuation."""
    wall, processor = time.perf_counter(), time.process_time()
    sample_text(model, tokenizer, PROMPT, count, way=way)
    return time.perf_counter() - wall, time.process_time() - processor


def answer(fields: dict[str, Any]) -> None:
    """One JSON line to the parent."""
    print("JSON" + json.dumps(fields), flush=True)


def ask(child: subprocess.Popen[str]) -> dict[str, Any]:
    """The next JSON line of a child."""
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("JSON"):
            fields: dict[str, Any] = json.loads(line[4:])
            return fields
    raise SystemExit(f"a measuring process ended with status {child.wait()}")


def processor() -> str:
    """The name of the processor."""
    known = Path("/proc/cpuinfo")
    lines = known.read_text(encoding="utf-8").splitlines() if known.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    """Start a process per variant, let them take turns, write the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=None, help="the original; default: whit's")
    parser.add_argument("--directories", nargs="*", default=[], help="compressed models")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        serve(arguments.child, arguments.model, arguments.threads)
        return
    variants = {**{name: name for name in ORIGINALS}, **{Path(item).name: item for item in arguments.directories}}
    rows: dict[str, dict[str, Any]] = {}
    children: dict[str, subprocess.Popen[str]] = {}
    for name, variant in variants.items():
        command = [sys.executable, __file__, "--child", variant, "--threads", str(arguments.threads)]
        command += ["--model", arguments.model] if arguments.model else []
        children[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        rows[name] = {**ask(children[name]), "rounds": []}
    for _ in range(arguments.rounds):
        for name, child in children.items():
            assert child.stdin is not None
            child.stdin.write("\n")
            child.stdin.flush()
            rows[name]["rounds"].append(ask(child))
    for child in children.values():
        child.communicate()
    for name, row in rows.items():
        rounds = row["rounds"]
        row["seconds_per_token"] = statistics.median(item["wall"] for item in rounds)
        row["cpu_seconds_per_token"] = statistics.median(item["cpu"] for item in rounds)
        row["tokens_per_second"] = 1 / row["seconds_per_token"]
        for original in ORIGINALS:
            pairs = list(zip(rows[original]["rounds"], rounds, strict=True))
            for kind in ("wall", "cpu"):
                row[f"{kind} ratio to {original}"] = statistics.median(a[kind] / b[kind] for a, b in pairs)
        print(name, {key: value for key, value in row.items() if key not in ("rounds", "text")}, file=sys.stderr)
    report = {
        "model": resolve_model(arguments.model).label,
        "prompt": PROMPT,
        "new_tokens": [SHORT, LONG],
        "threads": arguments.threads,
        "wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "hardware": {"processor": processor(), "cores": psutil.cpu_count(), "load": psutil.getloadavg()},
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "seeds": "none: greedy",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": numpy.__version__,
            "numba": version_of_numba(),
            "whit": whit.__version__,
        },
        "rows": rows,
    }
    write_report(report, arguments.output)


def version_of_numba() -> str | None:
    """The version, None where numba is not installed."""
    try:
        import numba
    except ImportError:
        return None
    return str(numba.__version__)


if __name__ == "__main__":
    main()
