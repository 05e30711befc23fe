"""Time of 8-bit layers against the dense product on one GPU, written as JSON.

    python benchmarks/int8_kernels.py --output benchmarks/results/int8-kernels-h200.json
    python benchmarks/int8_kernels.py --compilers 14    # that many processes compile all kernels first: a minute in all
    python benchmarks/int8_kernels.py --tune      # first finds and keeps the fastest launch shape of each case

Each case is a CUDA graph that calls the layer once per copy of its weight; copies together exceed twice the L2 cache,
so weights come from memory. Seven columns of the inputs are loud in every token, the number that the LLM.int8() paper
finds in models up to 13B. Times are medians over replays, per call. Beside our layers: the dense product,
`torch._int_mm` of codes that are there already (no rounding, no scales), and bitsandbytes where it is installed.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peers import bitsandbytes_calls
from reports import write_report
from torch import Tensor

from whit.formats import Packed
from whit.formats.outlier_int8 import OutlierInt8
from whit.formats.quantised_inputs import QuantisedInputs
from whit.formats.scaled_codes import ScaledCodes
from whit.kernels import eight_cuda, explain, packed_linear
from whit.kernels.tile_tuning import kind_of, tune_tiles
from whit.kernels.timing import copies_for, seconds_per_call

SHAPES = ((4096, 4096), (11008, 4096))
"""(rows, columns): outputs, inputs."""
COUNTS = (1, 16, 512, 4096)
LOUD = 7
SEED = 0
CASES = ("dynamic", "none", "static", "cached", "int8-w8a8", "fp8-w8a8", "fp8-w8a16", "int8-w8a16", "fp4-w4a16")


def random_packed(case: str, rows: int, columns: int, generator: torch.Generator) -> Packed:
    """A layer with random codes; "static" and "cached" store the loud columns in 16 bit."""

    def codes(shape: tuple[int, ...]) -> Tensor:
        return torch.randint(-127, 128, shape, dtype=torch.int8, device="cuda", generator=generator)

    if case in ("none", "dynamic", "static", "cached"):
        listed = LOUD if case in ("static", "cached") else 0
        outliers = "dynamic" if case in ("dynamic", "cached") else case
        layout = OutlierInt8(6.0 if outliers == "dynamic" else 0.0, outliers, listed, "bfloat16" if listed else "int8")
        tensors = {"codes": codes((rows, columns)), "absmax": torch.rand(rows, device="cuda", generator=generator)}
        if listed:
            tensors["outlier_index"] = loud_columns(columns).int()
            weight = torch.randn(rows, listed, device="cuda", generator=generator)
            tensors["outlier_weight"] = weight.bfloat16()
        return Packed(layout, rows, columns, tensors)
    number, widths = case.split("-")
    system = {"int8": "int8", "fp8": "e4m3fn", "fp4": "e2m1fn"}[number]
    inner = ScaledCodes(system, 0)
    weight = torch.randn(rows, columns, device="cuda", generator=generator)
    packed = inner.pack(weight, weight.abs().amax(1, keepdim=True) / inner.numbers.maximum)
    return packed if widths.endswith("a16") else QuantisedInputs(inner, system, False).pack(packed)


def loud_columns(columns: int) -> Tensor:
    """Seven columns, spread."""
    return torch.arange(1, LOUD + 1, device="cuda") * (columns // (LOUD + 2)) + 5


def chooses(case: str, tokens: int) -> bool:
    """Whether the launch shape of a case is found by it: others share that of its kind."""
    if tokens <= 16 and case in ("fp8-w8a16", "fp8-w8a8", "int8-w8a16"):
        return True
    return case in ("dynamic", "none", "static", "cached", "int8-w8a8") or (case == "fp4-w4a16" and tokens == 1)


@dataclass
class Case:
    """One shape and number of tokens, and its records so far; the first is the dense product."""

    rows: int
    columns: int
    tokens: int
    cache: int
    records: list[dict[str, Any]] = field(default_factory=list)

    @property
    def dense_bytes(self) -> int:
        """Of a 16-bit weight."""
        return 2 * self.rows * self.columns

    def copies(self, weight_bytes: int) -> int:
        """Copies of a weight that exceed twice the cache."""
        return copies_for(weight_bytes, self.cache, most=40)

    def keep(self, name: str, kernel: str, seconds: float, **more: Any) -> None:
        """Add a record and print it."""
        dense = self.records[0]["seconds"] if self.records else seconds
        operations = 2 * self.rows * self.columns * self.tokens
        self.records.append(
            {
                "case": name,
                "kernel": kernel,
                "rows": self.rows,
                "columns": self.columns,
                "tokens": self.tokens,
                "seconds": seconds,
                "operations_per_second": operations / seconds,
                "times_dense": dense / seconds,
                **more,
            }
        )
        print(
            f"{self.rows:6d} x {self.columns:5d}  M={self.tokens:<5d}{name:22s}{seconds * 1e6:9.2f} us"
            f"  +-{more.get('spread_seconds', 0.0) * 1e6:5.2f}  {more.get('bytes_per_second', 0.0) / 1e12:5.2f} TB/s"
            f" {operations / seconds / 1e12:7.1f} TOP/s  {dense / seconds:5.2f} x dense  {kernel}",
            flush=True,
        )

    def time(self, name: str, kernel: str, weight_bytes: int, calls: list[Callable[[], Any]], **more: Any) -> None:
        """Time calls that use one copy of the weight each."""
        seconds, spread = seconds_per_call(calls)
        moved = weight_bytes + 2 * self.tokens * (self.rows + self.columns)
        numbers = {"bytes_moved": moved, "bytes_per_second": moved / seconds, "spread_seconds": spread}
        self.keep(name, kernel, seconds, copies=len(calls), **numbers, **more)


def measure_baselines(case: Case, x: Tensor, generator: torch.Generator) -> None:
    """The dense product, and for many tokens the products of 8-bit codes that are there already."""
    rows, columns, tokens = case.rows, case.columns, case.tokens

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=generator)

    dense = [(0.02 * random(rows, columns)).to(x.dtype) for _ in range(case.copies(case.dense_bytes))]
    linear = torch.nn.functional.linear
    name = "dense " + str(x.dtype).removeprefix("torch.")
    case.time(name, "cuBLAS", case.dense_bytes, [lambda w=w: linear(x, w) for w in dense])
    del dense
    if tokens <= 16:
        return
    size = case.dense_bytes // 2
    left = random(tokens, columns).mul_(40).clamp_(-127, 127).to(torch.int8)
    right = [random(rows, columns).mul_(40).clamp_(-127, 127).to(torch.int8) for _ in range(case.copies(size))]
    case.time("INT8 product alone", "torch._int_mm", size, [lambda w=w: torch._int_mm(left, w.T) for w in right])
    eight, steps, scales = torch.float8_e4m3fn, torch.ones(tokens, 1, device="cuda"), torch.ones(1, rows, device="cuda")
    inputs, weights = random(tokens, columns).to(eight), [item.to(eight) for item in right]
    given = {"scale_a": steps, "scale_b": scales, "out_dtype": torch.bfloat16}
    calls = [lambda w=w: torch._scaled_mm(inputs, w.T, **given) for w in weights]
    case.time("FP8 product alone", "torch._scaled_mm", size, calls)


def measure_bitsandbytes(case: Case, x: Tensor) -> None:
    """Layers of bitsandbytes, if it is installed; it asks the device for sizes, so there is no graph."""
    for threshold in (6.0, 0.0):
        try:
            found = bitsandbytes_calls(case.rows, case.columns, case.copies(case.dense_bytes // 2), threshold, x)
        except Exception as error:
            print(f"   bitsandbytes failed: {type(error).__name__}: {str(error)[:200]}", flush=True)
            return
        if found is None:
            return
        version, calls = found
        times = []
        for _ in range(8):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for call in calls:
                call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e-3 / len(calls))
        times.sort()
        more = {"copies": len(calls), "spread_seconds": times[6] - times[2]}
        name = f"bitsandbytes {version}, threshold {threshold:g}"
        case.keep(name, "without a graph", statistics.median(times), **more)


def compile_part(arguments: argparse.Namespace, dtype: torch.dtype) -> None:
    """Call every so manieth layer once: what is compiled is kept in files for the process that measures."""
    part, parts = arguments.part
    layers = [
        (shape, tokens, name) for name in arguments.cases for tokens in arguments.counts for shape in arguments.shapes
    ]
    generator = torch.Generator("cuda").manual_seed(SEED)
    for shape, tokens, name in layers[part::parts]:
        rows, columns = map(int, shape.split("x"))
        packed = random_packed(name, rows, columns, generator)
        packed_linear(torch.randn(tokens, columns, device="cuda", generator=generator).to(dtype), packed)
    torch.cuda.synchronize()


def compile_together(processes: int) -> None:
    """The same command in several processes, each of which compiles a part."""
    command = [sys.executable, *sys.argv]
    started = [subprocess.Popen([*command, "--part", str(part), str(processes)]) for part in range(processes)]
    for process in started:
        process.wait()


def measure(case: Case, names: list[str], dtype: torch.dtype, tuning: bool) -> list[dict[str, Any]]:
    """Baselines and every named layer."""
    generator = torch.Generator("cuda").manual_seed(SEED)
    x = torch.randn(case.tokens, case.columns, device="cuda", generator=generator)
    x[:, loud_columns(case.columns)] *= 20
    x = x.to(dtype)
    measure_baselines(case, x, generator)
    for name in names:
        first = random_packed(name, case.rows, case.columns, generator)
        size = first.format.bytes(case.rows, case.columns)
        others = (random_packed(name, case.rows, case.columns, generator) for _ in range(case.copies(size) - 1))
        calls = [lambda w=w: packed_linear(x, w) for w in (first, *others)]
        more = {}
        tiled = explain(x, first).endswith("(Triton)") and kind_of(first.format, case.tokens)
        if tuning and chooses(name, case.tokens) and tiled:
            times = tune_tiles(x, first, lambda calls=calls: seconds_per_call(calls, 6)[0])
            ordered = sorted(times.items(), key=lambda item: item[1])
            more["tried"] = {str(tuple(asdict(tile).values())): time for tile, time in ordered}
            for tile, time in list(more["tried"].items())[:4]:
                print(f"      {time * 1e6:9.2f} us  {tile}", flush=True)
        elif tuning and chooses(name, case.tokens) and explain(x, first) == eight_cuda.NAME:
            eight_cuda.tune(x, first, lambda calls=calls: seconds_per_call(calls, 6)[0])
        case.time(name, explain(x, first), size, calls, **more)
    measure_bitsandbytes(case, x)
    return case.records


def main() -> None:
    """Measure what was asked for and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--counts", nargs="+", type=int, default=list(COUNTS))
    parser.add_argument("--shapes", nargs="+", default=[f"{rows}x{columns}" for rows, columns in SHAPES])
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="bfloat16")
    parser.add_argument("--tune", action="store_true", help="find and keep the fastest launch shapes first")
    parser.add_argument("--compilers", type=int, default=0, help="processes that compile all kernels first")
    parser.add_argument("--part", nargs=2, type=int, metavar=("PART", "PARTS"), help="of such a process: compile alone")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    torch.manual_seed(SEED)
    if arguments.part:
        with torch.inference_mode():
            compile_part(arguments, dtype)
        return
    if arguments.compilers:
        compile_together(arguments.compilers)
    properties = torch.cuda.get_device_properties(0)
    report: dict[str, Any] = {
        "hardware": properties.name,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "seed": SEED,
        "dtype": arguments.dtype,
        "loud_columns": LOUD,
        "records": [],
    }
    with torch.inference_mode():
        for shape in arguments.shapes:
            rows, columns = map(int, shape.split("x"))
            for tokens in arguments.counts:
                case = Case(rows, columns, tokens, properties.L2_cache_size)
                report["records"] += measure(case, arguments.cases, dtype, arguments.tune)
                if arguments.output is not None:
                    write_report(report, arguments.output)


if __name__ == "__main__":
    main()
