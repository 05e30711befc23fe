"""One decoding step by the model's own forward, over a transformers `StaticCache`."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from whit.generation.blocks import UnsuitedError


class StaticStep:
    """As `FusedStep`, for any causal language model whose class supports a cache of fixed size.

    Args:
        attention_mask: int64 (sequences, prompt), 0 for padding.
        length: tokens that fit into the cache.

    Raises:
        UnsuitedError: the class does not support such a cache.
    """

    def __init__(self, model: nn.Module, attention_mask: Tensor, length: int) -> None:
        from transformers import StaticCache
        from transformers.cache_utils import StaticLayer

        if not getattr(model, "_can_compile_fullgraph", False):
            raise UnsuitedError(f"{type(model).__name__} does not support a cache of fixed size")
        self._model: Any = model
        self.cache = StaticCache(config=self._model.config, max_cache_len=length)
        if any(type(layer) is not StaticLayer for layer in self.cache.layers):  # some keep count on the host
            raise UnsuitedError(f"{type(model).__name__} keeps another kind of cache")
        sequences, prompt = attention_mask.shape
        self._padded = bool((attention_mask == 0).any())
        self._mask = torch.ones(sequences, length, dtype=torch.int64, device=attention_mask.device)
        self._mask[:, :prompt] = attention_mask
        self._positions = attention_mask.sum(-1, keepdim=True)
        self._takes = set(inspect.signature(self._model.forward).parameters)

    def prefill(self, inputs: dict[str, Tensor], positions: Tensor) -> Tensor:
        """The prompt (`input_ids`, `attention_mask`, their places) -> logits of its last token."""
        given: dict[str, Any] = dict(inputs)
        if "position_ids" in self._takes:
            given["position_ids"] = positions
        if "logits_to_keep" in self._takes:
            given["logits_to_keep"] = 1
        return _last(self._model(**given, past_key_values=self.cache, use_cache=True))

    def logits(self, ids: Tensor) -> Tensor:
        """ids (sequences, 1) -> (sequences, vocabulary)."""
        given: dict[str, Tensor] = {}
        if self._padded:
            given["attention_mask"] = self._mask
        if "position_ids" in self._takes:
            given["position_ids"] = self._positions
        return _last(self._model(input_ids=ids, past_key_values=self.cache, use_cache=True, **given))

    def advance(self) -> None:
        """The cache counts for itself; positions are ours."""
        self._positions.add_(1)


def _last(output: Any) -> Tensor:
    logits: Tensor = output.logits[:, -1]
    return logits
