"""Loading and freeing what lies outside the repeated blocks: embeddings, final norms, heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from whit.models.skeleton import materialise_tensors, release_parameters
from whit.models.source import TensorSource


def _outside(names: Sequence[str], blocks: Sequence[str]) -> list[str]:
    prefixes = tuple(block + "." for block in blocks)
    return [name for name in names if not name.startswith(prefixes)]


def materialise_outside(
    model: nn.Module, blocks: Sequence[str], source: TensorSource, dtype: torch.dtype, device: torch.device
) -> None:
    """Load every parameter and persistent buffer that lies in none of the blocks (shared ones everywhere)."""
    parameters = _outside([name for name, _ in model.named_parameters()], blocks)
    buffers = _outside([name for name, _ in model.named_buffers(remove_duplicate=False)], blocks)
    materialise_tensors(model, parameters, buffers, source, dtype, device)


def release_outside(model: nn.Module, blocks: Sequence[str]) -> None:
    """Put those parameters back on the meta device."""
    release_parameters(model, _outside([name for name, _ in model.named_parameters()], blocks))
