"""Packed weights of a format with random contents: what a product costs does not depend on what the bits say.

Contents are valid (no code that stands for NaN, no pattern that a format never writes) and scaled so that a layer
neither dies out nor overflows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from whit.formats.base import Format, Packed, TensorSpec
from whit.formats.nm_index import encode_mask
from whit.formats.structured_binary import StructuredBinary
from whit.formats.trits import PER_BYTE
from whit.models.packed import PackedEmbedding, PackedLinear, PackedModule, replace_module

SCALE = 0.02
PATTERN_ROWS = 16
"""Rows of N:M patterns that are drawn; others repeat them."""


def random_packed(layout: Format, rows: int, columns: int, generator: torch.Generator) -> Packed:
    """A weight of `rows` x `columns` on the device of the generator."""
    tensors = {name: _random(name, spec, layout, generator) for name, spec in layout.specs(rows, columns).items()}
    if isinstance(layout, StructuredBinary) and layout.n < layout.m:
        tensors["index"] = _patterns(layout, rows, columns, generator)
    return Packed(layout, rows, columns, tensors)


def _patterns(layout: StructuredBinary, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """The index of kept columns: any n of every m."""
    groups = -(-columns // layout.m)
    score = torch.rand(PATTERN_ROWS, groups, layout.m, generator=generator, device=generator.device)
    kept = torch.zeros_like(score, dtype=torch.bool).scatter_(2, score.topk(layout.n, 2).indices, True)
    index = encode_mask(kept.flatten(1)[:, :columns], layout.n, layout.m)
    return index.repeat(-(-rows // PATTERN_ROWS), 1)[:rows].contiguous()


def _scale(name: str, layout: Format) -> float:
    """A scale with which a weight has a standard deviation near `SCALE`: by the largest code that it multiplies."""
    if name == "absmax":
        return 2 * SCALE
    eight_bit = layout.name in ("quantised-inputs", "scaled-codes")
    bits = layout.to_json().get("bits", 1) if layout.name == "grouped-integer" else 1
    return SCALE / 128 if eight_bit else SCALE / 2 ** (int(bits) - 1)


def _random(name: str, spec: TensorSpec, layout: Format, generator: torch.Generator) -> Tensor:
    device = generator.device
    if spec.dtype.is_floating_point:
        values = torch.rand(spec.shape, generator=generator, device=device, dtype=torch.float32)
        if "level" in name:
            return ((2 * values - 1) * SCALE).to(spec.dtype)
        return ((0.5 + values) * _scale(name, layout)).to(spec.dtype)
    highest = 3**PER_BYTE if name == "regions" else 128 if spec.dtype == torch.int8 else 256
    lowest = -127 if spec.dtype == torch.int8 else 0
    out = torch.randint(lowest, highest, spec.shape, generator=generator, device=device, dtype=spec.dtype)
    if name in ("weight_codes", "codes") and layout.name in ("quantised-inputs", "scaled-codes"):
        out &= 0xF7  # clears a mantissa bit, so that no code is the NaN of e4m3fn
    if name == "salient":  # about one column in twenty
        keep = torch.rand(spec.shape, generator=generator, device=device) < 0.4
        out = torch.where(keep, out & -out.to(torch.int16).to(torch.uint8), torch.zeros_like(out))
    return out


def pack_randomly(model: nn.Module, layout: Format, outside: Format, generator: torch.Generator) -> None:
    """Replace every linear layer within the blocks of a model, and with `outside` its embedding and head."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear | nn.Embedding):
            continue
        rows, columns = module.weight.shape
        own = layout if ".layers." in f".{name}." else outside
        with torch.device("meta"):
            if isinstance(module, nn.Embedding):
                packed: PackedModule = PackedEmbedding(own, rows, columns, module.weight.dtype)
            else:
                packed = PackedLinear(own, rows, columns, None)
        packed.set_packed(random_packed(own, rows, columns, generator))
        replace_module(model, name, packed)
