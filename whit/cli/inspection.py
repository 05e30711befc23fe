"""What `whit inspect` reads: the record of a run, and which implementation computes each packed layer here."""

from __future__ import annotations

from pathlib import Path

import torch

from whit.errors import ModelError
from whit.formats.base import Packed, format_from_json
from whit.kernels import explain
from whit.kernels.linear import preparation_of
from whit.report.record import RESULT_FILE, LayerRecord, Result


def read_result(directory: Path) -> Result:
    """The record in a compressed model's directory.

    Raises:
        ModelError: there is no such directory or record, or it cannot be read.
    """
    path = directory / RESULT_FILE
    if not directory.is_dir():
        raise ModelError(f"no directory {str(directory)!r}: give the output directory of 'whit compress'")
    if not path.is_file():
        raise ModelError(f"{str(directory)!r} holds no {RESULT_FILE}: it is no finished output of 'whit compress'")
    try:
        return Result.load(path)
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{str(path)!r} cannot be read ({error}): it is damaged or of another version") from error


def kernel_of(layer: LayerRecord, dtype: torch.dtype, device: torch.device) -> str:
    """Name of the implementation that multiplies one input vector by this layer on this machine.

    For layers of blocks also the form in which decoding holds them; embeddings and heads stay as they are stored.
    """
    layout = format_from_json(layer.format)
    specs = layout.specs(layer.rows, layer.columns)
    tensors = {name: torch.empty(spec.shape, dtype=spec.dtype, device=device) for name, spec in specs.items()}
    packed = Packed(layout, layer.rows, layer.columns, tensors)
    name = explain(torch.empty(1, layer.columns, dtype=dtype, device=device), packed)
    preparation = preparation_of([packed], dtype) if layer.block else None
    if preparation is None:
        return name
    return f"{name}; decoding: {preparation.name}, {preparation.bits(packed):.1f} bits resident"
