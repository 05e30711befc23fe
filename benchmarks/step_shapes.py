"""Launches of products found within steps of decoding of a LLaMA-2-7B with random weights, and what they gain.

    python benchmarks/step_shapes.py --variants "k-means 2 (row)" "BiLLM paper (128)"
    python benchmarks/step_shapes.py --shape 7b-block --compile    # in several processes at once

Found shapes are kept in this machine's file of tuned shapes (`whit tune` finds them for a model at hand).
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from decode_7b import VARIANTS, measure_decode, random_model

from whit.generation.blocks import GatedBlock, gated_decoder
from whit.generation.step_tuning import tune_step
from whit.kernels.cuda_layout import layout_of
from whit.kernels.cuda_ops import device_limits
from whit.kernels.cuda_shapes import Shape, step_sizes
from whit.kernels.cuda_step import Call, call_source, place_step
from whit.kernels.nvrtc import Source, compile_together


def first_tried(block: GatedBlock) -> list[Source]:
    """The kernels that the first half of a search tries."""
    sources = []
    for weights, makes, gated in (
        (block.gate_up.launched, True, False),
        (block.gate_up.gateable, True, True),
        (block.down.launched, False, False),
        (block.attention.launched, True, False),
        (block.output.launched, False, False),
    ):
        layout = layout_of(weights[0].format, weights[0].columns) if weights else None
        if layout is None:
            continue
        rows, columns = tuple(packed.rows for packed in weights), weights[0].columns
        for shape in step_sizes(layout):
            launch = place_step(layout, rows, columns, *device_limits(0)[1:], shape, gated=gated)
            if launch is not None:
                call = Call(layout, rows, columns, True, 0, makes, makes, gated)
                sources.append(call_source(call, launch))
    return sources


def named(shape: Shape | None) -> str:
    """A shape in few letters."""
    if shape is None:
        return "as outside"
    flags = f"{' bulk' * shape.bulk}{' patient' * shape.patient}{' late' * shape.late}{' ahead' * shape.ahead}"
    return f"t{shape.threads} i{shape.item} u{shape.unroll} d{shape.depth}{flags}"


def main() -> None:
    """Read the command line; for every format print the time of a token before and after, and what was tried."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=["BiLLM paper (128)"])
    parser.add_argument("--shape", default="7b")
    parser.add_argument("--compile", action="store_true", help="compile what will be tried first, and tune nothing")
    parser.add_argument("--delay", type=float, default=0, help="begin after so many seconds")
    parser.add_argument("--seconds", type=float, default=600, help="tune no further format after so long")
    arguments = parser.parse_args()
    begun, device = time.perf_counter(), torch.device("cuda")

    def say(*items: object) -> None:
        print(f"{time.perf_counter() - begun:6.1f} s ", *items, flush=True)

    def token(model: Any) -> str:
        row = measure_decode(model, 1, 128, 128, torch.Generator(device).manual_seed(0))
        way = " ".join([str(row["way"]), *row["reasons"]])
        return f"{row['milliseconds_per_token']:.4f} ms +-{row['spread_milliseconds']:.4f} {way}"

    time.sleep(arguments.delay)
    for name in arguments.variants:
        if time.perf_counter() - begun > arguments.seconds:
            break
        model = random_model(arguments.shape, VARIANTS[name], 0, device)
        say(name, "before", token(model))
        decoder = gated_decoder(model, join=True)
        if arguments.compile:
            compile_together(first_tried(decoder.blocks[0]), 0)
            continue
        for found in tune_step(decoder):
            rows = "+".join(str(packed.rows) for packed in found.weights)
            say(rows, "x", found.weights[0].columns, "gated" if found.gated else "", named(found.shape))
            for shape, seconds in sorted(found.times.items(), key=lambda item: item[1]):
                print(f"          {seconds * 1e6:8.2f} us  {named(shape)}")
        say(name, "after", token(model), token(model))
        del model, decoder
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
