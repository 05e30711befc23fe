"""How long the host takes to issue the kernels that read a prompt, beside how long all of it takes.

    python benchmarks/prompts.py --output benchmarks/results/prompts.json

The model of `decode_7b.py`, one text. `host_milliseconds` is the time after which `prefill` returns with its kernels in
the queue (up to a thousand, then it waits for the device), `milliseconds` that after which they have run: medians over
rounds that each begin with an idle device. With `--busy n`, n processes beside it compute all the time, as others do on
a machine that is shared. `first_host_milliseconds` is the first prompt of a length that none had before (a token less),
with every kernel compiled and loaded.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from decode_7b import VARIANTS, random_model
from random_llama import SHAPES
from reports import write_report

from whit.generation.fused import FusedStep
from whit.generation.greedy import Request, prepare

ROUNDS = 9


def spin() -> None:
    """Keep a processor busy until ended."""
    number = 0
    while True:
        number = (number * 31 + 7) % 1000003


def one(step: FusedStep, ids: torch.Tensor) -> tuple[float, float]:
    """Milliseconds until the kernels of a prompt are issued, and until they have run."""
    mask = torch.ones_like(ids)
    torch.cuda.synchronize()
    begun = time.perf_counter()
    step.prefill(ids, mask)
    issued = time.perf_counter()
    torch.cuda.synchronize()
    return 1e3 * (issued - begun), 1e3 * (time.perf_counter() - begun)


def step_of(name: str, arguments: argparse.Namespace) -> tuple[FusedStep, torch.Tensor]:
    """A model of one format made ready, and the ids of a prompt, with kernels compiled for all lengths.

    Raises:
        RuntimeError: the model is not decoded in fused blocks.
    """
    device = torch.device("cuda")
    model = random_model(arguments.shape, VARIANTS[name], arguments.seed, device)
    generator = torch.Generator(device).manual_seed(arguments.seed)
    ids = torch.randint(0, 32000, (1, max(arguments.tokens)), generator=generator, device=device)
    with torch.inference_mode():
        request = Request({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 1, (), 0)
        step = prepare(model, request, "auto", join=True).step
        if not isinstance(step, FusedStep):
            raise RuntimeError(f"{name} is not decoded in fused blocks")
        for tokens in arguments.tokens:
            for shorter in (0, 0, 3):
                one(step, ids[:, shorter:tokens].contiguous())
    return step, ids


def measure(name: str, step: FusedStep, ids: torch.Tensor, counts: list[int]) -> dict[str, Any]:
    """The row of one format."""
    row: dict[str, Any] = {}
    with torch.inference_mode():
        for tokens in counts:
            prompt = ids[:, :tokens].contiguous()
            host, total = (
                statistics.median(values) for values in zip(*(one(step, prompt) for _ in range(ROUNDS)), strict=True)
            )
            row[str(tokens)] = {"host_milliseconds": host, "milliseconds": total}
            if tokens > 1:
                row[str(tokens)]["first_host_milliseconds"] = one(step, ids[:, 1:tokens].contiguous())[0]
            print(f"{name}, {tokens} tokens: {row[str(tokens)]}", flush=True)
    return row


def main() -> None:
    """Read the command line, measure each format, write the report after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--tokens", nargs="*", type=int, default=[2048, 128, 8])
    parser.add_argument("--busy", type=int, default=0, help="processes that compute beside")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    beside = [multiprocessing.get_context("fork").Process(target=spin, daemon=True) for _ in range(arguments.busy)]
    for process in beside:
        process.start()
    report: dict[str, Any] = {
        "hardware": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "shape": arguments.shape,
        "busy": arguments.busy,
        "seed": arguments.seed,
        "rows": {},
    }
    for name in arguments.variants:
        step, ids = step_of(name, arguments)
        report["rows"][name] = measure(name, step, ids, arguments.tokens)
        del step
        gc.collect()
        torch.cuda.empty_cache()
        write_report(report, arguments.output)
    for process in beside:
        process.terminate()


if __name__ == "__main__":
    main()
