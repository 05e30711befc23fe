"""Launch shapes of a decoder's products, found by timing steps of its first blocks (`whit.kernels.step_tuning`)."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import nn

from whit.formats.base import Packed
from whit.generation.blocks import GatedDecoder, UnsuitedError
from whit.generation.fused import FusedStep
from whit.generation.weights import decoder_of
from whit.kernels.cuda_shapes import Shape
from whit.kernels.step_tuning import Times, no_gated_launch, tune_in_step
from whit.kernels.tuning import TunedProduct

BLOCKS = 4
"""Of the model that are timed: more weights than a cache holds, of models of a few billion weights."""
LENGTH = 256
"""Tokens that the cache has room for; half of them are there."""
REPLAYS = 8
KERNEL = "a step of decoding"


@dataclass(frozen=True)
class TunedStep:
    """What was found for the weights of one launch; times are of a step of the first blocks, in seconds.

    `gated`: the launch also multiplies the second product by the SiLU of the first.
    """

    weights: tuple[Packed, ...]
    shape: Shape | None
    times: Times
    gated: bool = False


def tune_step(decoder: GatedDecoder) -> Iterator[TunedStep]:
    """Find the fastest launch of every product of a block within a step with one text, one after the other.

    Args:
        decoder: on a CUDA device, of 16-bit activations.
    """
    decoder = replace(decoder, blocks=decoder.blocks[:BLOCKS], modules=decoder.modules[:BLOCKS])
    weight = decoder.last.weight
    with torch.cuda.device(weight.device), torch.inference_mode():
        step = FusedStep(decoder, torch.zeros(1, dtype=torch.int64, device=weight.device), LENGTH)
        step.place.position.fill_(LENGTH // 2)
        ids = torch.zeros(1, 1, dtype=torch.int64, device=weight.device)
        block = decoder.blocks[-1]
        pair = block.gate_up.gateable
        for weights, makes, gated, aside in (
            (block.gate_up.launched, True, False, pair),
            (pair, True, True, []),
            (block.down.launched, False, False, []),
            (block.attention.launched, True, False, []),
            (block.output.launched, False, False, []),
        ):
            if weights:
                x = torch.zeros(1, weights[0].columns, dtype=weight.dtype, device=weight.device)
                with no_gated_launch(x, aside):
                    shape, times = tune_in_step(x, weights, lambda: _seconds(step, ids), makes=makes, gated=gated)
                yield TunedStep(tuple(weights), shape, times, gated)


def tuned_steps(model: nn.Module) -> Iterator[TunedProduct]:
    """What `tune_step` finds for a model on a CUDA device, as tuning reports it; nothing if it decodes otherwise."""
    decoder = decoder_of(model)
    if decoder is None:
        return
    blocks = len(decoder.blocks[:BLOCKS])
    with suppress(UnsuitedError):  # it is decoded in another way
        for found in tune_step(decoder):
            if not found.times:
                continue
            rows = tuple(packed.rows for packed in found.weights)
            yield TunedProduct(
                found.weights[0].format.to_json(),
                sum(rows),
                found.weights[0].columns,
                1,
                KERNEL,
                f"{KERNEL}, and the gate" if found.gated else KERNEL,
                found.times[None] / blocks,
                found.times[found.shape] / blocks,
                len(found.times),
                rows if len(rows) > 1 else (),
            )


def _seconds(step: FusedStep, ids: torch.Tensor) -> float:
    """Median time of a recorded step."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step.logits(ids)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(4):
            step.logits(ids)
    times = []
    for number in range(REPLAYS + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if number > 1:
            times.append(float(start.elapsed_time(end)) * 1e-3 / 4)
    return float(statistics.median(times))
