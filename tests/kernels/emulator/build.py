"""Compile a CUDA kernel of whit for the CPU emulator beside this file, and run it."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from tests.kernels.emulator.meanings import MEANINGS
from whit.kernels.cuda_layout import Layout
from whit.kernels.cuda_plan import Launch
from whit.kernels.cuda_sources import options_of, parts_of, source_of, wide_source
from whit.kernels.cuda_wide import WideShape, shared_bytes, wide_options

HERE = Path(__file__).parent
COMPILER = shutil.which("g++")

CALLS = {
    "gemv": "gemv((const u16*)x, operand_of(weight), (const u16*)bias, (u16*)y, chunk, tiles)",
    "small": "small((const u16*)x, weight, (const u16*)bias, (u16*)y, tokens, chunk, tiles)",
    "decode": "decode(weight, (u16*)y)",
    "structured_product": "structured_product((const u16*)x, weight, (const u16*)bias, (u16*)y, tokens, chunk, tiles)",
    "codebook_product": "codebook_product((const u16*)x, weight, (const u16*)bias, (u16*)y, chunk, tiles)",
    "wide": "wide({{(u64)x, (u64)weight.columns, (u64)tokens}},"
    " {{(u64)weight.codes[0], (u64)weight.width / 2, (u64)weight.rows}},"
    " weight, (const u16*)bias, (u16*)y, tokens, chunk)",
}
OPERAND = """
static Operand operand_of(const Weight& w) {
    Operand operand = {w};
#if BULK
    for (int i = 0; i < PLANES; i++)
        operand.maps.codes[i] = {{(u64)plane_codes(w, i), (u64)w.width / 2, (u64)w.rows, ROW_PITCH / 2, ROW_PITCH}};
    operand.maps.scalars = {{(u64)w.scalars, (u64)w.groups * NS, (u64)w.rows, GROUPS_IN_ITEM * NS, 0}};
#endif
    return operand;
}
"""
MAIN = """
static uint8_t *x, *bias, *y;
static Weight weight;
static int tokens, chunk, tiles;
int main(int, char** arguments) {
    long sizes[8], numbers[11];
    FILE* in = fopen(arguments[1], "rb");
    if (fread(sizes, 8, 8, in) != 8 || fread(numbers, 8, 11, in) != 11) return 2;
    uint8_t* tensors[7];
    for (int i = 0; i < 7; i++) {
        tensors[i] = sizes[i] ? guarded(sizes[i]) : nullptr;
        if (sizes[i] && fread(tensors[i], 1, sizes[i], in) != (size_t)sizes[i]) return 3;
    }
    fclose(in);
    const int n[4] = {(int)numbers[0], (int)numbers[1], (int)numbers[2], (int)numbers[3]};
    weight = {{tensors[0], tensors[1]}, tensors[2], tensors[3], tensors[4], n[0], n[1], n[2], n[3]};
    x = tensors[5], bias = tensors[6], y = guarded(sizes[7]);
    memset(y, 0xff, sizes[7]);
    tokens = numbers[4], chunk = numbers[5], tiles = numbers[6];
    kernel_body = []() { CALL; };
    run_blocks(numbers[7], THREADS, numbers[8], numbers[9], numbers[10]);
    FILE* out = fopen(arguments[2], "wb");
    fwrite(y, 1, sizes[7], out);
    return fclose(out);
}
"""
BUFFERS_MAIN = """
#ifndef CLUSTER
#define CLUSTER 1  // blocks
#endif
int main(int, char** arguments) {
    long count, numbers[16], sizes[16];
    FILE* in = fopen(arguments[1], "rb");
    if (fread(&count, 8, 1, in) != 1 || fread(numbers, 8, 16, in) != 16 || fread(sizes, 8, 16, in) != 16) return 2;
    for (int i = 0; i < count; i++) {
        b[i] = sizes[i] ? guarded(sizes[i]) : nullptr;
        if (sizes[i] && fread(b[i], 1, sizes[i], in) != (size_t)sizes[i]) return 3;
    }
    fclose(in);
    for (int i = 0; i < 16; i++) n[i] = numbers[i];
    kernel_body = []() { CALL; };
    run_blocks(n[0], n[1], n[2], n[3], CLUSTER);
    FILE* out = fopen(arguments[2], "wb");
    for (int i = 0; i < count; i++) fwrite(b[i], 1, sizes[i], out);
    return fclose(out);
}
"""


def translated(source: str) -> str:
    """The source with its assembly functions replaced; fails if assembly is left."""
    for start, meaning in MEANINGS.items():
        pattern = r"(template <[^>]*>\s*)?__device__ __forceinline__ " + re.escape(start)
        for match in list(re.finditer(pattern, source))[:1]:
            line_end = source.index("\n", match.start())
            one_line = source[match.start() : line_end].rstrip().endswith("}")
            end = line_end if one_line else source.index("\n}\n", match.start()) + 2
            source = source[: match.start()] + meaning + source[end:]
    assert "asm(" not in source and "asm volatile(" not in source
    return re.sub(r"extern __shared__ __align__\(\d+\) u8 memory\[\];", "u8* memory = shared_memory;", source)


def compiled(name: str, layout: Layout, launch: Launch | WideShape, tokens: int, bfloat: bool, folder: Path) -> Path:
    """An executable that runs the kernel `name` once."""
    if isinstance(launch, WideShape):
        options, source = wide_options(layout, launch, bfloat, early=False), wide_source(launch.tokens)
    else:
        options = options_of(layout, launch, tokens, bfloat, early=False)
        source = source_of(*parts_of(name, launch.shape))
    return built(name, source, options, folder)


# "-Og": compiles in three quarters of the time of "-O1", and what is compiled runs for a moment only.
FLAGS = ("-std=c++20", "-Og", "-w", "-fsanitize=alignment", "-fno-sanitize-recover=all")


@lru_cache(maxsize=1)
def _precompiled() -> tuple[TemporaryDirectory[str], list[str]]:
    """Options by which the library's headers, a third of what is compiled, are compiled once; and where they lie."""
    folder = TemporaryDirectory()
    header = Path(folder.name) / "library.h"
    lines = (HERE / "emulator.h").read_text(encoding="utf-8").splitlines()
    header.write_text("\n".join(line for line in lines if line.startswith("#include <")) + "\n", encoding="utf-8")
    command = [str(COMPILER), *FLAGS, "-x", "c++-header", str(header), "-o", f"{header}.gch"]
    done = subprocess.run(command, check=False, capture_output=True)
    return folder, [] if done.returncode else ["-include", str(header)]


def built(name: str, source: str, options: Sequence[str], folder: Path) -> Path:
    """An executable that runs the kernel `name` of a source once."""
    main = (OPERAND if name == "gemv" else "") + MAIN.replace("CALL", CALLS[name])
    return _built(name, source, main, options, folder)


def built_call(name: str, call: str, source: str, options: Sequence[str], folder: Path) -> Path:
    """An executable for `run_call`: `call` is an expression of the buffers u8* b[] and the numbers int n[]."""
    return _built(
        name, source, "static u8* b[16];\nstatic int n[16];" + BUFFERS_MAIN.replace("CALL", call), options, folder
    )


def run_call(
    program: Path, buffers: Sequence[Tensor | None], launch: Sequence[int], numbers: Sequence[int] = ()
) -> None:
    """Run the call once; buffers that it changes are changed.

    Args:
        buffers: b of the call.
        launch: blocks, threads of each, bytes of shared memory, whether threads run in descending order.
        numbers: n of the call from 4 on; before them stands `launch`.
    """
    content = [
        b"" if item is None else item.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for item in buffers
    ]
    sizes = [len(item) for item in content]
    values = [*launch, *numbers]
    header = [len(buffers), *values, *[0] * (16 - len(values)), *sizes, *[0] * (16 - len(sizes))]
    source, target = program.with_suffix(".in"), program.with_suffix(".out")
    source.write_bytes(torch.tensor(header).view(torch.uint8).numpy().tobytes() + b"".join(content))
    subprocess.run([str(program), str(source), str(target)], check=True, capture_output=True)
    found, start = bytearray(target.read_bytes()), 0
    for item, size in zip(buffers, sizes, strict=True):
        if item is not None and size:
            item.view(-1).view(torch.uint8).copy_(torch.frombuffer(found[start : start + size], dtype=torch.uint8))
        start += size


def _built(name: str, source: str, main: str, options: Sequence[str], folder: Path) -> Path:
    source = '#include "emulator.h"\n' + translated(source)
    path = folder / f"{name}.cpp"
    path.write_text(source + main, encoding="utf-8")
    command = [
        str(COMPILER),
        *FLAGS,
        *_precompiled()[1],
        f"-I{HERE}",
        *options,
        "-o",
        str(folder / name),
        str(path),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return folder / name


def run(
    program: Path,
    layout: Layout,
    launch: Launch | WideShape,
    tensors: Sequence[Tensor],
    shape: tuple[int, int],
    x: Tensor,
    bias: Tensor | None,
    *,
    descending: bool = False,
    tiles: tuple[int, int] | None = None,
) -> Tensor:
    """The kernel's result (vectors, rows), or the dense weight from `decode` (x then only gives the dtype).

    `tiles` are the first tile and the number of tiles of a launch of `wide` that has not all; other cells are NaN.

    Raises:
        subprocess.CalledProcessError: the kernel touched memory that is not its own.
    """
    rows = shape[0]
    if isinstance(launch, WideShape):
        shared = shared_bytes(layout, launch)
        first, count = (0, launch.tiles(rows, len(x))) if tiles is None else tiles
        numbers = [first, 0, count * launch.splits, -(-shared // 1024) * 1024, int(descending), launch.splits]
    else:
        shared = (
            -(-launch.shared // 1024) * 1024 if launch.shape.bulk else launch.shared
        )  # boxes lie at multiples of it
        numbers = [launch.chunk, launch.tiles, launch.grid, shared, int(descending), launch.shape.share]
    return executed(program, layout, numbers, tensors, shape, x, bias)


def executed(
    program: Path,
    layout: Layout,
    launch: Sequence[int],
    tensors: Sequence[Tensor],
    shape: tuple[int, int],
    x: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """As `run`; `launch`: two numbers for the kernel, blocks, shared memory, if descending, blocks of a cluster."""
    given = iter(tensors)
    blobs = [next(given) if name else None for name in layout.names] + [x, bias]
    rows, columns = shape
    out = torch.empty((rows, columns) if program.name == "decode" else (len(x), rows), dtype=x.dtype)
    sizes = [0 if blob is None else blob.numel() * blob.element_size() for blob in blobs]
    sizes.append(out.numel() * out.element_size())
    numbers = [rows, columns, layout.width, layout.groups, len(x), *launch]
    header = torch.tensor([*sizes, *numbers]).view(torch.uint8)
    content = [blob.contiguous().reshape(-1).view(torch.uint8) for blob in blobs if blob is not None and blob.numel()]
    source, target = program.with_suffix(".in"), program.with_suffix(".out")
    source.write_bytes(torch.cat([header, *content]).numpy().tobytes())
    subprocess.run([str(program), str(source), str(target)], check=True, capture_output=True)
    return torch.frombuffer(bytearray(target.read_bytes()), dtype=x.dtype).reshape(out.shape)
