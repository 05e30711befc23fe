"""Memory: what a run will need by phase, and the high-water marks that the operating system and the device report."""

from __future__ import annotations

import math
import re
import resource
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from whit.kernels.semi_structured import converted_bytes
from whit.models.layers import declared_end
from whit.pipeline.assign import Assignment
from whit.pipeline.finish import dense_specs
from whit.pipeline.gradient_task import BOUNDARY_SHARE, gradient_layers
from whit.pipeline.prepare import Job

# Resident memory of Python with torch and transformers imported, before any tensor (measured: 0.45 to 0.6 GB).
RUNTIME_BYTES = 600 * 2**20
# A CPU's loops, their compiler (extra `cpu`) and what the C library does not give back add this (measured: 0.2 GB).
COMPILER_BYTES = 200 * 2**20
# What a CUDA context, its libraries and kernels add to the resident memory (a run on an H200 peaked at 2.4 GB in all).
CUDA_BYTES = 5 * 2**28
FITS_BELOW = 0.8
# Copies of the second moments that a method holds at once. On a CUDA device their factor is found block by block, from
# halves (70B shapes: 35.6 GB were measured where three copies made 30.3).
MOMENT_COPIES = {"cpu": 3, "cuda": 5}


@dataclass(frozen=True)
class Memory:
    """Peak bytes on the host and on the device (0 where the device is the host)."""

    host: int
    device: int


@dataclass(frozen=True)
class Sizes:
    """What the peak of a run follows from; all in bytes, of the computation's dtype, unless said otherwise.

    Attributes:
        outside: parameters that lie in no block. block: parameters of the largest block. dense: of the whole model.
        matrix, moment: float32 bytes of the largest matrix in a block, and of the second moments of its widest inputs.
        end: float32 bytes of the largest matrix outside the blocks.
        streams: hidden states of the calibration sequences. activations: of one forward pass through a block.
        kept: inputs of the layers of a block, of all sequences: what all of several processes but the first hold until
            sums are handed to them (`whit.pipeline.relay`).
        packed: the compressed model in memory. converted: other forms of its weights that products keep.
        answer: the main output of one evaluation window. copies: of the second moments that are held at once.
    """

    outside: int
    block: int
    dense: int
    matrix: int
    moment: int
    end: int
    streams: int
    activations: int
    packed: int
    answer: int
    kept: int = 0
    converted: int = 0
    copies: int = MOMENT_COPIES["cpu"]


def expected_memory(job: Job, file_bytes: int, available: int, processes: int = 1) -> Memory:
    """Peaks of a prepared job: the largest of its phases.

    Args:
        file_bytes: of the compressed model.
        available: bytes free where the computation runs; decides whether the original is evaluated beside it.
        processes: that share the batches; the peaks are those of one of them.
    """
    sizes = _sizes(job, file_bytes, processes)
    gradients = gradient_sizes(job)
    ahead = 0 if job.device.type == "cpu" else sizes.block  # the next block is there already (`whit.models.ahead`)
    peak = max(
        compression_bytes(sizes) + (gradients.block if gradients.sums else 0) + ahead,
        evaluation_bytes(sizes, available) if job.evaluation is not None else 0,
        gradient_bytes(gradients, available),
    )
    if job.device.type == "cpu":
        return Memory(RUNTIME_BYTES + COMPILER_BYTES + peak, 0)
    # The host stages one tensor at a time, in the file's dtype and in float32.
    return Memory(RUNTIME_BYTES + CUDA_BYTES + 2 * max(sizes.end, sizes.matrix), peak)


def compression_bytes(sizes: Sizes) -> int:
    """Peak of catching inputs and of the block loop.

    Workspace is taken as six float32 copies of the largest matrix and some of its second moments (`MOMENT_COPIES`),
    which covers the methods in this package.
    """
    catching = sizes.outside + max(5 * sizes.end, sizes.activations) + sizes.streams
    block = sizes.block + 6 * sizes.matrix + sizes.copies * sizes.moment
    return max(catching, block + sizes.activations + 2 * sizes.streams + sizes.kept)


def evaluation_bytes(sizes: Sizes, available: int) -> int:
    """Peak of measuring: both models (or the compressed one alone), one unpacked matrix, the outputs of one window.

    One answer more than there are: a device compares more rows at a time (`whit.evaluation.tokens`), and a CPU's heap,
    which keeps what is freed meanwhile (`whit.heap`), may have no hole that fits the next (half of one was measured).
    """
    # Rows of the output are compared a few at a time; a quarter of an answer covers that and a forward pass.
    alone = sizes.packed + sizes.converted + 2 * max(sizes.end, sizes.matrix) + sizes.answer * 9 // 4
    return alone + (sizes.dense + sizes.answer if original_fits(sizes.dense, available) else 0)


@dataclass(frozen=True)
class GradientSizes:
    """What the peak of the gradient pass follows from; all in float32 bytes.

    Attributes:
        outside, block, dense: parameters, as in `Sizes`.
        sums: of squared gradients, all layers; 0 if no method asks for gradients.
        flowing: gradients that flow from one block to the one before it, for all sequences.
        boundaries: hidden states between all blocks, for all sequences.
        activations: of one sequence through a block. logits: of one sequence.
        whole: the blocks cannot be taken one at a time.
    """

    outside: int
    block: int
    dense: int
    sums: int
    flowing: int
    boundaries: int
    activations: int
    logits: int
    whole: bool

    @property
    def disk(self) -> int:
        """Bytes that the pass keeps in the working folder: sums, and old and new gradients at one boundary."""
        return self.sums + 2 * self.flowing if self.sums else 0


def gradient_bytes(sizes: GradientSizes, available: int) -> int:
    """Peak of the gradient pass; `available` bounds the hidden states it keeps.

    A block's backward pass is taken as four copies of the block (weights, gradients, sums old and new) and four of one
    sequence's activations; the loss as four copies of the logits.
    """
    if not sizes.sums:
        return 0
    if sizes.whole:
        return 2 * sizes.dense + 2 * sizes.block + 4 * (sizes.logits + sizes.activations)
    kept = min(sizes.boundaries, int(BOUNDARY_SHARE * available))
    return kept + max(sizes.outside + 4 * sizes.logits, 4 * (sizes.block + sizes.activations))


def gradient_sizes(job: Job) -> GradientSizes:
    """Sizes of a prepared job's gradient pass."""
    blocks = [block for stack in job.stacks for block in stack.blocks]
    counts = [sum(p.numel() for p in job.skeleton.get_submodule(block).parameters()) for block in blocks]
    total = sum(parameter.numel() for parameter in job.skeleton.parameters())
    tokens = job.calibration.tokens
    positions = tokens // len(job.calibration.batches)
    width = hidden_width(job.assignment)
    head = declared_end(job.skeleton, "get_output_embeddings")
    layers = [layer for inside in gradient_layers(job.assignment).values() for layer in inside.values()]
    return GradientSizes(
        outside=4 * (total - sum(counts)),
        block=4 * max(counts),
        dense=4 * total,
        sums=4 * sum(layer.rows * layer.columns for layer in layers),
        flowing=4 * tokens * width,
        boundaries=4 * tokens * width * (len(blocks) + 1),
        activations=4 * positions * job.assignment.widest_sum(),
        logits=4 * positions * (width if head is None else head.get_parameter("weight").shape[0]),
        whole=_reaches_several_stacks(job),
    )


def _reaches_several_stacks(job: Job) -> bool:
    """Whether the inputs probably go through more than one stack: known for certain only once weights are loaded."""
    sensed = any(value.is_floating_point() for value in job.calibration.batches[0].values())
    return len(job.stacks) > 1 and (sensed or bool(getattr(job.skeleton.config, "is_encoder_decoder", False)))


def original_fits(dense: int, available: int) -> bool:
    """Whether the original (bytes in the compute dtype) can be loaded beside its compressed form."""
    return 1.3 * dense < FITS_BELOW * available


def _sizes(job: Job, file_bytes: int, processes: int) -> Sizes:
    item = job.compute_dtype.itemsize
    blocks = [block for stack in job.stacks for block in stack.blocks]
    counts = [sum(p.numel() for p in job.skeleton.get_submodule(block).parameters()) for block in blocks]
    total = sum(parameter.numel() for parameter in job.skeleton.parameters())
    inside = job.assignment.main()
    ends = [layer.rows * layer.columns for layer in job.assignment.layers.values() if not layer.block]
    batches = job.calibration.batches
    positions = job.calibration.tokens // len(batches) * min(job.batch_size, len(batches))
    runs = -(-len(batches) // job.batch_size)  # forward passes, of which the processes take neighbouring ones
    tokens = min(job.calibration.tokens, -(-runs // processes) * positions) if processes > 1 else job.calibration.tokens
    return Sizes(
        outside=(total - sum(counts)) * item,
        block=max(counts) * item,
        dense=total * item,
        matrix=4 * max(layer.rows * layer.columns for layer in inside),
        moment=4 * max(layer.columns for layer in inside) ** 2,
        end=4 * max(ends, default=0),
        streams=tokens * hidden_width(job.assignment) * item,
        activations=positions * job.assignment.widest_sum() * item,
        packed=file_bytes + _cast_bytes(job),
        answer=_answer_bytes(job, item),
        kept=tokens * kept_columns(job) * job.calibration_dtype.itemsize if processes > 1 else 0,
        converted=_converted_bytes(job),
        copies=MOMENT_COPIES.get(job.device.type, MOMENT_COPIES["cpu"]),
    )


def _cast_bytes(job: Job) -> int:
    """What is loaded in another dtype than it is stored in takes beside its file, which a CPU maps and keeps."""
    dense = dense_specs(job.skeleton, job.assignment, job.dense_dtype).values()
    cast = [spec for spec in dense if spec.dtype.is_floating_point and spec.dtype != job.compute_dtype]
    stored = 0 if job.device.type == "cpu" else sum(spec.bytes for spec in cast)
    return max(0, sum(math.prod(spec.shape) for spec in cast) * job.compute_dtype.itemsize - stored)


def _converted_bytes(job: Job) -> int:
    """Of the weights that products on this device hold in another form as well."""
    layers = job.assignment.layers.values()
    forms = [(layer.method.format(layer.rows, layer.columns), layer.rows, layer.columns) for layer in layers]
    return sum(converted_bytes(*form, job.compute_dtype, job.device) for form in forms)


def kept_columns(job: Job) -> int:
    """Inputs per token that are gathered at a time, of the block with most; layers that share theirs count each."""
    widths: dict[str, list[int]] = {}
    for layer in job.assignment.layers.values():
        if layer.block and layer.method.required():
            widths.setdefault(layer.block, []).append(layer.columns)
    together = max if job.options.true_sequential else sum
    return max((together(inside) for inside in widths.values()), default=0)


def hidden_width(assignment: Assignment) -> int:
    """Width of the hidden states: what most layers in blocks take as inputs."""
    return Counter(layer.columns for layer in assignment.main()).most_common(1)[0][0]


def _answer_bytes(job: Job, item: int) -> int:
    if job.evaluation is None:
        return 0
    head = declared_end(job.skeleton, "get_output_embeddings")
    width = head.get_parameter("weight").shape[0] if head is not None else hidden_width(job.assignment)
    return int(job.evaluation.tokens // len(job.evaluation.batches) * width * item)


def available_bytes(device: torch.device) -> int:
    """Free memory where the computation runs."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def peak_host_bytes() -> int:
    """Largest resident set of this process so far.

    Linux says it in /proc/self/status; `getrusage` there would count a larger process that started this one, because
    its mark is kept across exec. Elsewhere getrusage it is: kilobytes, on macOS bytes.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        status = ""
    mark = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    if mark is not None:
        return int(mark[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_device_bytes(device: torch.device) -> int | None:
    """Largest allocation on a CUDA device so far, or None elsewhere."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
