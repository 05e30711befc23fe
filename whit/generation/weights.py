"""The packed weights that a model multiplies by, as decoding multiplies by them."""

from __future__ import annotations

import contextlib

from torch import nn

from whit.formats.base import Packed
from whit.generation.blocks import GatedDecoder, UnsuitedError, gated_decoder
from whit.models.packed import PackedLinear, TiedPackedLinear, packed_modules


def multiplied_weights(model: nn.Module) -> list[Packed]:
    """Every packed weight of a linear layer; before them those in which decoding joins several, last shared embeddings.

    The layers keep views of what is joined, as after `continue_greedily(join=True)`.
    """
    decoder = decoder_of(model)
    tied = [item.source.running for item in model.modules() if isinstance(item, TiedPackedLinear)]
    alone = [item.running for item in packed_modules(model).values() if isinstance(item, PackedLinear)]
    return ([] if decoder is None else decoder.joined()) + alone + tied


def meeting_weights(model: nn.Module) -> list[list[Packed]]:
    """Packed weights that decoding does not join and may multiply by the same vector in one launch, as q, k and v."""
    decoder = decoder_of(model)
    return [] if decoder is None else decoder.meeting()


def decoder_of(model: nn.Module) -> GatedDecoder | None:
    """The parts of a model as decoding runs them; None if it has no gated blocks: then layers are multiplied alone."""
    with contextlib.suppress(UnsuitedError):
        return gated_decoder(model, join=True)
    return None
