"""Reading a prompt and decoding with a model of gated blocks, over keys and values of fixed size."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from whit.generation.blocks import GatedDecoder, UnsuitedError, agrees
from whit.kernels.decode_launch import splits_for
from whit.kernels.decode_state import KeyValues, Place

SHORTEST, LONGEST = 8, 40
"""Tokens of the trial that shows whether fused blocks compute what the model's own do: those of the prompt within these
bounds, so that kernels compiled for the trial are those that the prompt needs."""


class FusedStep:
    """Logits of the next token for the tokens just chosen; every buffer it reads or writes stays where it is.

    Args:
        decoder: the parts of the model.
        start: int64 (sequences,), number of padding tokens before each sequence.
        length: tokens that fit into the cache.

    Raises:
        UnsuitedError: the rotation does not cover whole heads.
    """

    def __init__(self, decoder: GatedDecoder, start: Tensor, length: int) -> None:
        self.decoder = decoder
        weight = decoder.last.weight
        device, sequences, size = start.device, len(start), decoder.head_size
        shape = (sequences, decoder.key_heads, length, size)
        self.caches = [
            KeyValues(*(torch.zeros(shape, dtype=weight.dtype, device=device) for _ in range(2)))
            for _ in decoder.blocks
        ]
        tables = decoder.rotary(weight, torch.arange(length, device=device)[None])
        cosine, sine = (table[0].to(weight.dtype).contiguous() for table in tables)
        if cosine.shape != (length, size):
            raise UnsuitedError("it rotates a part of each head only")
        splits = splits_for(device, sequences, decoder.heads, length)
        self.place = Place(
            position=torch.zeros((), dtype=torch.int64, device=device),
            start=start,
            cosine=cosine,
            sine=sine,
            partial=torch.empty(sequences * decoder.heads, splits, size + 2, device=device),
            arrived=torch.zeros(sequences * decoder.heads, dtype=torch.int32, device=device),
        )

    def prefill(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        """A prompt (sequences, tokens) and its mask, 0 for padding -> logits (sequences, vocabulary)."""
        mask = seen_by(attention_mask) if bool((attention_mask == 0).any()) else None
        logits = self.decoder.read(ids, self.caches, self.place, mask)
        self.place.position.fill_(ids.shape[1])
        return logits

    def logits(self, ids: Tensor) -> Tensor:
        """ids (sequences, 1) -> (sequences, vocabulary), for the token at `place.position`."""
        return self.decoder.run(ids[:, 0], self.caches, self.place)

    def advance(self) -> Tensor:
        """Where the next token stands: one place further, when this one has been chosen."""
        return self.place.position


def seen_by(attention_mask: Tensor) -> Tensor:
    """bool (sequences, 1, tokens, tokens): a token sees the others up to it that are no padding, and itself.

    Padding sees itself so that its sums are not empty: what comes of it is seen by no one.
    """
    tokens = attention_mask.shape[1]
    before = torch.ones(tokens, tokens, dtype=torch.bool, device=attention_mask.device).tril()
    own = torch.eye(tokens, dtype=torch.bool, device=attention_mask.device)
    return ((attention_mask[:, None, :] != 0) & before | own)[:, None]


def check_against(model: nn.Module, decoder: GatedDecoder, prompt: Tensor, most: int = LONGEST) -> None:
    """Run a few tokens through the model itself and, on the same inputs, through both fused forms of every block.

    Args:
        prompt: int64 (tokens,), at least one.
        most: tokens of the trial.

    Raises:
        UnsuitedError: a part computes something else.
    """
    tokens = min(max(len(prompt), SHORTEST), most)
    ids = prompt.repeat(-(-tokens // len(prompt)))[None, :tokens]
    run: Any = model
    with _Watch(decoder.modules) as watch:
        # What a few ids mean for the head shows on one of them; a head is as large as ten blocks of a small model.
        kept = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(run.forward).parameters else {}
        wanted = run(input_ids=ids, use_cache=False, **kept).logits[:, -1]
    if len(watch.seen) != len(decoder.modules):
        raise UnsuitedError("its blocks are not called once each")
    if not agrees(decoder.embedding(ids[0]), watch.seen[0][0]):
        raise UnsuitedError("something stands between its embedding and its blocks")
    step = FusedStep(decoder, torch.zeros_like(ids[:, 0]), tokens)
    step.place.position.fill_(tokens - 1)
    for number, (block, cache, (before, after)) in enumerate(zip(decoder.blocks, step.caches, watch.seen, strict=True)):
        states, update = block.read(before, None, cache, step.place, None)
        last, last_update = block.run(before[-1:], None, cache, step.place)
        pairs = ((states + update, after, before), (last + last_update, after[-1:], before[-1:]))
        if not all(agrees(*pair, coarse=decoder.coarse) for pair in pairs):
            raise UnsuitedError(f"block {number} computes something else than its parts suggest")
    if not agrees(decoder.logits(watch.seen[-1][1][-1:], None), wanted, coarse=decoder.coarse):
        raise UnsuitedError("something stands after its output head")


class _Watch:
    """While entered, keeps what each module is given and returns for one sequence: (tokens, hidden) both."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []
        self._modules = modules

    def __enter__(self) -> _Watch:
        self._handles = [module.register_forward_hook(self._keep, with_kwargs=True) for module in self._modules]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _keep(self, _: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        before = arguments[0] if arguments else keywords["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        self.seen.append((before[0].clone(), after[0].clone()))
