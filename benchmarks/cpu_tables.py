"""Turn the committed measurements of decoding on a CPU into the tables of docs/cpu.md.

    python benchmarks/cpu_tables.py     # rewrites docs/generated/cpu-*.md and history-of-cpu-decoding.md

No number of those tables is typed by hand: a test runs this script's functions and compares.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
GENERATED = ROOT / "docs" / "generated"
SHAPES = ("576 x 576", "1536 x 576", "49152 x 576", "4096 x 4096")
LARGEST = "4096 x 4096"
BFLOAT16, FLOAT32 = "original bfloat16", "original float32"
NAMES = {"billm": "BiLLM (whit)", "gptq": "GPTQ 4", "rtn": "RTN 8"}


def report(name: str) -> dict[str, Any]:
    """One committed measurement."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def layer_table(layers: dict[str, Any]) -> str:
    """Processor microseconds of one thread for one vector by shape, and what that is per weight and second."""
    lines = [
        f"{layers['processor']}, one thread, torch {layers['versions']['torch']}, numba {layers['versions']['numba']}; "
        f"copying {layers['copy_GB_per_s']:.1f} GB/s (read and write together), reading "
        f"{layers['read_GB_per_s']:.1f} GB/s. Microseconds; the last two columns are of {LARGEST}.",
        "",
        "| | " + " | ".join(SHAPES) + " | weights per ns | GB/s |",
        "|---|" + "---|" * (len(SHAPES) + 2),
    ]
    for name, last in layers["shapes"][LARGEST].items():
        times = [f"{layers['shapes'][shape][name]['cold_quartile_us']:.0f}" for shape in SHAPES]
        rates = [f"{last['weights_per_ns']:.1f}", f"{last['cold_GB_per_s']:.1f}"]
        lines.append(f"| {name} | " + " | ".join([*times, *rates]) + " |")
    return "\n".join(lines) + "\n"


def decode_table(measured: dict[str, Any]) -> str:
    """Tokens per second of a whole model, and its memory."""
    threads = "one thread" if measured["threads"] == 1 else f"{measured['threads']} threads"
    versions = measured["versions"]
    lines = [
        f"{measured['model']}, {measured['hardware']['processor']}, {threads}, torch {versions['torch']}, transformers "
        f"{versions['transformers']}.",
        "",
        "| | tokens/s | ms per token | times bfloat16 | times float32 | tensors | resident after an answer |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in measured["rows"].items():
        cells = [
            NAMES.get(name, name),
            f"{row['tokens_per_second']:.1f}",
            f"{1e3 * row['seconds_per_token']:.1f}",
            f"{row[f'wall ratio to {BFLOAT16}']:.2f}",
            f"{row[f'wall ratio to {FLOAT32}']:.2f}",
            f"{row['tensor_bytes'] / 1e6:.0f} MB",
            f"{row['resident_bytes'] / 1e6:.0f} MB",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def history_table(history: dict[str, Any]) -> str:
    """What was tried: change, prediction, outcome."""
    lines = [f"{history['hardware']}.", "", "| change | predicted | found |", "|---|---|---|"]
    lines += [f"| {step['change']} | {step['predicted']} | {step['found']} |" for step in history["steps"]]
    return "\n".join(lines) + "\n"


def contents() -> dict[str, str]:
    """Generated file name -> its text."""
    return {
        "cpu-layers.md": layer_table(report("cpu_layers")),
        "cpu-decode-2-threads.md": decode_table(report("cpu_decode_2_threads")),
        "cpu-decode-1-thread.md": decode_table(report("cpu_decode_1_thread")),
        "history-of-cpu-decoding.md": history_table(report("history-of-cpu-decoding")),
    }


def main() -> None:
    """Write everything."""
    GENERATED.mkdir(parents=True, exist_ok=True)
    for name, text in contents().items():
        (GENERATED / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
