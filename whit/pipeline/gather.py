"""Statistics of layer inputs, accumulated while a block runs; layers with the very same inputs share them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from whit.errors import ModelError
from whit.finite import all_finite
from whit.kernels.cpu.bfloat16 import has_matrix_units, products_of_bfloat16
from whit.methods.statistics import LayerStatistics, Statistic
from whit.models.layers import LayerKind, layer_kind
from whit.pipeline.ranks import ALONE
from whit.pipeline.relay import Relay

SAMPLE_VECTORS = 1024
#: Columns per product of second moments on a CPU, and on one that multiplies bfloat16 in matrix units.
BLOCK_COLUMNS, UNIT_COLUMNS = 256, 512
#: Columns per product of second moments on a GPU.
PANEL_COLUMNS = 2048
INPUT_STATISTICS = frozenset({Statistic.SECOND_MOMENT, Statistic.SQUARE_SUMS, Statistic.RANGE, Statistic.SAMPLE})


def find_groups(run: Callable[[], object], layers: dict[str, nn.Module]) -> list[tuple[str, ...]]:
    """Layers of a block in order of execution, those that receive the very same inputs together.

    Args:
        run: runs the block once.
        layers: name -> module; modules that are never called are left out of the answer.
    """
    inputs: dict[str, list[tuple[int, int]]] = {}  # what each layer was given, call by call
    held: list[Tensor] = []  # so that identities stay unique

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            tensor = _given(arguments, keywords)
            held.append(tensor)
            # A tensor that was changed in place since is another input.
            version = 0 if tensor.is_inference() else tensor._version
            inputs.setdefault(name, []).append((id(tensor), version))

        return hook

    handles = [module.register_forward_pre_hook(watch(name), with_kwargs=True) for name, module in layers.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    groups: dict[object, list[str]] = {}
    for name, given in inputs.items():  # two convolutions may look at one image through different windows
        window = _kind(layers[name]).window(layers[name])
        groups.setdefault((window, *given), []).append(name)
    return [tuple(names) for names in groups.values()]


def _given(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
    """The input of a layer, which has only one."""
    given = arguments[0] if arguments else next(iter(keywords.values()))
    assert isinstance(given, Tensor)
    return given


@dataclass
class SecondMoment:
    """H = 2/N sum over N sequences of X^T X, float32, as a running mean (the accumulation of GPTQ and BiLLM).

    Frantar et al. 2022, section 3.3; per batch of b sequences: H <- H N/(N+b), N <- N+b, H += 2/N X^T X.
    H is symmetric: only panels of rows from the diagonal on are accumulated, and mirrored in the end.

    Attributes:
        upper: (columns, columns), of which what lies on and above the diagonal is kept up to date.
    """

    upper: Tensor
    sequences: int = 0
    tokens: int = 0

    def update(self, x: Tensor) -> None:
        """Add inputs (..., tokens, columns); two dimensions count as one sequence."""
        sequences = x.shape[0] if x.dim() > 2 else 1
        flat = x.reshape(-1, x.shape[-1])
        kept = self.sequences / (self.sequences + sequences)
        self.sequences += sequences
        self.tokens += flat.shape[0]
        # Products of 16-bit numbers are exact in float32, in which tensor cores and matrix units add them.
        if flat.is_cuda and flat.dtype in (torch.float16, torch.bfloat16):
            options: dict[str, Any] = {"out_dtype": torch.float32}
        else:
            options, exact = {}, flat.dtype == torch.bfloat16
            flat = flat.float()
            if flat.device.type == "cpu" and exact:
                with products_of_bfloat16():
                    self._add(flat, kept, options)
                return
        self._add(flat, kept, options)

    def _add(self, flat: Tensor, kept: float, options: dict[str, Any]) -> None:
        """Scale, multiply and add in one product per panel."""
        for target, start, stop in self.panels():
            left, right = flat[:, start:stop].T, flat[:, start:]
            torch.addmm(target, left, right, beta=kept, alpha=2 / self.sequences, out=target, **options)

    def panels(self, width: int = 0) -> Iterator[tuple[Tensor, int, int]]:
        """Each panel, and its first and last row; 0 takes the width that is fastest here."""
        if not width:
            width = PANEL_COLUMNS if self.upper.is_cuda else UNIT_COLUMNS if has_matrix_units() else BLOCK_COLUMNS
        for start in range(0, len(self.upper), width):
            stop = min(start + width, len(self.upper))
            yield self.upper[start:stop, start:], start, stop

    @property
    def moment(self) -> Tensor:
        """H, float32 (columns, columns), exactly symmetric; mirrored in place, as H of a wide layer takes gigabytes."""
        for _, start, stop in self.panels():
            inner = self.upper[start:stop, start:stop]
            inner.copy_(inner.triu() + inner.triu(1).T)
            self.upper[stop:, start:stop] = self.upper[start:stop, stop:].T
        return self.upper


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

    def update(self, x: Tensor, parts: int = 1) -> None:
        """Add inputs (..., tokens, columns), one of so many `parts` of a call; two dimensions count as one sequence."""
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
            places = torch.linspace(0, len(flat) - 1, min(-(-self.sample_size // parts), len(flat)), device=x.device)
            self.sample.append(flat[places.round().long()].float())
        self.sequences += sequences
        self.tokens += flat.shape[0]

    def state(self) -> tuple[dict[str, int], list[Tensor]]:
        """What has been summed up so far, for `restore` elsewhere, where panels may have another width."""
        sums = [item for item in (self.square_sums, self.maximum) if item is not None]
        panels = (
            [] if self.moment is None else [panel.contiguous() for panel, _, _ in self.moment.panels(BLOCK_COLUMNS)]
        )
        numbers = {"sequences": self.sequences, "tokens": self.tokens, "samples": len(self.sample)}
        return numbers, [*sums, *self.sample, *panels]

    def restore(self, numbers: dict[str, int], tensors: Sequence[Tensor]) -> None:
        """Go on from there; nothing was added here."""
        if not tensors:
            return
        self.sequences, self.tokens = numbers["sequences"], numbers["tokens"]
        rest = list(tensors)
        if Statistic.SQUARE_SUMS in self.needs:
            self.square_sums = rest.pop(0)
        if Statistic.RANGE in self.needs:
            self.maximum = rest.pop(0)
        self.sample, panels = rest[: numbers["samples"]], rest[numbers["samples"] :]
        if panels:
            upper = torch.zeros(self.columns, self.columns, device=panels[0].device)
            self.moment = SecondMoment(upper, self.sequences, self.tokens)
            for (target, _, _), panel in zip(self.moment.panels(BLOCK_COLUMNS), panels, strict=True):
                target.copy_(panel)

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
        if not all(all_finite(part) for part in parts if part is not None):
            raise ModelError(
                f"the calibration inputs of {name!r} hold NaN or Inf: try --dtype float32, or check the model"
            )


@contextmanager
def gathering(
    groups: Sequence[tuple[str, ...]],
    layers: dict[str, nn.Module],
    needs: frozenset[Statistic] | Mapping[tuple[str, ...], frozenset[Statistic]],
    calls: int = 1,
    relay: Relay | None = None,
) -> Iterator[dict[tuple[str, ...], LayerStatistics]]:
    """While the context is open, forward passes fill one `LayerStatistics` per group.

    Args:
        needs: for every group, or by group.
        calls: forward passes to come; a sample takes about `SAMPLE_VECTORS / calls` vectors from each.
        relay: to the processes that run other batches.

    Raises:
        ModelError: an input holds NaN or Inf (checked once per group, at the end).
    """
    kinds = {group: _kind(layers[group[0]]) for group in groups}
    statistics = {group: LayerStatistics(kinds[group].shape(layers[group[0]])[1]) for group in groups}
    accumulators: dict[tuple[str, ...], InputAccumulator] = {}
    relay = relay or Relay(ALONE)
    handles = []
    for group in groups:
        wanted = (needs[group] if isinstance(needs, Mapping) else needs) & INPUT_STATISTICS
        if not wanted:
            continue
        size = -(-SAMPLE_VECTORS // calls)
        number = len(accumulators)
        accumulators[group] = InputAccumulator(statistics[group].columns, wanted, size)

        def hook(
            module: nn.Module,
            arguments: tuple[Any, ...],
            keywords: dict[str, Any],
            number: int = number,
            kind: LayerKind = kinds[group],
        ) -> None:
            parts = kind.parts(module, _given(arguments, keywords).detach())
            for part in parts:
                relay.record(number, kind.inputs(module, part).detach(), len(parts))

        handles.append(layers[group[0]].register_forward_pre_hook(hook, with_kwargs=True))
    relay.connect(list(accumulators.values()))
    try:
        yield statistics
    finally:
        for handle in handles:
            handle.remove()
    relay.finish()
    for group, accumulator in accumulators.items():
        accumulator.write(statistics[group], group[0])


def _kind(module: nn.Module) -> LayerKind:
    kind = layer_kind(module)
    assert kind is not None, f"{type(module).__name__} holds no matrix"
    return kind
