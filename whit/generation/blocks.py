"""Decoder blocks that can be run in few launches, found by their parts and proven by what they compute.

    h' = h  + O attend(rotate(Q n), rotate(K n), V n),   n  = norm(h)
    out = h' + D (silu(G n') * U n'),                    n' = norm(h')

is the block of LLaMA (Touvron et al., arXiv 2302.13971) and of many models since. A block whose parts are called as
transformers calls them is a candidate; no class is named. Whether it computes this and nothing else is decided by
`agrees`: on the inputs and outputs of the model's own forward.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from whit.formats.base import Packed
from whit.generation.products import Products
from whit.kernels.decode_ops import add_rms_norm, gated, rotate_and_attend, rotate_and_store
from whit.kernels.decode_state import KeyValues, Place
from whit.models.packed import packed_modules

UNCHANGING_ROTATIONS = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary positions whose angle is the same function of the position however long the sequence is."""
FINE, COARSE = 1e-3, 0.06
"""Relative differences of a block's update that are called rounding: in float32; in 16 bit or with rounded inputs."""
SCALE, SPREAD = 0.01, 4
"""How far from one the scale between two such updates may be: in any case, and in standard deviations of rounding."""
ROUNDINGS = 4
"""Roundings within a block, of its size each, that an element of its update is taken to differ by."""
PLANNED = 512
"""Tokens of a prompt from which a faster attention is worth being planned."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class UnsuitedError(Exception):
    """A model that this form of decoding is not for; the text says why."""


@dataclass(frozen=True)
class Norm:
    """Root mean square normalisation."""

    weight: Tensor
    epsilon: float


@dataclass(frozen=True)
class GatedBlock:
    """The parts of a block."""

    before: Norm
    attention: Products
    output: Products
    between: Norm
    gate_up: Products
    down: Products
    scaling: float

    def run(self, states: Tensor, update: Tensor | None, cache: KeyValues, place: Place) -> tuple[Tensor, Tensor]:
        """(n, hidden) and what is still to be added to it -> the same after the block."""
        states, (query, key, value) = self.attention.normed(states, update, self.before.weight, self.before.epsilon)
        (update,) = self.output(rotate_and_attend(query, key, value, cache, place, self.scaling))
        states, inner = self.gate_up.gated(states, update, self.between.weight, self.between.epsilon)
        (update,) = self.down(inner)
        return states, update

    def read(
        self, states: Tensor, update: Tensor | None, cache: KeyValues, place: Place, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The same for a prompt, (sequences * tokens, hidden), from the beginning of the cache.

        Args:
            mask: bool (sequences, 1, tokens, tokens), what each token sees; None: itself and all before it.
        """
        states, normal = add_rms_norm(states, update, self.before.weight, self.before.epsilon)
        query, key, value = self.attention(normal)
        rotated = rotate_and_store(query, key, value, cache, place).transpose(1, 2)
        tokens = rotated.shape[2]
        attended = torch.nn.functional.scaled_dot_product_attention(
            rotated,
            cache.keys[:, :, :tokens],
            cache.values[:, :, :tokens],
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scaling,
            enable_gqa=rotated.shape[1] != cache.keys.shape[1],
        )
        (update,) = self.output(attended.transpose(1, 2).reshape(len(states), -1))
        states, normal = add_rms_norm(states, update, self.between.weight, self.between.epsilon)
        gate, up = self.gate_up(normal)
        (update,) = self.down(gated(gate, up))
        return states, update


@dataclass(frozen=True)
class GatedDecoder:
    """The parts of a causal language model of such blocks.

    Attributes:
        modules: the model's own blocks, in order, for `agrees`.
        coarse: whether a layer rounds its inputs.
        rotary: called as (states, position_ids), returns cosines and sines.
    """

    embedding: nn.Module
    blocks: list[GatedBlock]
    modules: list[nn.Module]
    coarse: bool
    last: Norm
    head: Products
    rotary: nn.Module
    heads: int
    key_heads: int
    head_size: int

    def joined(self) -> list[Packed]:
        """The weights in which several layers stand as one."""
        found = [products.joined for products in self._products()]
        return [packed for packed in found if packed is not None]

    def meeting(self) -> list[list[Packed]]:
        """The weights that meet the same inputs, each a weight of its own, and may be multiplied in one launch."""
        return [products.meeting for products in self._products() if products.meeting]

    def _products(self) -> list[Products]:
        return [products for block in self.blocks for products in (block.attention, block.gate_up)]

    def read(self, ids: Tensor, caches: list[KeyValues], place: Place, mask: Tensor | None) -> Tensor:
        """Integer ids (sequences, tokens) of the prompt -> logits (sequences, vocabulary) of its last token."""
        states: Tensor = self.embedding(ids.reshape(-1))
        update: Tensor | None = None
        with attention_of(ids):
            for block, cache in zip(self.blocks, caches, strict=True):
                states, update = block.read(states, update, cache, place, mask)
        last = torch.arange(1, len(ids) + 1, device=ids.device) * ids.shape[1] - 1
        return self.logits(states[last], None if update is None else update[last])

    def run(self, ids: Tensor, caches: list[KeyValues], place: Place) -> Tensor:
        """Integer ids (n,) of the new tokens -> logits (n, vocabulary)."""
        states: Tensor = self.embedding(ids)
        update: Tensor | None = None
        for block, cache in zip(self.blocks, caches, strict=True):
            states, update = block.run(states, update, cache, place)
        return self.logits(states, update)

    def logits(self, states: Tensor, update: Tensor | None) -> Tensor:
        """What stands after the last block."""
        _, (out,) = self.head.normed(states, update, self.last.weight, self.last.epsilon)
        return out


def attention_of(ids: Tensor) -> AbstractContextManager[None]:
    """The kernels of torch that may attend to a prompt (sequences, tokens) while this is entered.

    On a GPU cuDNN's take the host 40 ms to plan for every new length, as long as 2000 tokens of a 7B take in all; the
    others need no plan, and below 512 tokens they take no longer (28 instead of 30 microseconds; at 2048, 166 and 88).
    """
    if not ids.is_cuda or ids.shape[1] >= PLANNED:
        return nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def gated_decoder(model: nn.Module, *, join: bool = True, branches: bool = True) -> GatedDecoder:
    """The parts of a model.

    Args:
        join, branches: as in `Products`.

    Raises:
        UnsuitedError: it is made of other parts.
    """
    _refuse_windows(text_config(model))
    answer: Any = model
    owner = answer.get_decoder() if hasattr(model, "get_decoder") else None
    children = dict(owner.named_children()) if isinstance(owner, nn.Module) else {}
    if set(children) != {"embed_tokens", "layers", "norm", "rotary_emb"}:
        raise UnsuitedError(f"its decoder is made of {', '.join(sorted(children)) or 'nothing'}")
    rotary = children["rotary_emb"]
    if getattr(rotary, "rope_type", None) not in UNCHANGING_ROTATIONS:
        raise UnsuitedError("its rotary positions depend on the length of the text")
    head = answer.get_output_embeddings()
    if not isinstance(head, nn.Module):
        raise UnsuitedError("it has no output head")
    modules, last = list(children["layers"].children()), _norm(children["norm"])
    attention: Any = getattr(modules[0], "self_attn", None) if modules else None
    size = getattr(attention, "head_dim", None)
    if not isinstance(size, int) or size % 2:
        raise UnsuitedError("its blocks have no attention with heads of an even size")
    blocks = [_block(module, size, join, branches, last.weight.dtype) for module in modules]
    shapes = {tuple(int(item.out_features) for item in block.attention.modules) for block in blocks}  # type: ignore[arg-type]
    query, key, value = next(iter(shapes))
    if len(shapes) > 1 or key != value:
        raise UnsuitedError("the heads of its blocks differ in number")
    heads, key_heads = query // size, key // size
    coarse = any(packed.format.changes_inputs for packed in packed_modules(model).values())
    answers = Products([head], join=False)
    return GatedDecoder(
        children["embed_tokens"], blocks, modules, coarse, last, answers, rotary, heads, key_heads, size
    )


def agrees(mine: Tensor, theirs: Tensor, before: Tensor | None = None, *, coarse: bool = False) -> bool:
    """Whether two results differ by no more than their roundings.

    Compared is what was added to `before`, after taking off each element's own rounding.

    Args:
        coarse: layers round their inputs, so that another order of summation may tip one to another level.
    """
    wide, unit = theirs.double(), torch.finfo(theirs.dtype).eps
    difference = mine.double() - wide
    added = wide if before is None else wide - before.double()
    excess = (difference.abs() - 2 * unit * wide.abs()).clamp_(min=0)
    if not coarse and theirs.dtype.itemsize > 2:
        return bool(excess.norm() <= FINE * added.norm())  # False for NaN
    inner = COARSE if coarse else ROUNDINGS * unit
    return bool(excess.norm() <= COARSE * added.norm()) and _same_scale(difference, added, unit * wide, inner)


def _same_scale(difference: Tensor, added: Tensor, outer: Tensor, inner: float) -> bool:
    """Whether a difference is no multiple of what was added: roundings are random, so they hardly add up to one.

    The scale s - 1 that explains most of the difference d of updates a, by least squares weighted with the variance
    v_i of the roundings of element i, and its own standard deviation are

        s - 1 = (sum_i d_i a_i / v_i) / A,    1 / sqrt(A),    A = sum_i a_i^2 / v_i,
        v_i = outer_i^2 + inner^2 (a_i^2 + mean a^2)

    so that few large elements decide nothing, and the longer the vectors the less rounding is left. It lessens the sum
    by no more than outer_i^2 / 4 v_i for each element: a holds the roundings of one result, as d does.

    Args:
        outer: of the elements of the results, their unit in the last place. inner: relative, of the updates.
    """
    size = added.square() + added.square().mean(-1, keepdim=True)
    variance = (outer.square() + inner**2 * size).clamp_(min=torch.finfo(torch.float32).tiny)
    weight = float((added.square() / variance).sum())
    allowed = SCALE * weight + SPREAD * weight**0.5 + float((outer.square() / variance).sum()) / 4
    return bool((difference * added / variance).sum().abs() <= allowed)


def text_config(model: nn.Module) -> Any:
    """What the configuration says of the text model, which in models that also see or hear lies inside it."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _block(module: nn.Module, size: int, join: bool, branches: bool, dtype: torch.dtype) -> GatedBlock:
    parts = _parts(module, ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"))
    attention = _parts(parts["self_attn"], ("q_proj", "k_proj", "v_proj", "o_proj"))
    feed = _parts(parts["mlp"], ("gate_proj", "up_proj", "down_proj"), others=("act_fn",))
    linear = [*attention.values(), *(item for name, item in feed.items() if name != "act_fn")]
    if any(not hasattr(item, "out_features") for item in linear):
        raise UnsuitedError("a projection of its blocks is no linear layer")
    own: Any = parts["self_attn"]
    query_key_value = [attention[name] for name in ("q_proj", "k_proj", "v_proj")]
    # Of the norm's weight: layers meet what a norm gives, weight * normal, so norms in float32 leave no 16-bit inputs.
    return GatedBlock(
        before=_norm(parts["input_layernorm"]),
        attention=Products(query_key_value, join=join, branches=branches, dtype=dtype),
        output=Products([attention["o_proj"]], join=join, branches=branches, dtype=dtype),
        between=_norm(parts["post_attention_layernorm"]),
        gate_up=Products([feed["gate_proj"], feed["up_proj"]], join=join, branches=branches, dtype=dtype),
        down=Products([feed["down_proj"]], join=join, branches=branches, dtype=dtype),
        scaling=float(getattr(own, "scaling", size**-0.5)),
    )


def _parts(module: nn.Module, names: tuple[str, ...], others: tuple[str, ...] = ()) -> dict[str, nn.Module]:
    children = dict(module.named_children())
    if not set(names) <= set(children) <= {*names, *others}:
        raise UnsuitedError(f"{type(module).__name__} is made of {', '.join(sorted(children)) or 'nothing'}")
    if any(getattr(module, hooks) for hooks in _HOOKS):
        raise UnsuitedError(f"{type(module).__name__} carries hooks")
    return children


def _norm(module: nn.Module) -> Norm:
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    own = dict(module.named_parameters())
    if set(own) != {"weight"} or own["weight"].dim() != 1 or not isinstance(epsilon, float):
        raise UnsuitedError(f"{type(module).__name__} is no root mean square normalisation")
    if any(getattr(module, hooks) for hooks in _HOOKS):
        raise UnsuitedError(f"{type(module).__name__} carries hooks")
    return Norm(own["weight"].detach(), epsilon)


def _refuse_windows(config: Any) -> None:
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - {"full_attention"}:
        raise UnsuitedError("some of its blocks attend to a part of the text only")
    if not kinds and getattr(config, "sliding_window", None) is not None:
        raise UnsuitedError("its blocks attend to a window only")
