"""Statistics of layer inputs, accumulated while a block runs; layers with the very same inputs share them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from whit.errors import ModelError
from whit.methods.statistics import LayerStatistics, Statistic


def find_groups(run: Callable[[], object], layers: dict[str, nn.Module]) -> list[tuple[str, ...]]:
    """Layers of a block in order of execution, those that receive the very same input tensor together.

    Args:
        run: runs the block once.
        layers: name -> module; modules that are never called are left out of the answer.
    """
    seen: list[tuple[Tensor, list[str]]] = []  # holds the tensors, so that identities stay unique
    called: set[str] = set()

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            if name in called:
                return
            called.add(name)
            for tensor, names in seen:
                if tensor is arguments[0]:
                    names.append(name)
                    return
            seen.append((arguments[0], [name]))

        return hook

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in layers.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return [tuple(names) for _, names in seen]


@dataclass
class SecondMoment:
    """H = 2/N sum over N sequences of X^T X, float32, as a running mean (the accumulation of GPTQ and BiLLM).

    Frantar et al. 2022, section 3.3; per batch of b sequences: H <- H N/(N+b), N <- N+b, H += 2/N X^T X.
    """

    moment: Tensor
    sequences: int = 0
    tokens: int = 0

    def update(self, x: Tensor) -> None:
        """Add inputs (..., tokens, columns); two dimensions count as one sequence."""
        sequences = x.shape[0] if x.dim() > 2 else 1
        flat = x.reshape(-1, x.shape[-1]).float()
        self.moment *= self.sequences / (self.sequences + sequences)
        self.sequences += sequences
        self.tokens += flat.shape[0]
        scaled = math.sqrt(2 / self.sequences) * flat
        self.moment += scaled.T @ scaled


@contextmanager
def gathering(
    groups: Sequence[tuple[str, ...]], layers: dict[str, nn.Module], needs: frozenset[Statistic]
) -> Iterator[dict[tuple[str, ...], LayerStatistics]]:
    """While the context is open, forward passes fill one `LayerStatistics` per group.

    Raises:
        ModelError: an input holds NaN or Inf (checked once per group, at the end).
    """
    columns = {group: _columns(layers[group[0]]) for group in groups}
    statistics = {group: LayerStatistics(columns[group]) for group in groups}
    moments: dict[tuple[str, ...], SecondMoment] = {}
    handles = []
    if Statistic.SECOND_MOMENT in needs:
        for group in groups:

            def hook(_: nn.Module, arguments: tuple[Tensor, ...], group: tuple[str, ...] = group) -> None:
                if group not in moments:
                    width = columns[group]
                    moments[group] = SecondMoment(torch.zeros(width, width, device=arguments[0].device))
                moments[group].update(arguments[0])

            handles.append(layers[group[0]].register_forward_pre_hook(hook))
    try:
        yield statistics
    finally:
        for handle in handles:
            handle.remove()
    for group, accumulated in moments.items():
        if not bool(torch.isfinite(accumulated.moment).all()):
            raise ModelError(
                f"the calibration inputs of {group[0]!r} hold NaN or Inf: try --dtype float32, or check the model"
            )
        statistics[group].tokens = accumulated.tokens
        statistics[group].second_moment = accumulated.moment


def _columns(module: nn.Module) -> int:
    columns = getattr(module, "in_features", None)
    if isinstance(columns, int):
        return columns
    weight = module.weight
    assert isinstance(weight, Tensor)
    return int(weight.shape[0])  # Conv1D stores (inputs, outputs)
