"""When the thread blocks of the product with one vector pass which place, over the end of the launch before.

    python benchmarks/timeline.py --formats level-table-2 --shapes 11008x4096 --output timeline.json

Launches follow one another in a CUDA graph as in `benchmarks/kernels.py`. Every warp writes the clock of its
multiprocessor at the places of `PLACES`, and the global timer at its start and end, which makes one time of all the
clocks. Printed are, for each place, the first, the median and the last warp, as medians over the launches. Writing
costs a launch 0.1 to 0.3 µs.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kernels import FORMATS, SEED, random_packed
from numpy.typing import NDArray
from reports import write_report

from whit.kernels.cuda_layout import layout_of
from whit.kernels.cuda_ops import build, choice, operand_of, starts_early
from whit.kernels.cuda_plan import Launch
from whit.kernels.driver import Kernel
from whit.kernels.nvrtc import cached_cubin, device_options
from whit.kernels.timing import copies_for

PLACES = (
    "starts",
    "has asked for its first weights",
    "may read x",
    "has x",
    "has made its planes",
    "passes the barrier",
    "has weights",
    "has done its items",
    "passes the barrier of all sums",
    "ends",
)
LAUNCHES, LEFT_OUT = 32, 4
WORDS = 16  # of a warp: a clock for each place, the global timer and the clock then, at both ends, the multiprocessor
MARKS = """
typedef unsigned int mark_word;
__device__ __forceinline__ mark_word* own_marks() {
    __shared__ mark_word marks[1024];
    return marks + threadIdx.x / 32 * 16;
}
__device__ __forceinline__ mark_word clock_now() {
    mark_word t;
    asm volatile("mov.u32 %0, %%clock;" : "=r"(t)::"memory");
    return t;
}
__device__ __forceinline__ void mark_both(int place) {
    unsigned long long t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t)::"memory");
    own_marks()[place] = (mark_word)t, own_marks()[place + 1] = clock_now();
}
__device__ __forceinline__ void mark(int number, mark_word known) {  // the first time alone, and not before it is known
    if (threadIdx.x % 32 != 0) return;
    mark_word* const marks = own_marks();
    if (number == 0) {
        for (int i = 1; i < 16; i++) marks[i] = 0;
        asm volatile("mov.u32 %0, %%smid;" : "=r"(marks[14]));
        mark_both(10);
    }
    if (known != 0xffffffffu && (number == 0 || marks[number] == 0)) marks[number] = clock_now();
}
__device__ __forceinline__ void marks_end(mark_word* out) {
    __syncthreads();
    mark(9, 0);
    if (threadIdx.x % 32 == 0) mark_both(12);
    __syncwarp();
    out += (blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * 16;
    if (threadIdx.x % 32 < 16) out[threadIdx.x % 32] = own_marks()[threadIdx.x % 32];
}
#define MARK(number, known) mark(number, known)
#define MARKS_END(bias) marks_end((mark_word*)bias)
"""
BIAS = "bias ? float_of_x(bias[row]) : 0.0f"  # its place is where marks are written


def times(marks: NDArray[np.uint32]) -> NDArray[np.float64]:
    """Nanoseconds of every place (launches, warps, places) from what the warps wrote (launches, warps, WORDS)."""
    words = marks.astype(np.int64)

    def since(value: NDArray[np.int64], start: NDArray[np.int64] | np.int64) -> NDArray[np.float64]:
        return (((value - start + (1 << 31)) % (1 << 32)) - (1 << 31)).astype(np.float64)

    out = np.full((*marks.shape[:2], len(PLACES)), np.nan)
    first, numbers = words[0, 0, 10], words[..., 14]
    pairs = {}
    for number in np.unique(numbers):
        own = words[numbers == number]
        clock = since(np.concatenate([own[:, 11], own[:, 13]]), own[0, 11])
        timer = since(np.concatenate([own[:, 10], own[:, 12]]), first)
        pairs[number] = (own[0, 11], clock, timer)
    spans = [(t[c.argmax()] - t[c.argmin()]) / np.ptp(c) for _, c, t in pairs.values() if np.ptp(c) > 0]
    period = float(np.median(spans))  # nanoseconds of a cycle
    for number, (start, clock, timer) in pairs.items():
        offset = (timer - clock * period).max()  # the timer ticks coarsely, and never early
        of_number = numbers == number
        own = words[of_number][:, : len(PLACES)]
        out[of_number] = np.where(own == 0, np.nan, since(own, start) * period + offset)
    return out


def trace(name: str, rows: int, columns: int, dtype: torch.dtype) -> dict[str, Any]:
    """The places of one case."""
    generator = torch.Generator("cuda").manual_seed(SEED)
    form = FORMATS[name]
    layout = layout_of(form, columns)
    assert layout is not None
    launch = choice(layout, rows, columns, 1, 0)
    assert isinstance(launch, Launch)
    source, function, options, _ = build(layout, launch, 1, dtype == torch.bfloat16, starts_early(0))
    assert BIAS in source
    code = cached_cubin(
        MARKS + source.replace(BIAS, "0.0f"), device_options(torch.cuda.get_device_capability(), options)
    )
    kernel, warps = Kernel(code, function), launch.grid * launch.shape.threads // 32
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    weights = [
        random_packed(form, rows, columns, generator) for _ in range(copies_for(form.bytes(rows, columns), cache))
    ]
    x = torch.randn(1, columns, device="cuda", generator=generator).to(dtype)
    out = torch.empty(1, rows, device="cuda", dtype=dtype)
    marks = torch.zeros(LAUNCHES, warps, WORDS, dtype=torch.int32, device="cuda")
    calls = []
    for i in range(LAUNCHES):
        tensors = [weights[i % len(weights)].tensors[tensor] for tensor in layout.names if tensor]
        operand = operand_of(layout, launch.shape, tensors, rows, columns)
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, marks[i], out)]
        calls.append([pointers[0], operand, *pointers[1:], ctypes.c_int(launch.chunk), ctypes.c_int(launch.tiles)])

    def run() -> None:
        for call in calls:
            kernel.launch(
                launch.grid, launch.shape.threads, launch.shared, call, early=True, cluster=launch.shape.share
            )

    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    found = times(marks.cpu().numpy().view(np.uint32))
    ends = np.nanmax(found[..., -1], axis=1)
    record: dict[str, Any] = {"format": name, "rows": rows, "columns": columns, "shape": str(launch.shape)}
    record["period_ns"] = float(np.median(np.diff(ends[LEFT_OUT:])))
    record["places_ns"] = {}
    for number, place in enumerate(PLACES):
        over = found[LEFT_OUT:, :, number] - ends[LEFT_OUT - 1 : -1, None]
        spread = [float(np.median(f(over, axis=1))) for f in (np.nanmin, np.nanmedian, np.nanmax)]
        record["places_ns"][place] = spread
    return record


def main() -> None:
    """Trace what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--formats", nargs="+", choices=[*FORMATS], default=["level-table-1", "level-table-2"])
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "11008x4096", "28672x8192"])
    arguments = parser.parse_args()
    records = []
    for shape, name in itertools.product(arguments.shapes, arguments.formats):
        rows, columns = map(int, shape.split("x"))
        record = trace(name, rows, columns, torch.float16)
        print(f"{shape} {name}: {record['period_ns']:.0f} ns, {record['shape']}")
        for place, spread in record["places_ns"].items():
            print(f"    {place:32s}" + "".join(f"{value:8.0f}" for value in spread), flush=True)
        records.append(record)
    if arguments.output:
        write_report(
            {"hardware": torch.cuda.get_device_name(), "torch": torch.__version__, "records": records}, arguments.output
        )


if __name__ == "__main__":
    main()
