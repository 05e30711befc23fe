"""The packed weights that a model multiplies by, as decoding multiplies by them."""

from __future__ import annotations

import contextlib

from torch import nn

from whit.formats.base import Packed
from whit.generation.blocks import UnsuitedError, gated_decoder
from whit.models.packed import PackedLinear, TiedPackedLinear, packed_modules


def multiplied_weights(model: nn.Module) -> list[Packed]:
    """Every packed weight of a linear layer; before them those in which decoding joins several, last shared embeddings.

    The layers keep views of what is joined, as after `continue_greedily(join=True)`.
    """
    joined: list[Packed] = []
    with contextlib.suppress(UnsuitedError):  # no model of gated blocks: each layer is multiplied by itself
        joined = gated_decoder(model, join=True).joined()
    tied = [item.source.packed for item in model.modules() if isinstance(item, TiedPackedLinear)]
    return joined + [item.packed for item in packed_modules(model).values() if isinstance(item, PackedLinear)] + tied
