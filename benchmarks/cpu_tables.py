"""Turn the committed measurements of decoding on a CPU into the tables of docs/cpu.md.

    python benchmarks/cpu_tables.py     # rewrites docs/generated/cpu-*.md and history-of-cpu-decoding.md

No number of those tables is typed by hand: a test runs this script's functions and compares.
"""

from __future__ import annotations

from typing import Any

from committed import load, markdown, write

SHAPES = ("576 x 576", "1536 x 576", "49152 x 576", "4096 x 4096")
LARGEST = "4096 x 4096"
BFLOAT16, FLOAT32 = "original bfloat16", "original float32"
NAMES = {"billm": "BiLLM (whit)", "gptq": "GPTQ 4", "rtn": "RTN 8"}


def layer_table(layers: dict[str, Any]) -> str:
    """Processor microseconds of one thread for one vector by shape, and what that is per weight and second."""
    lines = [
        f"{layers['processor']}, one thread, torch {layers['versions']['torch']}, numba {layers['versions']['numba']}; "
        f"copying {layers['copy_GB_per_s']:.1f} GB/s (read and write together), reading "
        f"{layers['read_GB_per_s']:.1f} GB/s. Microseconds; the last two columns are of {LARGEST}.",
        "",
    ]
    rows = []
    for name, last in layers["shapes"][LARGEST].items():
        times = [f"{layers['shapes'][shape][name]['cold_quartile_us']:.0f}" for shape in SHAPES]
        rows.append([name, *times, f"{last['weights_per_ns']:.1f}", f"{last['cold_GB_per_s']:.1f}"])
    return "\n".join(lines + markdown(["", *SHAPES, "weights per ns", "GB/s"], rows)) + "\n"


def decode_table(measured: dict[str, Any]) -> str:
    """Tokens per second of a whole model, and its memory."""
    threads = "one thread" if measured["threads"] == 1 else f"{measured['threads']} threads"
    versions = measured["versions"]
    lines = [
        f"{measured['model']}, {measured['hardware']['processor']}, {threads}, torch {versions['torch']}, transformers "
        f"{versions['transformers']}; load of the machine at the end {measured['hardware']['load'][0]:.1f}. Ratios are "
        "of wall time, and in brackets of processor time.",
        "",
    ]
    header = ["", "tokens/s", "ms per token", "times bfloat16", "times float32", "tensors", "resident after an answer"]
    rows = []
    for name, row in measured["rows"].items():
        ratios = [
            f"{row[f'wall ratio to {other}']:.2f} ({row[f'cpu ratio to {other}']:.2f})" for other in (BFLOAT16, FLOAT32)
        ]
        cells = [NAMES.get(name, name), f"{row['tokens_per_second']:.1f}", f"{1e3 * row['seconds_per_token']:.1f}"]
        memory = [f"{row[key] / 1e6:.0f} MB" for key in ("tensor_bytes", "resident_bytes")]
        rows.append([*cells, *ratios, *memory])
    return "\n".join(lines + markdown(header, rows)) + "\n"


def history_table(history: dict[str, Any]) -> str:
    """What was tried: change, prediction, outcome."""
    rows = [[step["change"], step["predicted"], step["found"]] for step in history["steps"]]
    return "\n".join([f"{history['hardware']}.", "", *markdown(["change", "predicted", "found"], rows)]) + "\n"


def contents() -> dict[str, str]:
    """Generated file name -> its text."""
    return {
        "cpu-layers.md": layer_table(load("cpu_layers.json")),
        "cpu-decode-2-threads.md": decode_table(load("cpu_decode_2_threads.json")),
        "cpu-decode-1-thread.md": decode_table(load("cpu_decode_1_thread.json")),
        "history-of-cpu-decoding.md": history_table(load("history-of-cpu-decoding.json")),
    }


if __name__ == "__main__":
    write(contents())
