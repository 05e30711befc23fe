"""Time of 8-bit layers against the dense product on one GPU, written as JSON.

    python benchmarks/int8_kernels.py --output benchmarks/results/int8-kernels-h200.json
    python benchmarks/int8_kernels.py --tune      # first finds and keeps the fastest launch shape of each case

Each case is a CUDA graph that calls the layer once per copy of its weight; copies together exceed twice the L2 cache,
so weights come from memory. Seven columns of the inputs are loud in every token, the number that the LLM.int8() paper
finds in models up to 13B. Times are medians over replays, per call. Beside our layers: the dense product,
`torch._int_mm` of codes that are there already (no rounding, no scales), and bitsandbytes where it is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from reports import write_report
from torch import Tensor

from whit.formats import Packed
from whit.formats.outlier_int8 import OutlierInt8
from whit.formats.quantised_inputs import QuantisedInputs
from whit.formats.scaled_codes import ScaledCodes
from whit.kernels import explain, packed_linear
from whit.kernels.launching import Tile, device_name, keep_tuned, tile_key, use_tile

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


def seconds_per_call(calls: list[Callable[[], Any]], replays: int = 20) -> tuple[float, float]:
    """Median time of one call and spread (width of the middle half), from replays of a graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:  # each keeps something of its own
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [call() for call in calls]
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3 / len(calls))
    del outputs
    times.sort()
    return statistics.median(times), times[replays * 3 // 4] - times[replays // 4]


def copies_for(weight_bytes: int, cache: int) -> int:
    """Copies of a weight that exceed twice the cache."""
    return max(2, min(-(-2 * cache // weight_bytes), 40))


def candidates(tokens: int, width: int) -> list[Tile]:
    """Launch shapes among which `--tune` chooses; `width` bytes of codes in a row."""
    if tokens == 1:
        warps = max(1, width // 1024)
        shapes = [(16, 4), (8, 2), (8, 4), (16, 2), (4, 4), (8, 64)]
        return [*(Tile(1, rows, 0, warps, 1, group) for rows, group in shapes), Tile(1, 8, 0, 2 * warps, 1, 2)]
    if tokens <= 32:
        return [
            Tile(16, n, k, 4, stages, 4) for n, k, stages in ((32, 512, 3), (32, 256, 4), (32, 128, 6), (64, 256, 4))
        ]
    shapes = [(128, 256, 128, 8, 4, 16, 0), (128, 256, 128, 8, 4, 16, 1), (256, 128, 128, 8, 4, 8, 0)]
    shapes += [(128, 128, 128, 4, 3, 8, 0), (128, 128, 128, 4, 3, 16, 0), (128, 128, 128, 4, 3, 8, 2)]
    if tokens <= 1024:
        shapes += [(64, 128, 128, 4, 4, 8, 0), (64, 128, 128, 4, 4, 8, 2), (128, 128, 256, 8, 3, 8, 0)]
        shapes += [(128, 128, 128, 8, 5, 8, 0), (128, 128, 128, 8, 5, 8, 1), (64, 128, 128, 4, 3, 8, 3)]
    return [Tile(m, n, k, warps, stages, group, True, tail) for m, n, k, warps, stages, group, tail in shapes]


def tuned_kind(case: str, tokens: int) -> str:
    """What the shape of a case is filed under, if the case is the one by which it is chosen."""
    if case == "dynamic":
        return "outlier-int8"
    if case == "int8-w8a8":
        return "eight-bit"
    if case == "fp8-w8a16" and tokens <= 16:
        return "one-8" if tokens == 1 else "weight-only"
    return "one-4" if case == "fp4-w4a16" and tokens == 1 else ""


def tune(kind: str, tokens: int, packed: Packed, seconds: Callable[[], float]) -> dict[str, float]:
    """Try the candidates, keep and use the fastest; the time of each."""
    device = device_name(torch.device("cuda", 0))
    codes = packed.tensors.get("codes", packed.tensors.get("weight_codes"))
    assert codes is not None
    width = codes.shape[1]
    key = tile_key(kind, tokens, packed.rows, width)
    times: dict[Tile, float] = {}
    errors = []
    for tile in candidates(tokens, width):
        use_tile(device, key, tile)
        try:
            times[tile] = seconds()
        except Exception as error:  # a shape that this device or compiler cannot launch
            errors.append(f"{tile}: {str(error).splitlines()[0][:100] if str(error) else type(error).__name__}")
            torch.cuda.synchronize()
    for line in errors[:2]:
        print("   not launched:", line, flush=True)
    best = min(times, key=times.__getitem__)
    use_tile(device, key, best)
    keep_tuned(device, {key: best})
    return {str(tuple(asdict(tile).values())): time for tile, time in sorted(times.items(), key=lambda item: item[1])}


def bitsandbytes_layer(rows: int, columns: int, threshold: float) -> Callable[[Tensor], Tensor] | None:
    """A layer of bitsandbytes, if it is installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return None
    import bitsandbytes

    layer = bitsandbytes.nn.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False, threshold=threshold)
    return layer.cuda()


def measure(
    rows: int, columns: int, tokens: int, cases: list[str], cache: int, dtype: torch.dtype, tuning: bool
) -> list[dict[str, Any]]:
    """The dense baseline, the integer product alone and every case on one shape and number of tokens."""
    generator = torch.Generator("cuda").manual_seed(SEED)
    x = torch.randn(tokens, columns, device="cuda", generator=generator)
    x[:, loud_columns(columns)] *= 20
    x = x.to(dtype)
    moved = 2 * tokens * (rows + columns)
    records: list[dict[str, Any]] = []

    def add(name: str, kernel: str, weight_bytes: int, calls: list[Callable[[], Any]], **more: Any) -> None:
        seconds, spread = seconds_per_call(calls)
        total = weight_bytes + moved
        records.append(
            {
                "case": name,
                "kernel": kernel,
                "rows": rows,
                "columns": columns,
                "tokens": tokens,
                "copies": len(calls),
                "bytes_moved": total,
                "seconds": seconds,
                "spread_seconds": spread,
                "bytes_per_second": total / seconds,
                "operations_per_second": 2 * rows * columns * tokens / seconds,
                "times_dense": records[0]["seconds"] / seconds if records else 1.0,
                **more,
            }
        )
        last = records[-1]
        print(
            f"{rows:6d} x {columns:5d}  M={tokens:<5d}{name:20s}{seconds * 1e6:9.2f} us  +-{spread * 1e6:5.2f}"
            f"  {last['bytes_per_second'] / 1e12:5.2f} TB/s {last['operations_per_second'] / 1e12:7.1f} TOP/s"
            f"  {last['times_dense']:5.2f} x dense  {kernel}",
            flush=True,
        )

    size = 2 * rows * columns
    dense = [
        (0.02 * torch.randn(rows, columns, device="cuda", generator=generator)).to(dtype)
        for _ in range(copies_for(size, cache))
    ]
    linear = torch.nn.functional.linear
    add("dense " + str(dtype).removeprefix("torch."), "cuBLAS", size, [lambda w=w: linear(x, w) for w in dense])
    del dense
    if tokens > 16:
        left = torch.randint(-127, 128, (tokens, columns), dtype=torch.int8, device="cuda", generator=generator)
        right = [
            random_packed("none", rows, columns, generator).tensors["codes"]
            for _ in range(copies_for(size // 2, cache))
        ]
        add("integer product alone", "torch._int_mm", size // 2, [lambda w=w: torch._int_mm(left, w.T) for w in right])
        del right
        eight = torch.float8_e4m3fn
        left = torch.randn(tokens, columns, device="cuda", generator=generator).to(eight)
        steps = torch.ones(tokens, 1, device="cuda")
        scales = torch.ones(1, rows, device="cuda")
        right = [torch.randn(rows, columns, device="cuda").to(eight) for _ in range(copies_for(size // 2, cache))]
        calls = [
            lambda w=w: torch._scaled_mm(left, w.T, scale_a=steps, scale_b=scales, out_dtype=torch.bfloat16)
            for w in right
        ]
        add("FP8 product alone", "torch._scaled_mm", size // 2, calls)
        del right
    for case in cases:
        first = random_packed(case, rows, columns, generator)
        count = copies_for(first.format.bytes(rows, columns), cache)
        layers = [first, *(random_packed(case, rows, columns, generator) for _ in range(count - 1))]
        calls = [lambda w=w: packed_linear(x, w) for w in layers]
        more = {}
        kind = tuned_kind(case, tokens)
        if tuning and kind:
            more["tried"] = tune(kind, tokens, first, lambda calls=calls: seconds_per_call(calls, 6)[0])
            for tile, time in list(more["tried"].items())[:4]:
                print(f"      {time * 1e6:9.2f} us  {tile}", flush=True)
        add(case, explain(x, first), first.format.bytes(rows, columns), calls, **more)
    for threshold in (6.0, 0.0):
        layer = bitsandbytes_layer(rows, columns, threshold)
        if layer is not None:
            half = x.half()
            torch.cuda.synchronize()
            for _ in range(3):
                layer(half)
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(20):
                layer(half)
            end.record()
            end.synchronize()
            seconds = start.elapsed_time(end) * 1e-3 / 20
            records.append(
                {"case": f"bitsandbytes {threshold}", "kernel": "", "rows": rows, "columns": columns, "tokens": tokens}
                | {"seconds": seconds, "times_dense": records[0]["seconds"] / seconds}
            )
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--counts", nargs="+", type=int, default=list(COUNTS))
    parser.add_argument("--shapes", nargs="+", default=[f"{rows}x{columns}" for rows, columns in SHAPES])
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="bfloat16")
    parser.add_argument("--tune", action="store_true", help="find and keep the fastest launch shapes first")
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
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
    dtype = getattr(torch, arguments.dtype)
    with torch.inference_mode():
        for shape in arguments.shapes:
            rows, columns = map(int, shape.split("x"))
            for tokens in arguments.counts:
                report["records"] += measure(
                    rows, columns, tokens, arguments.cases, properties.L2_cache_size, dtype, arguments.tune
                )
                if arguments.output is not None:
                    write_report(report, arguments.output)


if __name__ == "__main__":
    main()
