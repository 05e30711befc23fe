"""Time of the packed product against cuBLAS on one GPU, written as JSON.

    python benchmarks/kernels.py --output benchmarks/results/kernels-h200.json
    python benchmarks/kernels.py --formats level-table-2 --counts 1
    python benchmarks/kernels.py --tune    # first finds and keeps the fastest launch of each case
    python benchmarks/kernels.py --compile 16 --tune    # compiles in 16 processes what tuning will try

Each case is a CUDA graph that calls the layer once per copy of its weight; copies together exceed twice the L2 cache,
so weights come from memory. Codes, scalars and inputs are random. Times are medians over replays, per call. Bytes moved
are those of the packed weight, the inputs and the outputs, each once.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import platform
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from peers import GEMLITE_BITS, GEMLITE_GROUP, gemlite_calls
from reports import write_report
from torch import Tensor

from whit.formats import Packed
from whit.formats.base import Format
from whit.formats.binary_residual import BinaryResidual
from whit.formats.grouped_integer import GroupedInteger
from whit.formats.level_table import LevelTable
from whit.formats.nm_index import encode_mask
from whit.formats.signed_levels import SignedLevels, panel_columns, signed_levels
from whit.formats.structured_binary import StructuredBinary
from whit.formats.vector_codebook import VectorCodebook
from whit.kernels import explain, packed_linear
from whit.kernels.cuda_decode import decode_options, decode_source
from whit.kernels.cuda_layout import layout_of
from whit.kernels.cuda_ops import starts_early
from whit.kernels.cuda_tuned import keep_tuned
from whit.kernels.linear import choose
from whit.kernels.nvrtc import CompilationError, cached_cubin, device_options
from whit.kernels.product_tuning import sources, tune
from whit.kernels.timing import copies_for, seconds_per_call

FORMATS: dict[str, Format] = {
    "binary-residual": BinaryResidual(128, True),
    "binary-residual-no-means": BinaryResidual(128, False),
    "binary-residual-row": BinaryResidual(0, False),
    "level-table-2": LevelTable(2, 128),
    "level-table-2-row": LevelTable(2, 0),
    "level-table-1": LevelTable(1, 128),
    "integer-1": GroupedInteger(1, 128, True),
    "integer-2": GroupedInteger(2, 128, False),
    "integer-2-64": GroupedInteger(2, 64, False),
    "integer-3": GroupedInteger(3, 128, False),
    "integer-3-64": GroupedInteger(3, 64, False),
    "integer-4": GroupedInteger(4, 128, False),
    "integer-4-64": GroupedInteger(4, 64, False),
    "integer-8": GroupedInteger(8, 128, True),
    "codebook-256x8": VectorCodebook(256, 8, False),
    "codebook-256x12": VectorCodebook(256, 12, False),
    "structured-4:8": StructuredBinary(4, 8, 0),
}
PREPARED = {"structured-4:8 prepared": "structured-4:8"}
"""Weights in the form in which decoding holds them, by the format that is stored."""
SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (28672, 8192))
"""(rows, columns): outputs, inputs."""
COUNTS = (1, 16, 64, 256, 2048)
NOT_TUNED = ("plain", "cuda decode + matmul", "cuda structured product", "cuda table product")
"""Versions that have one launch for a weight and a device."""
SEED = 0


def random_packed(layout: Format, rows: int, columns: int, generator: torch.Generator) -> Packed:
    """Random codes, normal scalars; one column in 32 marked, more than BiLLM marks."""
    tensors = {}
    for name, spec in layout.specs(rows, columns).items():
        if not spec.dtype.is_floating_point:
            low, high = (-127, 128) if spec.dtype == torch.int8 else (0, 243 if name == "regions" else 256)
            tensor = torch.randint(low, high, spec.shape, dtype=spec.dtype, device="cuda", generator=generator)
            if isinstance(layout, StructuredBinary) and name == "index":
                score = torch.rand(rows, columns // layout.m, layout.m, device="cuda", generator=generator)
                kept = torch.zeros_like(score, dtype=torch.bool).scatter_(2, score.topk(layout.n, 2).indices, True)
                tensor = encode_mask(kept.flatten(1), layout.n, layout.m)
            if name == "salient":
                for _ in range(4):
                    tensor &= torch.randint(0, 256, spec.shape, dtype=torch.uint8, device="cuda", generator=generator)
        else:
            tensor = (0.02 * torch.randn(spec.shape, device="cuda", generator=generator)).to(spec.dtype)
        tensors[name] = tensor
    return Packed(layout, rows, columns, tensors)


def prepared_layout(columns: int) -> Format:
    """Of `PREPARED`: with room for one marked column in 16, twice as many as are marked."""
    return SignedLevels(panel_columns(columns // 16))


def weight_for(name: str, rows: int, columns: int, generator: torch.Generator) -> Packed:
    """A random weight as the row `name` multiplies it."""
    packed = random_packed(FORMATS[PREPARED.get(name, name)], rows, columns, generator)
    return signed_levels(packed, columns // 16) if name in PREPARED else packed


def ceilings() -> dict[str, float]:
    """Measured bounds of the machine: bytes per second of a copy (read and written), float16 operations per second."""
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    copy, _ = seconds_per_call([lambda: target.copy_(source)] * 2, 8)
    a = torch.randn(8192, 8192, device="cuda").half()
    product, _ = seconds_per_call([lambda: a @ a] * 2, 8)
    return {
        "copy_bytes_per_second": 2 * 4 * source.numel() / copy,
        "float16_operations_per_second": 2 * 8192**3 / product,
    }


def measure(
    rows: int,
    columns: int,
    tokens: int,
    names: list[str],
    cache: int,
    dtype: torch.dtype,
    tuning: bool,
    peers: bool,
) -> list[dict[str, Any]]:
    """The dense baseline and every format on one shape and number of vectors."""
    generator = torch.Generator("cuda").manual_seed(SEED)
    x = torch.randn(tokens, columns, device="cuda", generator=generator).to(dtype)
    moved = 2 * tokens * (rows + columns)
    records = []

    def add(name: str, kernel: str, weight_bytes: int, calls: list[Callable[[], Tensor]]) -> None:
        seconds, spread = seconds_per_call(calls)
        total = weight_bytes + moved
        records.append(
            {
                "format": name,
                "kernel": kernel,
                "rows": rows,
                "columns": columns,
                "vectors": tokens,
                "copies": len(calls),
                "bits_per_weight": weight_bytes * 8 / (rows * columns),
                "bytes_moved": total,
                "seconds": seconds,
                "spread_seconds": spread,
                "bytes_per_second": total / seconds,
                "operations_per_second": 2 * rows * columns * tokens / seconds,
                "times_dense": (records[0]["seconds"] / seconds) if records else 1.0,
            }
        )
        last = records[-1]
        print(
            f"{rows:6d} x {columns:5d}  M={tokens:<5d}{name:26s}{seconds * 1e6:9.2f} us  +-{spread * 1e6:5.2f}"
            f"  {last['bytes_per_second'] / 1e12:6.2f} TB/s  {last['times_dense']:6.2f} x dense  {kernel}",
            flush=True,
        )

    dense_bytes = 2 * rows * columns
    dense = [
        (0.02 * torch.randn(rows, columns, device="cuda", generator=generator)).to(dtype)
        for _ in range(copies_for(dense_bytes, cache, moved))
    ]
    linear = torch.nn.functional.linear
    add("dense " + str(dtype).removeprefix("torch."), "cuBLAS", dense_bytes, [lambda w=w: linear(x, w) for w in dense])
    del dense
    for name in names:
        layout = prepared_layout(columns) if name in PREPARED else FORMATS[name]
        size = layout.bytes(rows, columns)
        weights = [weight_for(name, rows, columns, generator) for _ in range(copies_for(size, cache, moved))]
        calls = [lambda w=w: packed_linear(x, w) for w in weights]
        if tuning and explain(x, weights[0]) not in NOT_TUNED:
            # Not by `packed_linear`, which takes another kernel where one does not compile.
            tried = [lambda w=w: choose(x, w).linear(x, w, None) for w in weights]
            key, shape, _ = tune(x, weights[0], lambda tried=tried: seconds_per_call(tried, 8)[0])
            keep_tuned(torch.cuda.get_device_name(), {key: shape})
            print(f"    {key}: {shape}", flush=True)
        add(name, explain(x, weights[0]), size, calls)
        del weights, calls
    for bits in GEMLITE_BITS if peers else ():
        size = rows * columns * bits // 8 + 4 * rows * columns // GEMLITE_GROUP
        try:
            found = gemlite_calls(bits, rows, columns, copies_for(size, cache, moved), x)
            if found is not None:
                add(f"GemLite {bits} (g{GEMLITE_GROUP})", f"gemlite {found[0]}", size, found[1])
        except Exception as error:
            print(f"    GemLite failed: {type(error).__name__}: {str(error)[:200]}", flush=True)
    return records


def compile_one(job: tuple[str, tuple[str, ...]]) -> None:
    """In a process of its own; a launch that cannot be compiled is left out by tuning."""
    with contextlib.suppress(CompilationError):
        cached_cubin(*job)


def compile_candidates(names: list[str], shapes: list[str], counts: list[int], bfloat: bool, processes: int) -> None:
    """Compile everything that tuning will try."""
    capability = torch.cuda.get_device_capability()
    jobs = set()
    for name, shape, count in itertools.product(names, shapes, counts):
        rows, columns = map(int, shape.split("x"))
        layout = layout_of(prepared_layout(columns) if name in PREPARED else FORMATS[name], columns)
        assert layout is not None
        options = decode_options(layout, bfloat, starts_early(0))
        jobs.add((decode_source(layout, columns), device_options(capability, options)))
        for source, options, specific in sources(layout, rows, columns, count, bfloat, 0):
            jobs.add((source, device_options(capability, options, specific=specific)))
    with ProcessPoolExecutor(processes) as pool:
        list(pool.map(compile_one, sorted(jobs), chunksize=4))
    print(f"compiled {len(jobs)} kernels", flush=True)


def main() -> None:
    """Measure what was asked for and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--formats", nargs="+", choices=[*FORMATS, *PREPARED], default=[*FORMATS, *PREPARED])
    parser.add_argument("--counts", nargs="+", type=int, default=list(COUNTS))
    parser.add_argument("--shapes", nargs="+", default=[f"{rows}x{columns}" for rows, columns in SHAPES])
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="float16")
    parser.add_argument("--step", default="6", help="step of docs/kernels.md that is measured")
    parser.add_argument("--tune", action="store_true", help="find and keep the fastest launch shapes first")
    parser.add_argument("--peers", action="store_true", help="also GemLite, if it is installed (it tunes itself first)")
    parser.add_argument("--compile", type=int, default=0, metavar="N", help="compile beforehand in N processes")
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    if arguments.compile:
        bfloat = arguments.dtype == "bfloat16"
        compile_candidates(arguments.formats, arguments.shapes, arguments.counts, bfloat, arguments.compile)
    properties = torch.cuda.get_device_properties(0)
    with torch.inference_mode():
        limits = ceilings()
        print({key: f"{value:.3e}" for key, value in limits.items()}, flush=True)
        records: list[dict[str, Any]] = []
        report = {
            "step": arguments.step,
            "hardware": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
            "seed": SEED,
            "dtype": arguments.dtype,
            "ceilings": limits,
            "records": records,
        }
        dtype = getattr(torch, arguments.dtype)
        for shape, tokens in itertools.product(arguments.shapes, arguments.counts):
            rows, columns = map(int, shape.split("x"))
            cache = properties.L2_cache_size
            records += measure(rows, columns, tokens, arguments.formats, cache, dtype, arguments.tune, arguments.peers)
            if arguments.output:  # after every case: what was measured is kept if a later one fails
                write_report(report, arguments.output)


if __name__ == "__main__":
    main()
