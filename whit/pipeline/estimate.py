"""How long a run will take, from a quick probe of the method and of this device's matrix product."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from whit.methods.base import Method
from whit.methods.statistics import LayerStatistics, Statistic
from whit.pipeline.assign import Assignment
from whit.pipeline.gradient_task import gradient_layers
from whit.pipeline.survey import surveying_methods

PROBE_ROWS = 96
PROBE_COLUMNS = 1024
PROBES = 3
COMPILED_COLUMNS = 192
"""Of the matrix for which a CPU's loops are compiled: more than a block of them."""


@dataclass(frozen=True)
class Probe:
    """Seconds = launches + rows * per_row for a matrix of `columns` columns: a fixed part and one that grows.

    On a GPU, and for narrow matrices, the fixed part (one small kernel after another, column by column) is all there
    is; scaling it by the number of rows would overestimate the time many times over.
    """

    columns: int
    fixed: float
    per_row: float

    def seconds(self, rows: int, columns: int) -> float:
        """Estimate for a matrix; methods walk along the columns, so both parts scale with their number."""
        return (self.fixed + rows * self.per_row) * columns / self.columns


def fit_probe(columns: int, few: tuple[int, float], many: tuple[int, float]) -> Probe:
    """The line through two timings (rows, seconds); never a negative part."""
    slope = max(0.0, (many[1] - few[1]) / (many[0] - few[0])) if many[0] > few[0] else many[1] / many[0]
    return Probe(columns, max(0.0, many[1] - slope * many[0]), slope)


def estimate_minutes(
    assignment: Assignment,
    *,
    tokens: int,
    block_parameters: int,
    evaluated: float,
    device: torch.device,
    compute_dtype: torch.dtype,
    calibration_dtype: torch.dtype | None = None,
    left: float = 1.0,
) -> float:
    """Minutes of a run: passes before the block loop, the method on every layer, forward passes, second moments.

    Args:
        tokens: calibration tokens. block_parameters: of all blocks.
        evaluated: evaluation tokens times parameters, summed over the models that are measured.
        compute_dtype: of the evaluation. calibration_dtype: of passes over the calibration inputs, if another.
        left: share of the blocks that is still to be done.
    """
    inside = [layer for layer in assignment.layers.values() if layer.block]
    probes = {key: _probe(*key, device) for key in dict.fromkeys((layer.method, layer.columns) for layer in inside)}
    calibrating = calibration_dtype or compute_dtype
    seconds = _pass_seconds(assignment, tokens, block_parameters, device, calibrating) if left == 1 else 0.0
    seconds += left * sum(probes[layer.method, layer.columns].seconds(layer.rows, layer.columns) for layer in inside)
    products = 0.0
    if any(
        layer.method.required() for layer in inside
    ):  # statistics pass, and propagation (of finished blocks as well)
        products += tokens * block_parameters * (1 + left)
        products += left * sum(tokens * layer.columns**2 / 3 for layer in inside)  # about three layers share inputs
    seconds += 2 * products / _product_rate(device, calibrating) if products else 0.0
    return (seconds + 2 * evaluated / _product_rate(device, compute_dtype)) / 60


def _pass_seconds(
    assignment: Assignment, tokens: int, block_parameters: int, device: torch.device, dtype: torch.dtype
) -> float:
    """Seconds of the passes before the block loop that methods ask for."""
    seconds = 0.0
    if gradient_layers(assignment):  # forward twice (blocks are run again in reverse) and backward, which costs two
        seconds += 2 * 4 * tokens * block_parameters / _product_rate(device, torch.float32)
    surveys = surveying_methods(assignment)
    if surveys:
        products: float = tokens * block_parameters
        if any(Statistic.SECOND_MOMENT in method.survey_required() for method in surveys):
            products += sum(tokens * layer.columns**2 / 3 for layer in assignment.layers.values() if layer.block)
        seconds += 2 * products / _product_rate(device, dtype)
    return seconds


def load_kernels(methods: Iterable[Method], device: torch.device) -> None:
    """Load, and compile, what methods need of kernels and libraries: each is run on a small matrix."""
    on_cuda = device.type == "cuda"
    columns = PROBE_COLUMNS if on_cuda else COMPILED_COLUMNS
    with torch.cuda.device(device) if on_cuda else nullcontext():
        for method in dict.fromkeys(methods):
            _time(method, PROBE_ROWS, columns, device)


def _probe(method: Method, columns: int, device: torch.device) -> Probe:
    columns = min(columns, PROBE_COLUMNS)
    few, many = PROBE_ROWS // 3, PROBE_ROWS
    _time(method, few, columns, device)  # the first call loads kernels and libraries
    return fit_probe(columns, (few, _time(method, few, columns, device)), (many, _time(method, many, columns, device)))


def _time(method: Method, rows: int, columns: int, device: torch.device) -> float:
    """Seconds the method takes on a random matrix; on a GPU the best of a few, as every new shape loads kernels."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator).to(device)
    inputs = torch.randn(columns + 32, columns, generator=generator).to(device)
    statistics = LayerStatistics(
        columns,
        inputs.shape[0],
        inputs.T @ inputs,
        square_sums=inputs.square().sum(0),
        absolute_maximum=inputs.abs().amax(0),
        sample=inputs,
        gradient=torch.rand(rows, columns, generator=generator).to(device),
    )
    best = float("inf")
    for _ in range(1 if device.type == "cpu" else PROBES):
        _wait(device)
        start = time.perf_counter()
        # Statistics keep what they computed: each probe gets its own.
        method.compress(weight, dataclasses.replace(statistics, _factors={}))
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a square matrix product, derated by half for everything around it."""
    size = 1024 if device.type == "cpu" else 4096
    generator = torch.Generator().manual_seed(0)  # the global one is the user's
    a = torch.randn(size, size, generator=generator).to(device, dtype)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        product = a @ a
        _wait(device)
        best = min(best, time.perf_counter() - start)
    del product
    return 0.5 * 2 * size**3 / best
