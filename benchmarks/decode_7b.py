"""Tokens per second of a LLaMA-2-7B with random weights, packed in several formats, beside bfloat16 in the same run.

    python benchmarks/decode_7b.py --output benchmarks/results/decode_7b.json

Every model goes the same way (`whit.generation`): a prompt is read once, then one step is recorded as a CUDA graph
and replayed per token. `milliseconds_per_token` is the median over rounds of 12 replayed steps,
`prefill_milliseconds` that of a prompt of `--prefill` tokens (logits of the last token only), `spread_milliseconds`
half the width of the middle half of the rounds. What spreads by more than one part in forty is measured once more,
and the quieter result kept. `resident_bytes` is what the model's tensors take on the device while it decodes (a
weight may be held in another form than the stored one; `running_bits_per_weight` has its bits), `peak_bytes` the most
that was allocated while it answered, of the long prompt apart. Packed models have the embedding and head that `whit
compress` makes, 8 bits. Bits are random: only time and memory mean anything. Six columns of every normalisation are
twenty times louder than the others, as some are in trained models of this size, so that LLM.int8() has outliers to
multiply in 16 bit; its last projections meet hundreds, because gates and halves of random weights multiply what is
loud already.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import platform
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from random_llama import SHAPES
from random_packed import pack_randomly
from reports import write_report
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import whit
from whit.formats.base import Format, Packed
from whit.formats.binary_residual import BinaryResidual
from whit.formats.grouped_integer import GroupedInteger
from whit.formats.level_table import LevelTable
from whit.formats.outlier_int8 import OutlierInt8
from whit.formats.quantised_inputs import QuantisedInputs
from whit.formats.scaled_codes import ScaledCodes
from whit.formats.structured_binary import StructuredBinary
from whit.formats.vector_codebook import VectorCodebook
from whit.generation.fused import FusedStep
from whit.generation.greedy import Request, continue_greedily, prepare
from whit.generation.loop import Chooser, record
from whit.kernels import explain
from whit.models.packed import packed_modules
from whit.models.skeleton import skeleton_of
from whit.pipeline.assign import EMBEDDING_GROUP

VARIANTS: dict[str, Format | None] = {
    "bfloat16": None,
    "signs (g128)": GroupedInteger(bits=1, group_size=128, symmetric=True),
    "BiLLM whit (row)": BinaryResidual(block_size=0, means=False),
    "k-means 2 (row)": LevelTable(bits=2, block_size=0),
    "LLM.int8()": OutlierInt8(threshold=6.0, outliers="dynamic"),
    "FP8 W8A16": ScaledCodes(system="e4m3fn", group_size=0),
    "FP8 W8A8": QuantisedInputs(weight=ScaledCodes(system="e4m3fn", group_size=0), system="e4m3fn", static=False),
    "GPTQ 4 (g64)": GroupedInteger(bits=4, group_size=64, symmetric=False),
    "BiLLM paper (128)": BinaryResidual(block_size=128, means=True),
    "BiLLM whit (128)": BinaryResidual(block_size=128, means=False),
    "k-means 2 (128)": LevelTable(bits=2, block_size=128),
    "STBLLM 4:8 (row)": StructuredBinary(n=4, m=8, block_size=0),
    "codebook 256 of width 12": VectorCodebook(codes=256, width=12, ternary=False),
    "GPTQ 2 (g64)": GroupedInteger(bits=2, group_size=64, symmetric=False),
    "GPTQ 3 (g64)": GroupedInteger(bits=3, group_size=64, symmetric=False),
}
"""Rows of the table, the most important first: format of every linear layer in the blocks."""
CHUNK = 12
"""Steps of a round."""
PREFILLS = 7
"""Rounds of one prompt each."""
RESTLESS = 1 / 40
"""Relative spread from which a measurement is repeated."""
LOUD_EVERY, LOUDNESS = 683, 20.0
"""Which columns of a normalisation are how much louder than the others."""
EMBEDDING = GroupedInteger(bits=8, group_size=EMBEDDING_GROUP, symmetric=True)


def random_model(shape: str, layout: Format | None, seed: int, device: torch.device) -> Any:
    """The model on the device, its weights drawn there."""
    config = LlamaConfig(**SHAPES[shape], vocab_size=32000, max_position_embeddings=4096, tie_word_embeddings=False)
    model: Any = skeleton_of(LlamaForCausalLM, config, torch.bfloat16)
    generator = torch.Generator(device).manual_seed(seed)
    if layout is not None:
        pack_randomly(model, layout, EMBEDDING, generator)
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            value = torch.ones(parameter.shape, dtype=torch.bfloat16, device=device)
            if parameter.dim() > 1:
                value.normal_(0, 0.02, generator=generator)
            else:
                value[::LOUD_EVERY] = LOUDNESS
            module._parameters[name] = nn.Parameter(value, requires_grad=False)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    return model.eval()


def inputs_for(packed: Packed, vectors: int) -> torch.Tensor:
    """Zeros that a layer could be given."""
    device = next(iter(packed.tensors.values())).device
    return torch.zeros(vectors, packed.columns, dtype=torch.bfloat16, device=device)


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of all tensors of the model on a device, shared storage once."""
    tensors = [item for item in (*model.parameters(), *model.buffers()) if item.is_cuda]
    stores = {item.untyped_storage().data_ptr(): item.untyped_storage().nbytes() for item in tensors}
    return sum(stores.values())


def milliseconds(run: Any, repetitions: int, rounds: int) -> tuple[float, float]:
    """Median over rounds of the time of one call, and half the width of the middle half of them."""
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repetitions):
            run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / repetitions)
    times.sort()
    return statistics.median(times), (times[rounds * 3 // 4] - times[rounds // 4]) / 2


def quieter(measured: Callable[[], dict[str, Any]], value: str, spread: str) -> dict[str, Any]:
    """A measurement, or if it spreads the quieter of two; `repeated` says so, with what the other one found."""
    first = measured()
    if first[spread] <= RESTLESS * first[value]:
        return first
    second = measured()
    kept, other = sorted((first, second), key=lambda found: found[spread] / found[value])
    return kept | {"repeated": {value: other[value], spread: other[spread]}}


def measure_decode(model: Any, batch: int, prompt: int, new: int, generator: Any) -> dict[str, Any]:
    """One row: a prompt, then new tokens by replays of one recorded step."""
    device = generator.device
    torch.cuda.reset_peak_memory_stats()
    ids = torch.randint(0, 32000, (batch, prompt), generator=generator, device=device)
    request = Request({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, new, (), 0)
    with torch.inference_mode():
        prepared = prepare(model, request, "auto", join=True)
        chooser = Chooser(torch.zeros_like(ids[:, :1]), new, (), 0)
        chooser.take(prepared.first)
        replay, more, reason = record(prepared.step, chooser)
        started = time.perf_counter()
        rounds = (new - 1 - more) // CHUNK
        per_token, spread = milliseconds(replay, CHUNK, rounds)
        torch.cuda.synchronize()
        wall = (time.perf_counter() - started) / (rounds * CHUNK) * 1e3
    out = {
        "way": prepared.way,
        "graph": not reason,
        "reasons": [*prepared.reasons, *([reason] if reason else [])],
        "products": products_of(prepared.step),
        "milliseconds_per_token": per_token,
        "spread_milliseconds": spread,
        "wall_milliseconds_per_token": wall,
        "tokens_per_second": batch * 1e3 / per_token,
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "distinct_tokens": int(chooser.result(new).unique().numel()),
    }
    del prepared, chooser, replay
    gc.collect()
    torch.cuda.empty_cache()
    return out


def products_of(step: Any) -> str:
    """How the products of a block with the same input run."""
    if not isinstance(step, FusedStep):
        return "as the model calls them"
    block = step.decoder.blocks[0]
    inputs = torch.zeros(len(step.place.start), block.before.weight.numel(), dtype=torch.bfloat16, device="cuda")
    return f"q k v {block.attention.explain(inputs)}, gate up {block.gate_up.explain(inputs)}"


def measure_prefill(model: Any, tokens: int, generator: Any) -> dict[str, Any]:
    """A long prompt, batch 1, read again and again into the same cache."""
    ids = torch.randint(0, 32000, (1, tokens), generator=generator, device=generator.device)
    mask = torch.ones_like(ids)
    with torch.inference_mode():
        step = prepare(model, Request({"input_ids": ids, "attention_mask": mask}, 1, (), 0), "auto", join=True).step
        torch.cuda.reset_peak_memory_stats()

        def run() -> None:
            if isinstance(step, FusedStep):
                step.prefill(ids, mask)
            else:
                model(input_ids=ids, use_cache=True, logits_to_keep=1)

        run()
        middle, spread = milliseconds(run, 1, PREFILLS)
    return {
        "prefill_milliseconds": middle,
        "prefill_spread_milliseconds": spread,
        "prefill_peak_bytes": torch.cuda.max_memory_allocated(),
    }


def profile(model: Any, batch: int, generator: Any) -> list[str]:
    """Kernels of one replayed step, by total time."""
    ids = torch.randint(0, 32000, (batch, 128), generator=generator, device=generator.device)
    request = Request({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 128, (), 0)
    with torch.inference_mode():
        prepared = prepare(model, request, "auto", join=True)
        chooser = Chooser(torch.zeros_like(ids[:, :1]), 128, (), 0)
        chooser.take(prepared.first)
        replay, _, _ = record(prepared.step, chooser)
        replay()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            replay()
            torch.cuda.synchronize()
    spans = sorted((event.time_range.start, event.time_range.end, event.name) for event in seen.events())
    kernels = Counter[str]()
    counts = Counter[str]()
    for start, end, name in spans:
        kernels[name] += end - start
        counts[name] += 1
    total = spans[-1][1] - spans[0][0] if spans else 0
    lines = [f"span {total:.0f} us, sum {sum(kernels.values()):.0f} us, {len(spans)} launches"]
    lines += [f"{time_:9.1f} us {counts[name]:5d} x  {name[:110]}" for name, time_ in kernels.most_common(16)]
    middle = len(spans) // 2
    if spans:
        first = spans[middle][0]
        lines += [
            f"   at {start - first:7.1f} for {end - start:6.1f}  {name[:70]}"
            for start, end, name in spans[middle : middle + 16]
        ]
    return lines


def measure(
    row: dict[str, Any], layout: Format | None, arguments: argparse.Namespace, tell: Callable[[str], None]
) -> None:
    """Fill in the row of one format, as far as it gets."""
    device = torch.device("cuda")
    row["hardware"] = torch.cuda.get_device_name()
    generator = torch.Generator(device).manual_seed(arguments.seed)
    model = random_model(arguments.shape, layout, arguments.seed, device)
    torch.cuda.synchronize()
    tell("weights drawn")
    layers = [module for name, module in packed_modules(model).items() if ".layers." in f".{name}."]
    if layers:
        weights = sum(module.rows * module.columns for module in layers)
        row["bits_per_weight"] = 8 * sum(module.packed.stored_bytes() for module in layers) / weights
    for batch in arguments.batches:
        row[f"batch {batch}"] = quieter(
            lambda batch=batch: measure_decode(model, batch, arguments.prompt, arguments.new, generator),  # type: ignore[misc]
            "milliseconds_per_token",
            "spread_milliseconds",
        )
        tell(f"batch {batch}: {row[f'batch {batch}']}")
    row["resident_bytes"] = tensor_bytes(model)  # now that weights have the form in which they are multiplied
    if layers:
        running, counts = [module.running for module in layers], (1, 16, arguments.prefill)
        row["running_bits_per_weight"] = 8 * sum(map(Packed.stored_bytes, running)) / weights
        row["kernels"] = {str(m): sorted({explain(inputs_for(item, m), item) for item in running}) for m in counts}
    if arguments.prefill:
        row |= quieter(
            lambda: measure_prefill(model, arguments.prefill, generator),
            "prefill_milliseconds",
            "prefill_spread_milliseconds",
        )
        tell(f"prefill {row['prefill_milliseconds']:.2f} ms")
    if arguments.library and layout is None:
        row["library"] = measure_library(model, arguments.prompt, arguments.library, generator)
        tell(f"library {row['library']}")
    if arguments.profile:
        print("\n".join(profile(model, 1, generator)), flush=True)


def run_alone(name: str, arguments: argparse.Namespace, file: Path) -> None:
    """One row in a process of its own, kept in `file` after every step."""
    begun, row = time.perf_counter(), dict[str, Any]()

    def tell(text: str) -> None:
        print(f"{time.perf_counter() - begun:6.1f} s  {name}, {text}", flush=True)
        file.write_text(json.dumps(row), encoding="utf-8")

    try:
        measure(row, VARIANTS[name], arguments, tell)
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {str(error)[:500]}"
        traceback.print_exc(limit=-4, file=sys.stdout)
    tell("done")


def run_rows(names: list[str], arguments: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """The rows of these formats, each in its own process, all at once; what they have after so long.

    Processes are forked, so that libraries are imported once; this one must not touch the GPU.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{number}.json" for number, name in enumerate(names)}
        if arguments.no_fork:
            for name in names:
                run_alone(name, arguments, files[name])
            names = []
        context = multiprocessing.get_context("fork")
        children = [context.Process(target=run_alone, args=(name, arguments, files[name])) for name in names]
        end = time.perf_counter() + seconds
        for child in children:
            child.start()
        for child in children:
            child.join(max(0.0, end - time.perf_counter()))
            if child.is_alive():
                child.kill()
                child.join()
        return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.is_file()}


def main() -> None:
    """Read the command line, measure each format, write the report after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 16])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--prefill", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=3600, help="start no further row after so long")
    parser.add_argument("--row-seconds", type=float, default=30, help="end a row after so long")
    parser.add_argument("--compile-seconds", type=float, default=0, help="first compile all rows' kernels side by side")
    parser.add_argument("--no-fork", action="store_true", help="all rows in this process, which cannot end a late one")
    parser.add_argument("--profile", action="store_true", help="print the kernels of one step")
    parser.add_argument("--library", type=int, default=0, help="also time so many tokens of transformers' generate")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    begun = time.perf_counter()
    rows: dict[str, Any] = {}
    report = {
        "shape": arguments.shape,
        "prompt": arguments.prompt,
        "new_tokens": arguments.new,
        "prefill": arguments.prefill,
        "seed": arguments.seed,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "transformers": transformers.__version__,
            "whit": whit.__version__,
        },
        "rows": rows,
    }
    if arguments.compile_seconds:
        small = argparse.Namespace(**vars(arguments) | {"shape": "7b-block", "profile": False, "library": 0, "new": 32})
        run_rows(arguments.variants, small, arguments.compile_seconds)
        print(f"compiled after {time.perf_counter() - begun:.1f} s", flush=True)
    for name in arguments.variants:
        left = arguments.seconds - (time.perf_counter() - begun)
        if left <= 0:
            print(f"no time left for {name}", flush=True)
            continue
        rows |= run_rows([name], arguments, min(left, arguments.row_seconds))
        if arguments.output is not None:
            write_report(report, arguments.output)
    if arguments.output is None:
        print(json.dumps(report, indent=1))


def measure_library(model: Any, prompt: int, new: int, generator: Any) -> dict[str, float]:
    """Tokens by transformers' own loop with its growing cache."""
    ids = torch.randint(0, 32000, (1, prompt), generator=generator, device=generator.device)
    continue_greedily(model, ids, new_tokens=4, way="library")
    torch.cuda.synchronize()
    times = []
    for count in (1, 1 + new):
        started = time.perf_counter()
        continue_greedily(model, ids, new_tokens=count, way="library")
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return {"milliseconds_per_token": (times[1] - times[0]) / new * 1e3}


if __name__ == "__main__":
    main()
