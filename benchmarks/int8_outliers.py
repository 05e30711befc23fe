"""Time of an LLM.int8() layer against the number of outlier columns, on one GPU, written as JSON.

    python benchmarks/int8_outliers.py --output benchmarks/results/int8-outliers-h200.json

The layer is a last projection of a 7B, whose inputs in a model with random weights have hundreds of outlier columns. As
in `int8_kernels.py`, each case is a CUDA graph that calls the layer once per copy of its weight, which together exceed
twice the L2 cache. Outlier columns are drawn at random and loud in every token.
"""

from __future__ import annotations

import argparse
import platform
from functools import partial
from pathlib import Path
from typing import Any

import torch
from int8_kernels import SEED, random_packed
from reports import write_report
from torch.nn.functional import linear

from whit.kernels import explain, packed_linear
from whit.kernels.timing import copies_for, seconds_per_call

ROWS, COLUMNS = 4096, 11008
TOKENS = (2048, 512, 16, 1)
OUTLIERS = (0, 7, 16, 64, 256, 600, 2000, COLUMNS)


def measure(tokens: int, cache: int) -> list[dict[str, Any]]:
    """Times of the dense product and, for each number of outlier columns, of the layer."""
    generator = torch.Generator("cuda").manual_seed(SEED)
    dense = [torch.randn(ROWS, COLUMNS, device="cuda", generator=generator).bfloat16() for _ in range(3)]
    x = torch.randn(tokens, COLUMNS, device="cuda", generator=generator).clamp_(-5, 5)
    loudness = torch.randperm(COLUMNS, device="cuda", generator=generator)
    seconds, spread = seconds_per_call([partial(linear, x.bfloat16(), w) for w in dense])
    records = [{"tokens": tokens, "outliers": None, "kernel": "cuBLAS", "seconds": seconds, "spread_seconds": spread}]
    weights = [
        random_packed("dynamic", ROWS, COLUMNS, generator)
        for _ in range(copies_for(ROWS * COLUMNS, cache, 2 * tokens * ROWS, most=8))
    ]
    for outliers in OUTLIERS:
        loud = x.clone()
        loud[:, loudness[:outliers]] *= 20
        loud[0, loudness[:outliers]] = 30.0
        given = loud.bfloat16()
        seconds, spread = seconds_per_call([partial(packed_linear, given, w) for w in weights])
        kernel = explain(given, weights[0])
        numbers = {"seconds": seconds, "spread_seconds": spread}
        records.append({"tokens": tokens, "outliers": outliers, "kernel": kernel, **numbers})
        print(f"{tokens:5d} tokens {outliers:6d} outliers {seconds * 1e6:9.2f} us  {kernel}", flush=True)
    return records


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    properties = torch.cuda.get_device_properties(0)
    report: dict[str, Any] = {
        "hardware": properties.name,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "seed": SEED,
        "rows": ROWS,
        "columns": COLUMNS,
        "records": [],
    }
    with torch.inference_mode():
        for tokens in TOKENS:
            report["records"] += measure(tokens, properties.L2_cache_size)
            if arguments.output is not None:
                write_report(report, arguments.output)


if __name__ == "__main__":
    main()
