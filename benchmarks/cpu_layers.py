"""One input vector times one packed matrix on one core: our kernels, torch's own products, and what memory gives.

    python benchmarks/cpu_layers.py --output benchmarks/results/cpu_layers.json

Times are processor microseconds of one thread (median), so that others on the machine do not count; "cold" takes
another copy of the weight at each call until 160 MB were read, "hot" the same again. Weights are random bits (seed 0).
Our products run as they do within a token: as steps of a program, what is made of the inputs included. The lower
quartile is given beside the median: where a core is shared with another machine's work, the median moves.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numba
import psutil
import torch
from reports import write_report
from torch import Tensor

import whit
from whit.formats.base import Format, Packed
from whit.formats.binary_residual import BinaryResidual
from whit.formats.grouped_integer import GroupedInteger
from whit.formats.level_table import LevelTable
from whit.formats.vector_codebook import VectorCodebook
from whit.kernels.cpu.program import Phase, Program
from whit.kernels.cpu_decode import steps_of

COLD_BYTES = 160_000_000
SHAPES = ((576, 576), (1536, 576), (576, 1536), (49152, 576), (4096, 4096))
LAYOUTS = {
    "integer 8, group 64": GroupedInteger(8, 64, True),
    "integer 4, group 64, asymmetric": GroupedInteger(4, 64, False),
    "integer 4, group 64": GroupedInteger(4, 64, True),
    "integer 3, group 64": GroupedInteger(3, 64, True),
    "integer 2, group 64": GroupedInteger(2, 64, True),
    "levels 3, block 128": LevelTable(3, 128),
    "levels 2, block 128": LevelTable(2, 128),
    "levels 1, block 128": LevelTable(1, 128),
    "BiLLM, whole rows": BinaryResidual(0, False),
    "BiLLM, block 128": BinaryResidual(128, False),
    "BiLLM, block 128, means": BinaryResidual(128, True),
    "codebook 256 x 12, ternary": VectorCodebook(256, 12, True),
    "codebook 256 x 8": VectorCodebook(256, 8, False),
}


def microseconds(call: Callable[[int], object], variants: int) -> tuple[float, float]:
    """Median and lower quartile of the processor time of a call that is given 0, 1, ..., again and again."""
    for index in range(3):
        call(index % variants)
    times = []
    for index in range(max(9, min(2 * variants, 200))):
        start = time.thread_time()
        call(index % variants)
        times.append(time.thread_time() - start)
    return statistics.median(times) * 1e6, statistics.quantiles(times, n=4)[0] * 1e6


def row(copies: Sequence[Any], size: int, call: Callable[[Any], object]) -> dict[str, float]:
    """Bytes and times of one matrix in one form."""
    cold, low = microseconds(lambda index: call(copies[index]), len(copies))
    hot, _ = microseconds(lambda index: call(copies[0]), 30)
    return {"bytes": size, "cold_us": cold, "cold_quartile_us": low, "hot_us": hot, "cold_GB_per_s": size / low / 1e3}


def copies_of(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The same tensors at as many places as make them cold."""
    size = sum(item.nbytes for item in tensors.values())
    return [{name: item.clone() for name, item in tensors.items()} for _ in range(max(1, min(400, COLD_BYTES // size)))]


def packed_row(layout: Format, rows: int, columns: int) -> dict[str, float]:
    """Microseconds and bandwidth of one packed layer on random stored tensors, cold."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randint(0, 256, spec.shape, dtype=torch.uint8, generator=generator)
        if spec.dtype == torch.uint8
        else torch.randint(-127, 128, spec.shape, dtype=torch.int8, generator=generator)
        if spec.dtype == torch.int8
        else torch.randn(spec.shape, generator=generator).to(spec.dtype)
        for name, spec in layout.specs(rows, columns).items()
    }
    copies = [Packed(layout, rows, columns, item) for item in copies_of(tensors)]
    x, y = torch.randn(1, columns, generator=generator), torch.empty(1, rows)
    return row([program(packed, x, y) for packed in copies], copies[0].stored_bytes(), lambda item: item.run())


def program(packed: Packed, x: Tensor, y: Tensor) -> Program:
    """One product as a program."""
    steps = steps_of(packed, x, y, None)
    if steps is None:
        raise SystemExit("numba is missing")
    before = [steps.before] if steps.before is not None else []
    return Program([Phase(before, together=True), Phase([steps.product])])


def torch_rows(rows: int, columns: int) -> dict[str, dict[str, float]]:
    """`torch.nn.functional.linear`, and the products with packed weights that torch has for CPUs."""
    out = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(1, columns, dtype=dtype)
        dense = copies_of({"weight": torch.randn(rows, columns).to(dtype)})
        name = f"linear {dtype}".replace("torch.", "")
        out[name] = row(
            dense, dense[0]["weight"].nbytes, lambda item, x=x: torch.nn.functional.linear(x, item["weight"])
        )
        bytes_ = copies_of({"weight": torch.randint(-128, 127, (rows, columns), dtype=torch.int8)})
        scales = torch.ones(rows, dtype=dtype)
        name = f"torch _weight_int8pack_mm {dtype}".replace("torch.", "")
        out[name] = row(
            bytes_,
            rows * columns,
            lambda item, x=x, scales=scales: torch._weight_int8pack_mm(x, item["weight"], scales),
        )
        codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.randint(0, 15, (rows, columns)).int(), 2)
        grids = torch.randn(columns // 64, rows, 2, dtype=dtype)
        four = copies_of({"weight": codes})
        name = f"torch _weight_int4pack_mm_for_cpu {dtype}".replace("torch.", "")
        out[name] = row(
            four,
            codes.nbytes,
            lambda item, x=x, grids=grids: torch.ops.aten._weight_int4pack_mm_for_cpu(x, item["weight"], 64, grids),
        )
    return out


def main() -> None:
    """Measure everything, write the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    source, target = torch.ones(2**26), torch.zeros(2**26)
    copied, _ = microseconds(lambda _: target.copy_(source), 1)
    summed, _ = microseconds(lambda _: source.sum(), 1)
    shapes: dict[str, dict[str, dict[str, float]]] = {}
    for rows, columns in SHAPES:
        found = torch_rows(rows, columns)
        found |= {name: packed_row(layout, rows, columns) for name, layout in LAYOUTS.items()}
        for item in found.values():
            item["weights_per_ns"] = rows * columns / item["cold_quartile_us"] / 1e3
            item["ratio to linear float32"] = found["linear float32"]["cold_quartile_us"] / item["cold_quartile_us"]
            item["ratio to linear bfloat16"] = found["linear bfloat16"]["cold_quartile_us"] / item["cold_quartile_us"]
        shapes[f"{rows} x {columns}"] = found
    report = {
        "processor": Path("/proc/cpuinfo")
        .read_text(encoding="utf-8")
        .split("model name", 1)[1]
        .split("\n")[0]
        .strip("\t: "),
        "cores": psutil.cpu_count(),
        "threads": 1,
        "seed": 0,
        "versions": {"torch": torch.__version__, "numba": numba.__version__, "whit": whit.__version__},
        "python": platform.python_version(),
        "copy_GB_per_s": 2 * source.nbytes / copied / 1e3,
        "read_GB_per_s": source.nbytes / summed / 1e3,
        "shapes": shapes,
    }
    write_report(report, arguments.output)


if __name__ == "__main__":
    main()
