"""What one GPU can do: bandwidth, matrix products, and instructions of a scheduler, written as JSON.

    python benchmarks/machine.py --output benchmarks/results/machine-h200.json

Instructions: a kernel of 64 unrolled steps on eight independent chains, one thread block of 1 to 16 warps for each
multiprocessor; cycles are those of the multiprocessor's own clock from the first warp's start to the last one's end,
per instruction of a scheduler (warp w runs on scheduler w mod 4), the median over multiprocessors. Bandwidth: 1 GiB,
far beyond the L2 cache. Products: 8192 x 8192 x 8192, random numbers, by the library that torch calls.
"""

from __future__ import annotations

import argparse
import ctypes
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from reports import write_report
from torch import Tensor

from whit.kernels.nvrtc import Kernel, compile_together, kernel
from whit.kernels.timing import seconds_per_call

STEPS = {
    "LOP3": "LOGIC",
    "SHF": "SHIFT",
    "PRMT": "PERMUTE",
    "IMAD": "MULTIPLY_ADD",
    "I2F": "TO_FLOAT",
    "mma m16n8k16 float16": "HALVES",
    "mma m16n8k32 int8": "BYTES",
    "mma m16n8k256 one bit": "BITS",
    "mma m16n8k128 one bit": "FEW_BITS",
}
"""Instruction -> the macro of `machine.cu` that is one."""
WARPS = (1, 2, 4, 8, 16)
SCHEDULERS = 4
LENGTH = 64  # steps in a round, as in `machine.cu`
ROUNDS = 400
SIDE = 8192
READ_BYTES = 1 << 30
SEED = 0
SOURCE = Path(__file__).with_name("machine.cu")


def cycles_per_instruction(run: Kernel, warps: int, processors: int, generator: torch.Generator) -> float:
    """Cycles between two instructions of a scheduler, with so many warps on every multiprocessor."""
    seeds = torch.randint(0, 2**31 - 1, (14,), dtype=torch.int32, device="cuda", generator=generator)
    out = torch.empty(processors * warps * 32, dtype=torch.int32, device="cuda")
    marks = torch.zeros(processors, warps, 2, dtype=torch.int64, device="cuda")
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (seeds, out, marks)]
    for _ in range(3):  # the last counts: code is in its cache then
        run.launch(processors, 32 * warps, 0, [*pointers, ctypes.c_int(ROUNDS)])
    torch.cuda.synchronize()
    cycles = marks[:, :, 1].amax(1) - marks[:, :, 0].amin(1)
    each = LENGTH * ROUNDS * -(-warps // SCHEDULERS)
    return float(cycles.double().median()) / each


def read_seconds(device: int, processors: int) -> dict[str, float]:
    """Time to read `READ_BYTES`, by launch: blocks of a multiprocessor, and loads that each thread has on the way."""
    data = torch.zeros(READ_BYTES // 4, dtype=torch.int32, device="cuda").random_()
    out = torch.empty(1, dtype=torch.int32, device="cuda")
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (data, out)]
    times = {}
    for ahead in (4, 8):
        run = kernel(SOURCE.read_text(encoding="utf-8"), "read", (f"-DAHEAD={ahead}",), device)
        for blocks, threads in ((1, 1024), (2, 1024), (4, 512), (16, 512)):

            def call(run: Kernel = run, blocks: int = blocks, threads: int = threads) -> None:
                run.launch(processors * blocks, threads, 0, [*pointers, ctypes.c_longlong(READ_BYTES // 16)])

            times[f"{blocks} x {threads}, {ahead} ahead"] = seconds_per_call([call] * 2, 7)[0]
    return times


def products() -> dict[str, Callable[[], Tensor]]:
    """Square matrix products by type of their operands; those that this torch or device has not are left out."""
    wide = {name: torch.randn(2, SIDE, SIDE, device="cuda") for name in ("float16", "bfloat16", "float8")}
    found: dict[str, Callable[[], Tensor]] = {}
    for name in ("float16", "bfloat16"):
        left, right = wide[name].to(getattr(torch, name))
        found[name] = lambda left=left, right=right: left @ right.T
    codes = torch.randint(-127, 128, (2, SIDE, SIDE), dtype=torch.int8, device="cuda")
    found["int8"] = lambda: torch._int_mm(codes[0], codes[1].T)
    one = torch.ones((), device="cuda")
    first, second = wide["float8"].to(torch.float8_e4m3fn)
    found["float8"] = lambda: torch._scaled_mm(first, second.T, one, one, out_dtype=torch.bfloat16)
    return found


def ceilings(device: int, processors: int) -> dict[str, Any]:
    """Bytes per second of a copy and of reading; operations per second of matrix products."""
    source, target = torch.randn(2, READ_BYTES // 4, device="cuda")
    copy, _ = seconds_per_call([lambda: target.copy_(source)] * 2, 7)
    reads = read_seconds(device, processors)
    rates = {}
    for name, call in products().items():
        try:
            rates[name] = 2 * SIDE**3 / seconds_per_call([call] * 2, 7)[0]
        except (RuntimeError, AttributeError) as error:
            print(f"no product of {name}: {str(error).splitlines()[0]}", flush=True)
    fastest = min(reads, key=reads.__getitem__)
    return {
        "copy_bytes_per_second": 2 * READ_BYTES / copy,
        "read_bytes_per_second": READ_BYTES / reads[fastest],
        "read_launch": fastest,
        "operations_per_second": rates,
    }


def main() -> None:
    """Measure everything and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    generator = torch.Generator("cuda").manual_seed(SEED)
    device, properties = torch.cuda.current_device(), torch.cuda.get_device_properties(0)
    processors, source = properties.multi_processor_count, SOURCE.read_text(encoding="utf-8")
    compile_together([(source, (f"-DSTEP={step}",), False) for step in STEPS.values()], device)
    cycles: dict[str, dict[str, float]] = {}
    for name, step in STEPS.items():
        run = kernel(source, "rate", (f"-DSTEP={step}",), device)
        cycles[name] = {str(warps): cycles_per_instruction(run, warps, processors, generator) for warps in WARPS}
        print(name, {warps: round(value, 3) for warps, value in cycles[name].items()}, flush=True)
    limits = ceilings(device, processors)
    print(limits, flush=True)
    report = {
        "hardware": properties.name,
        "multiprocessors": processors,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "seed": SEED,
        **limits,
        "cycles_per_instruction": cycles,
    }
    write_report(report, arguments.output)


if __name__ == "__main__":
    main()
