"""What the steps of compression take on one GPU, each beside the plain way of doing it.

    python benchmarks/compression_gpu.py --output benchmarks/results/compression_gpu.json

Medians of repeated runs between device events, on random data of the shapes of a 7B. Whole layers are timed with a
clock: method, rows, columns, seconds of factorising H and of everything else.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from reports import write_report
from torch import Tensor

import whit
from whit.kernels import columns
from whit.kernels.split_product import SplitFactor, product
from whit.methods import LayerStatistics, make_method
from whit.methods.rounders import LevelRounder
from whit.methods.statistics import inverse_of_triangle
from whit.pipeline.gather import SecondMoment

LAYERS: list[tuple[str, dict[str, Any], int, int]] = [
    ("billm", {}, 4096, 4096),
    ("billm", {}, 11008, 4096),
    ("billm", {}, 4096, 11008),
    ("billm", {}, 28672, 8192),
    ("stbllm", {}, 4096, 4096),
    ("gptq", {"bits": 4}, 4096, 4096),
    ("gptq", {"bits": 4}, 4096, 11008),
    ("kmeans", {}, 4096, 4096),
    ("sparsegpt", {}, 4096, 4096),
    ("codebook", {}, 4096, 4096),
    ("billm", {"variant": "paper"}, 4096, 4096),
    ("billm", {"variant": "official"}, 4096, 4096),
]
REPEATED_BELOW = 2.0
REPEATS = 20


def milliseconds(call: Callable[[], object], repeats: int = 7) -> float:
    """Median between device events, after one call that is not counted."""
    call()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def column_steps(rows: int, generator: torch.Generator) -> dict[str, float]:
    """A block of 128 columns: rounding with feedback and descent, with launches from a graph and from Python."""
    count = columns.MOST_COLUMNS
    values, spread = draw(generator, count, rows), draw(generator, count, count + 8)
    inner = spread @ spread.T / count + torch.eye(count, device="cuda")
    table = draw(generator, 2, 4, rows).sort(1).values.contiguous()
    book = torch.randint(0, 2, (count,), device="cuda", dtype=torch.int32, generator=generator)
    codes, errors = torch.zeros_like(values, dtype=torch.uint8), torch.empty_like(values)
    halves = torch.empty(3, count, rows, dtype=torch.bfloat16, device="cuda")
    if not columns.writes_halves(values.device):
        halves = None
    rounded = lambda: columns.feedback_levels(values, inner, table, book, codes, errors, None, halves)  # noqa: E731
    descended = lambda: columns.descend_levels(values, values, inner, table, book, codes, errors, None, halves)  # noqa: E731
    return {
        "rows": rows,
        "feedback": milliseconds(repeated(rounded)) / REPEATS,
        "descent": milliseconds(repeated(descended)) / REPEATS,
        "feedback_alone": milliseconds(rounded),
        "plain": milliseconds(lambda: plain_rounding(values, inner, table, book), 2),
    }


def repeated(call: Callable[[], object]) -> Callable[[], object]:
    """So many calls in a CUDA graph: what the device takes, without the time of Python between launches."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            call()
    return graph.replay


def plain_rounding(values: Tensor, inner: Tensor, table: Tensor, book: Tensor) -> Tensor:
    """The loop over columns as small operations."""
    rounder, diagonal = LevelRounder(table, book), torch.diagonal(inner).tolist()
    errors = torch.empty_like(values)
    for j in range(len(values)):
        current = torch.addmv(values[j], errors[:j].T, inner[:j, j], alpha=-1) if j else values[j]
        errors[j] = (current - rounder(j, current)[1]) / diagonal[j]
    return errors


def product_steps(width: int, rows: int, generator: torch.Generator) -> dict[str, float]:
    """H (width, width) times (width, rows), and what the halves leave of the float32 product."""
    left, right = draw(generator, width, width), draw(generator, width, rows)
    factor = SplitFactor(left)
    change, target = right[:128].contiguous(), right.clone()
    panel = factor.panel(0, 512, rows)
    panel.put(0, right[:512])
    exact = left.double() @ right.double()
    return {
        "columns": width,
        "rows": rows,
        "float32": milliseconds(lambda: left @ right, 3),
        "halves": milliseconds(lambda: product(left, right), 3),
        "halves_error": float((product(left, right).double() - exact).norm() / exact.norm()),
        "float32_error": float(((left @ right).double() - exact).norm() / exact.norm()),
        "update_float32": milliseconds(lambda: target.addmm_(left[:, :128], change, alpha=-1)),
        "update_halves": milliseconds(lambda: panel.take_off(target, slice(None))) / 4,
    }


def factor_steps(width: int, generator: torch.Generator) -> dict[str, float]:
    """The factor of H^-1: by the inverse, and by the reversed factor."""
    moment = positive(generator, width)

    def by_inverse() -> Tensor:
        lower = torch.linalg.cholesky(moment)
        return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)

    def by_triangle() -> Tensor:
        return inverse_of_triangle(torch.linalg.cholesky(moment.flip(0, 1)).flip(0, 1))

    return {
        "columns": width,
        "by_inverse": milliseconds(by_inverse, 3),
        "by_triangle": milliseconds(by_triangle, 3),
        "difference": float((by_inverse() - by_triangle()).norm() / by_inverse().norm()),
    }


def moment_steps(width: int, generator: torch.Generator) -> dict[str, float]:
    """Second moments of 8 x 2048 inputs in float16."""
    inputs = draw(generator, 8, 2048, width).half()
    flat = inputs.flatten(0, 1)
    moment = SecondMoment(torch.zeros(width, width, device="cuda"))
    return {
        "columns": width,
        "whole": milliseconds(lambda: torch.mm(flat.T, flat, out_dtype=torch.float32)),
        "panels": milliseconds(lambda: moment.update(inputs)),
        "float32": milliseconds(lambda: flat.float().T @ flat.float(), 3),
    }


def layer(name: str, knobs: dict[str, Any], rows: int, width: int, generator: torch.Generator) -> dict[str, Any]:
    """Seconds of one layer, the second time (kernels are compiled at the first), or the first if that takes long."""
    weight, moment = draw(generator, rows, width) * 0.02, positive(generator, width)
    for _ in range(2):
        given = LayerStatistics(width, 0, moment)
        torch.cuda.synchronize()
        start = time.perf_counter()
        given.inverse_factor(0.05, given.descending_order())
        torch.cuda.synchronize()
        middle = time.perf_counter()
        make_method(name, knobs).compress(weight, given)
        torch.cuda.synchronize()
        found = (middle - start, time.perf_counter() - middle)
        if found[1] > REPEATED_BELOW:
            break
    return {"method": name, **knobs, "rows": rows, "columns": width, "factor_seconds": found[0], "seconds": found[1]}


def draw(generator: torch.Generator, *shape: int) -> Tensor:
    """Standard normal numbers on the device."""
    return torch.randn(*shape, device="cuda", generator=generator)


def positive(generator: torch.Generator, width: int) -> Tensor:
    """A positive definite matrix."""
    inputs = draw(generator, width + 512, width)
    return inputs.T @ inputs / width + 0.05 * torch.eye(width, device="cuda")


def main() -> None:
    """Measure everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    generator = torch.Generator("cuda").manual_seed(arguments.seed)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "whit": whit.__version__},
        "seed": arguments.seed,
        "milliseconds": {
            "columns": [column_steps(rows, generator) for rows in (4096, 12288, 22016)],
            "products": [product_steps(width, 4096, generator) for width in (4096, 11008)],
            "factors": [factor_steps(width, generator) for width in (4096, 11008)],
            "moments": [moment_steps(width, generator) for width in (4096, 11008)],
        },
        "layers": [],
    }
    for name, knobs, rows, width in LAYERS:
        began = time.perf_counter()
        report["layers"].append(layer(name, knobs, rows, width, generator))
        print(report["layers"][-1], f"{time.perf_counter() - began:.1f} s with its warm-up", flush=True)
        write_report(report, arguments.output)


if __name__ == "__main__":
    main()
