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

from whit.kernels.cuda_layout import Layout
from whit.kernels.cuda_plan import Launch
from whit.kernels.cuda_sources import options_of, parts_of, source_of, wide_source
from whit.kernels.cuda_wide import WideShape, shared_bytes, wide_options

HERE = Path(__file__).parent
COMPILER = shutil.which("g++")

# Functions of the sources that are inline assembly, by what their definition starts with, and what they mean.
MEANINGS = {
    "float float_of_half(": "static float float_of_half(u16 h) { return from_half(h); }",
    "u16 half_of_float(": "static u16 half_of_float(float f) { return to_half(f); }",
    "u16 x_of_float(": "static u16 x_of_float(float f) { return to16(f); }",
    "u32 shared_address(": "static u32 shared_address(const void* p) { return (uint8_t*)p - shared_memory; }",
    "u32 shared_word(": "static u32 shared_word(u32 address) { return *(const u32*)(shared_memory + address); }",
    "void copy16(": "static void copy16(u8* to, const u8* from, int valid)"
    " { if (ALIGN == 16) copy_later<16>(to, from, valid);"
    " else if (ALIGN == 4)"
    " for (int i = 0; i < 16; i += 4) copy_later<4>(to + i, valid > i ? from + i : from, valid - i);"
    " else for (int i = 0; i < 16; i++) to[i] = i < valid ? from[i] : 0; }",
    "void copy4(": "static void copy4(void* to, const u8* from, int valid) { copy_later<4>(to, from, valid); }",
    "void copy_whole(": "template <int BYTES> static void copy_whole(u8* to, const u8* from)"
    " { copy_later<BYTES>(to, from, BYTES); }",
    "void copy_piece(": "static void copy_piece(u8* to, const u8* from, int valid)"
    " { copy_later<16>(to, from, valid); }",
    "void copies_commit(": "static void copies_commit() { close_group(); }",
    "void copies_wait(": "template <int LEFT> static void copies_wait() { finish_groups(LEFT); }",
    "void wait_for_previous_kernel(": "static void wait_for_previous_kernel() {}",
    "void start_next_kernel(": "static void start_next_kernel() {}",
    "void start_next_kernel_after(": "static void start_next_kernel_after(u32) {}",
    "void prefetch_x(": "static void prefetch_x(const u16*, int) {}",
    "void product(int": "static void product(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1)"
    " { u32 a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1}; tensor_product(c, 4, a, 2, b, bytes_times_bytes); }",
    "void product(float": "static void product(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1)"
    " { u32 b[2] = {b0, b1}; tensor_product(c, 4, a, 2, b, floats_times_floats); }",
    "void count(int (&c)[4], u32 a0, u32 a1, u32 a2": "static void count(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3,"
    " u32 b0, u32 b1) { u32 a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1}; tensor_product(c, 4, a, 2, b, ones_in_both); }",
    "void count(int (&c)[4], u32 a0, u32 a1, u32 b)": "static void count(int (&c)[4], u32 a0, u32 a1, u32 b)"
    " { u32 a[2] = {a0, a1}; tensor_product(c, 2, a, 1, &b, ones_in_both); }",
    "u32 even_and_odd(": "static u32 even_and_odd(u32 even, u32 odd)"
    " { return (even & 0x55555555u) | (odd & 0xaaaaaaaau); }",
    "void weigh_bytes(": "static void weigh_bytes(int (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1)"
    " { u32 a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1}; tensor_product(d, 4, a, 2, b, bytes_times_bytes); }",
    "u32 counts_before(": "static u32 counts_before(int low, int high, u32 rest)"
    " { return (u32)min(low, 255) | (u32)min(high, 255) << 8 | rest << 16; }",
    "void weigh(": "static void weigh(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1)"
    " { u32 a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1}; tensor_product(d, 4, a, 2, b, halves_times_halves); }",
    "void barrier_init(": "",
    "void barriers_ready(": "static void barriers_ready() {}",
    "void barrier_arrive(": "",
    "void barrier_expect(": "",
    "void barrier_wait(": "",
    "uint4 read_sixteen(": "static uint4 read_sixteen(const void* from) { return *(const uint4*)from; }",
    "uint2 read_eight(": "static uint2 read_eight(const void* from) { return *(const uint2*)from; }",
    "u32 read_constant(": "static u32 read_constant(const void* from) { return *(const u32*)from; }",
    "void known(": "static void known(int&, int&, const u16*&) {}",
    "void copy_tile(": "",
    "void copy_box(": "static void copy_box(u8* to, const TensorMap& map, u64* barrier, int column, int token)"
    " { copy_box(to, map, barrier, column, token, TOKENS); }",
    "void copy_bulk(": "",
    "uint4 load_sixteen(": "static uint4 load_sixteen(const u8* from) { return *(const uint4*)from; }",
    "uint2 load_eight(": "static uint2 load_eight(const u8* from) { return *(const uint2*)from; }",
    "void store_to_peer(": "static void store_to_peer(float* own, int rank, float value)"
    " { *(float*)(shared_memories[rank] + ((uint8_t*)own - shared_memory)) = value; }",
    "void send_sum(": "",
    "void send_word(": "static void send_word(u32* own, int rank, u32 value, u64* barrier)"
    " { send_sum((float*)own, rank, __uint_as_float(value), barrier); }",
    "void send_four(": "static void send_four(u32* own, int rank, const u32 (&v)[4], u64* barrier)"
    " { for (int i = 0; i < 4; i++) send_sum((float*)own + i, rank, __uint_as_float(v[i]), barrier); }",
    "void peers_wait(": "static void peers_wait(u64* barrier) { barrier_wait(barrier, 0); }",
    "void copy_codes(": "static void copy_codes(u8* to, const TensorMap& map, u64* barrier, int column, int row)"
    " { copy_box(to, map, barrier, column, row, 64 * ROW_GROUPS); }",
    "void prefetch_map(": "static void prefetch_map(const TensorMap&) {}",
    "void store_transposed(": "",
    "void registers_ready(": "static void registers_ready() {}",
    "void products_commit(": "static void products_commit() { close_products(); }",
    "void products_wait(": "template <int LEFT> static void products_wait() { finish_products(LEFT); }",
    "void cluster_begun(": "static void cluster_begun() { cluster_arrive(); }",
    "void cluster_arrive(": "",
    "void cluster_wait(": "",
    "void cluster_leave(": "static void cluster_leave() { cluster_arrive(), cluster_wait(); }",
    "uint4 peer_words(": "",
    "u32 descriptor_of(": "static u32 descriptor_of(const u8* tile) { return (tile - shared_memory) / 16; }",
    "u64 descriptor_of(": "static u64 descriptor_of(const u8* tile) { return (tile - shared_memory) / 16; }",
    "void warpgroup_product(": "static void warpgroup_product(float (&c)[TOKENS / 2], const u32 (&a)[4],"
    " u64 descriptor) { late_product(c, TOKENS / 2, a, shared_memory + descriptor / 64 * 1024, descriptor % 64 / 2); }",
    "void codes_product(": "static void codes_product(u32 (&c)[N / 2], u32 left, u32 right, int more)"
    " { late_product(c, N / 2, left, right, true, more != 0); }",
    "void columns_product(": "static void columns_product(u32 (&c)[N / 2], u32 left, u32 right, int more)"
    " { late_product(c, N / 2, left, right, false, more != 0); }",
    "void consumers_meet(": "static void consumers_meet()"
    " { static Barrier meeting; waits_unparked = true; meeting.wait(256); }",
    "void fewer_registers(": "template <int COUNT> static void fewer_registers() {}",
    "void more_registers(": "template <int COUNT> static void more_registers() {}",
    "u32 larger_pair(": "static u32 larger_pair(u32 most, u32 pair)"
    " { return to16(fmaxf(from16(most), fabsf(from16(pair))))"
    " | (u32)to16(fmaxf(from16(most >> 16), fabsf(from16(pair >> 16)))) << 16; }",
    "u32 larger_integers(": "static u32 larger_integers(u32 a, u32 b)"
    " { return max(a & 0xffffu, b & 0xffffu) | max(a >> 16, b >> 16) << 16; }",
    "u32 choose_bytes(": "static u32 choose_bytes(u32 low, u32 high, u32 selector)"
    " { return __byte_perm(low, high, selector); }",
    "u32 fma_pairs(": "static u32 fma_pairs(u32 a, u32 b, u32 c)"
    " { return to16(from16(a) * from16(b) + from16(c))"
    " | (u32)to16(from16(a >> 16) * from16(b >> 16) + from16(c >> 16)) << 16; }",
    "u32 multiply_pairs(": "static u32 multiply_pairs(u32 a, u32 b)"
    " { return to16(from16(a) * from16(b)) | (u32)to16(from16(a >> 16) * from16(b >> 16)) << 16; }",
    "u32 in_register(": "static u32 in_register(u32 constant) { return constant; }",
    "u32 pair_of_floats(": "static u32 pair_of_floats(float low, float high)"
    " { return to16(low) | (u32)to16(high) << 16; }",
    "void whole_product(": "static void whole_product(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1)"
    " { u32 a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1}; tensor_product(c, 4, a, 2, b, signed_bytes_times_bytes); }",
    "void wide_product(": "static void wide_product(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1)"
    " { u32 a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};"
    " tensor_product(c, 4, a, 2, b, FLOATS ? floats_times_floats : halves_times_halves); }",
    "u32 bytes_of(": "static u32 bytes_of(u32 low, u32 high, u32 selector)"
    " { return __byte_perm(low, high, selector); }",
    "u32 subtracted(": "static u32 subtracted(u32 a, u32 b) { const auto one = [](u32 x, u32 y) -> u32"
    " { return FLOATS ? to_bfloat(from_bfloat(x) - from_bfloat(y)) : to_half(from_half(x) - from_half(y)); };"
    " return one(a, b) | one(a >> 16, b >> 16) << 16; }",
    "u32 pair_of_halves(float": "static u32 pair_of_halves(float low, float high)"
    " { return to_half(low) | (u32)to_half(high) << 16; }",
    "void from_e4m3(": "static void from_e4m3(u32& low, u32& high, u32 codes)"
    " { const auto one = [&](int i) -> u32 { return from_small(codes >> 8 * i & 255); };"
    " low = one(0) | one(1) << 16, high = one(2) | one(3) << 16; }",
    "u32 nearest_pair(": "static u32 nearest_pair(float low, float high)"
    " { return to_small(low) | to_small(high) << 16; }",
    "void largest_at_peer(": "static void largest_at_peer(u32* own, int rank, u32 value)"
    " { atomicMax((u32*)(shared_memories[rank] + ((uint8_t*)own - shared_memory)), value); }",
    "void copy_rows(": "static void copy_rows(u8* to, const TensorMap& map, u64* barrier, int column, int row)"
    " { copy_box(to, map, barrier, column / 2, row, 16); }",
    "u32 add_pairs(": "static u32 add_pairs(u32 a, u32 b)"
    " { return to16(from16(a) + from16(b)) | (u32)to16(from16(a >> 16) + from16(b >> 16)) << 16; }",
}
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
