"""A synthetic layer with correlated inputs, shared by the tests of the pruning methods."""

from __future__ import annotations

import torch
from torch import Tensor

from whit.methods import LayerStatistics

PRUNERS = ("magnitude", "wanda", "ria", "pruner-zero", "sparsegpt")
SCORERS = PRUNERS[:-1]


def layer(rows: int = 48, columns: int = 192, tokens: int = 1024, seed: int = 0) -> tuple[Tensor, LayerStatistics]:
    """Gaussian weights; inputs of rank 24 plus noise with four loud channels; a gradient that depends on both."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 24, generator=generator) @ torch.randn(24, columns, generator=generator) / 5
    x += 0.1 * torch.randn(tokens, columns, generator=generator)
    x[:, torch.randperm(columns, generator=generator)[:4]] *= 8
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    moment = 2 * x.T @ x
    gradient = torch.rand(rows, 1, generator=generator) * torch.diagonal(moment).sqrt()
    return weight, LayerStatistics(columns, tokens, moment, sample=x, gradient=gradient)
