"""The plan: what will be done, how large the result and how long the wait, before any work."""

from __future__ import annotations

import time
from collections import Counter

import torch
from torch import nn

from whit.methods.base import Method
from whit.methods.statistics import LayerStatistics
from whit.models.source import TensorSource
from whit.pipeline.assign import AssignedLayer, Assignment
from whit.pipeline.finish import config_bytes

PROBE_ROWS = 96
PROBE_COLUMNS = 1024
# Resident memory of Python with torch and transformers imported, before any tensor (measured: 0.45 to 0.6 GB).
RUNTIME_BYTES = 600 * 2**20
HEADER_BYTES_PER_TENSOR = 120


def expected_file_bytes(model: nn.Module, assignment: Assignment, dense_dtype: torch.dtype) -> int:
    """Size of weight files and config: packed tensors exactly, dense ones in their dtype, headers by estimate."""
    packed = sum(
        layer.method.format(layer.rows, layer.columns).bytes(layer.rows, layer.columns)
        for layer in assignment.layers.values()
    )
    tensors = sum(
        len(layer.method.format(layer.rows, layer.columns).specs(layer.rows, layer.columns))
        for layer in assignment.layers.values()
    )
    replaced = {f"{name}.weight" for name in [*assignment.layers, *assignment.tied]}
    shared = set(getattr(model, "all_tied_weights_keys", None) or {})
    dense = 0
    for name, value in model.state_dict().items():
        if name in replaced or name in shared:
            continue
        itemsize = dense_dtype.itemsize if value.is_floating_point() else value.element_size()
        dense += value.numel() * itemsize
        tensors += 1
    return packed + dense + tensors * HEADER_BYTES_PER_TENSOR + config_bytes(assignment) + 1500


def count_parameters(model: nn.Module) -> int:
    """Parameters of the model, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def expected_memory(
    model: nn.Module,
    blocks: list[str],
    assignment: Assignment,
    *,
    tokens: int,
    width: int,
    compute_dtype: torch.dtype,
) -> int:
    """Peak bytes where the computation runs: parameters outside the blocks or (one block + statistics), plus streams.

    Workspace is taken as six float32 copies of the largest matrix and three of its second moments, which covers the
    methods in this package (checked against measured peaks in the benchmarks).
    """
    item = compute_dtype.itemsize
    sizes = {block: sum(p.numel() for p in model.get_submodule(block).parameters()) * item for block in blocks}
    inside = sum(sizes.values())
    outside = count_parameters(model) * item - inside
    largest = max(layer.rows * layer.columns for layer in assignment.layers.values() if layer.block)
    widest = max(layer.columns for layer in assignment.layers.values() if layer.block)
    ends = [layer.rows * layer.columns for layer in assignment.layers.values() if not layer.block]
    block_work = max(sizes.values()) + 4 * (6 * largest + 3 * widest**2)
    outside_work = outside + 4 * 5 * max(ends, default=0)
    return int(max(block_work, outside_work) + 2 * tokens * width * item)


def estimate_minutes(
    assignment: Assignment,
    *,
    tokens: int,
    block_parameters: int,
    device: torch.device,
    compute_dtype: torch.dtype,
) -> float:
    """Minutes of the block loop, from a quick probe of the method and of this device's matrix product."""
    seconds = 0.0
    flops = 2.0 * tokens * block_parameters * 2  # statistics pass and propagation
    shapes = Counter((layer.columns, layer.method) for layer in assignment.layers.values() if layer.block)
    rows = Counter[tuple[int, Method]]()
    for layer in assignment.layers.values():
        if layer.block:
            rows[layer.columns, layer.method] += layer.rows
            flops += 2.0 * tokens * layer.columns**2 / 3
    cache: dict[tuple[int, Method], tuple[float, int, int]] = {}
    for (columns, method), count in shapes.items():
        average = rows[columns, method] // count
        if (columns, method) not in cache:
            cache[columns, method] = _probe(method, min(average, PROBE_ROWS), columns, device)
        taken, probed_rows, probed_columns = cache[columns, method]
        seconds += taken * max(1.0, average / probed_rows) * (columns / probed_columns) * count
    return (seconds + flops / _product_rate(device, compute_dtype)) / 60


def _probe(method: Method, rows: int, columns: int, device: torch.device) -> tuple[float, int, int]:
    """Seconds the method takes on a random matrix of at most PROBE_COLUMNS columns."""
    columns = min(columns, PROBE_COLUMNS)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator).to(device)
    inputs = torch.randn(columns + 32, columns, generator=generator).to(device)
    statistics = LayerStatistics(columns, inputs.shape[0], inputs.T @ inputs)
    start = time.perf_counter()
    method.compress(weight, statistics)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, rows, columns


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a square matrix product, derated by half for everything around it."""
    size = 1024 if device.type == "cpu" else 4096
    a = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        product = a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    del product
    return 0.5 * 2 * size**3 / best


def summarise_layer(layer: AssignedLayer) -> tuple[str, int]:
    """Short description of the layout a layer gets, and its stored bytes."""
    layout = layer.method.format(layer.rows, layer.columns)
    fields = {key: value for key, value in layout.to_json().items() if key != "format"}
    return f"{layout.name}({', '.join(f'{k}={v}' for k, v in fields.items())})", layout.bytes(layer.rows, layer.columns)


def dense_bytes(source: TensorSource, model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of the uncompressed model when saved in `dtype`."""
    return count_parameters(model) * dtype.itemsize
