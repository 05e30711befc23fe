"""Statistics of layer inputs, accumulated while a block runs; layers with the very same inputs share them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from whit.errors import ModelError
from whit.methods.statistics import LayerStatistics, Statistic

SAMPLE_VECTORS = 1024
INPUT_STATISTICS = frozenset({Statistic.SECOND_MOMENT, Statistic.SQUARE_SUMS, Statistic.RANGE, Statistic.SAMPLE})


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
        flat = x.reshape(-1, x.shape[-1])
        self.moment *= self.sequences / (self.sequences + sequences)
        self.sequences += sequences
        self.tokens += flat.shape[0]
        if flat.is_cuda and flat.dtype in (torch.float16, torch.bfloat16):
            # Products of 16-bit numbers are exact in float32, in which tensor cores add them: nothing is lost.
            self.moment += torch.mm(flat.T, flat, out_dtype=torch.float32).mul_(2 / self.sequences)
        else:
            scaled = math.sqrt(2 / self.sequences) * flat.float()
            self.moment += scaled.T @ scaled


@dataclass
class InputAccumulator:
    """The statistics that one group of layers asks for, filled call by call.

    Attributes:
        columns: input width. needs: what to keep.
        sample_size: vectors kept of each call, evenly spaced among its tokens.
    """

    columns: int
    needs: frozenset[Statistic]
    sample_size: int
    moment: SecondMoment | None = None
    square_sums: Tensor | None = None
    maximum: Tensor | None = None
    sample: list[Tensor] = field(default_factory=list)
    sequences: int = 0
    tokens: int = 0

    def update(self, x: Tensor) -> None:
        """Add inputs (..., tokens, columns); two dimensions count as one sequence."""
        sequences = x.shape[0] if x.dim() > 2 else 1
        flat = x.detach().reshape(-1, x.shape[-1])
        if Statistic.SECOND_MOMENT in self.needs:
            if self.moment is None:
                self.moment = SecondMoment(torch.zeros(self.columns, self.columns, device=x.device))
            self.moment.update(x.detach())
        if Statistic.SQUARE_SUMS in self.needs:
            if self.square_sums is None:
                self.square_sums = torch.zeros(self.columns, device=x.device)
            self.square_sums *= self.sequences / (self.sequences + sequences)
            self.square_sums += flat.float().square().sum(0) / (self.sequences + sequences)
        if Statistic.RANGE in self.needs:
            largest = flat.abs().amax(0).float()
            self.maximum = largest if self.maximum is None else torch.maximum(self.maximum, largest)
        if Statistic.SAMPLE in self.needs:
            places = torch.linspace(0, len(flat) - 1, min(self.sample_size, len(flat)), device=x.device)
            self.sample.append(flat[places.round().long()].float())
        self.sequences += sequences
        self.tokens += flat.shape[0]

    def write(self, statistics: LayerStatistics, name: str) -> None:
        """Hand everything over.

        Raises:
            ModelError: the inputs hold NaN or Inf.
        """
        statistics.tokens = self.tokens
        statistics.second_moment = None if self.moment is None else self.moment.moment
        statistics.square_sums = self.square_sums
        statistics.absolute_maximum = self.maximum
        statistics.sample = torch.cat(self.sample) if self.sample else None
        parts = (statistics.second_moment, self.square_sums, self.maximum, statistics.sample)
        if not all(bool(torch.isfinite(part).all()) for part in parts if part is not None):
            raise ModelError(
                f"the calibration inputs of {name!r} hold NaN or Inf: try --dtype float32, or check the model"
            )


@contextmanager
def gathering(
    groups: Sequence[tuple[str, ...]],
    layers: dict[str, nn.Module],
    needs: frozenset[Statistic] | Mapping[tuple[str, ...], frozenset[Statistic]],
    calls: int = 1,
) -> Iterator[dict[tuple[str, ...], LayerStatistics]]:
    """While the context is open, forward passes fill one `LayerStatistics` per group.

    Args:
        needs: for every group, or by group.
        calls: forward passes to come; a sample takes about `SAMPLE_VECTORS / calls` vectors from each.

    Raises:
        ModelError: an input holds NaN or Inf (checked once per group, at the end).
    """
    statistics = {group: LayerStatistics(_columns(layers[group[0]])) for group in groups}
    accumulators: dict[tuple[str, ...], InputAccumulator] = {}
    handles = []
    for group in groups:
        wanted = (needs[group] if isinstance(needs, Mapping) else needs) & INPUT_STATISTICS
        if not wanted:
            continue
        size = -(-SAMPLE_VECTORS // calls)
        accumulators[group] = accumulator = InputAccumulator(statistics[group].columns, wanted, size)

        def hook(_: nn.Module, arguments: tuple[Tensor, ...], accumulator: InputAccumulator = accumulator) -> None:
            accumulator.update(arguments[0])

        handles.append(layers[group[0]].register_forward_pre_hook(hook))
    try:
        yield statistics
    finally:
        for handle in handles:
            handle.remove()
    for group, accumulator in accumulators.items():
        accumulator.write(statistics[group], group[0])


def _columns(module: nn.Module) -> int:
    columns = getattr(module, "in_features", None)
    if isinstance(columns, int):
        return columns
    weight = module.weight
    assert isinstance(weight, Tensor)
    return int(weight.shape[0])  # Conv1D stores (inputs, outputs)
