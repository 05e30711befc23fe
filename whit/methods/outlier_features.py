"""Which features of a model carry outliers systematically: the same dimension, in many layers, at many positions.

Source: Dettmers et al., arXiv 2208.07339, section 4.1: a feature dimension is an emergent outlier if it reaches a
magnitude of 6 in at least a quarter of the layers and at 6 % of the sequence positions. It is what makes one static
list of columns (`outliers="static"` of `llm-int8`) a good idea or a bad one for a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from whit.errors import KnobError, nearest


@dataclass(frozen=True)
class Crossings:
    """How often each input of one layer reached the threshold: `counts` int64 (columns,) out of `positions`."""

    counts: Tensor
    positions: int


@dataclass(frozen=True)
class OutlierFeature:
    """A feature dimension that is an emergent outlier.

    Attributes:
        index: of the dimension.
        layers: share of the layers where it reaches the threshold at all.
        positions: share of the positions where it does, averaged over those layers.
    """

    index: int
    layers: float
    positions: float


def emergent_outliers(
    layers: Sequence[Crossings], *, layer_share: float = 0.25, position_share: float = 0.06
) -> list[OutlierFeature]:
    """Dimensions that reach the threshold in enough layers and at enough positions, ascending.

    Args:
        layers: one entry per layer, all of the same width (the model's hidden states).
        layer_share, position_share: the least shares; the defaults are the paper's.

    Raises:
        KnobError: no layer, or layers of different widths.
    """
    widths = {len(layer.counts) for layer in layers}
    if len(widths) != 1:
        raise KnobError(f"layers of one width are needed, got widths {sorted(widths)}: choose layers by name")
    shares = torch.stack([layer.counts.double() / max(1, layer.positions) for layer in layers])
    touched = shares > 0
    in_layers = touched.double().mean(0)
    at_positions = shares.sum(0) / touched.sum(0).clamp(min=1)
    found = (in_layers >= layer_share) & (at_positions >= position_share)
    return [
        OutlierFeature(index, float(in_layers[index]), float(at_positions[index]))
        for index in found.nonzero().squeeze(1).tolist()
    ]


def count_crossings(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], patterns: Sequence[str], *, threshold: float = 6.0
) -> dict[str, Crossings]:
    """Run a model and count, for the inputs of some of its layers, where |x| >= threshold.

    Args:
        model: in evaluation mode, on the device of the batches.
        batches: keyword arguments of the model.
        patterns: names of the layers, with wildcards: the paper looks at the inputs of the attention projections and of
            the first feed-forward layer, for example ("*.q_proj", "*.o_proj", "*.up_proj").

    Returns:
        layer name -> counts, in order of the model; layers that were never called are left out.

    Raises:
        KnobError: a pattern matches no module.
    """
    modules = dict(model.named_modules())
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in modules):
            raise KnobError(f"pattern {pattern!r} matches no module{nearest(pattern, modules)}")
    counts: dict[str, Crossings] = {}
    handles = []
    for name, module in modules.items():
        if any(fnmatchcase(name, pattern) for pattern in patterns):

            def hook(_: nn.Module, arguments: tuple[Tensor, ...], name: str = name) -> None:
                inputs = arguments[0].detach().flatten(0, -2)
                new = (inputs.abs() >= threshold).sum(0)
                before = counts.get(name, Crossings(torch.zeros_like(new), 0))
                counts[name] = Crossings(before.counts + new, before.positions + len(inputs))

            handles.append(module.register_forward_pre_hook(hook))
    try:
        with torch.no_grad():
            for batch in batches:
                model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: counts[name] for name in modules if name in counts}
