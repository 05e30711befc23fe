"""The loss whose gradient a pass takes: the model's own, given the labels that its task leaves no choice about."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from whit.errors import ModelError
from whit.evaluation.tokens import IGNORED
from whit.methods.base import available_methods
from whit.methods.statistics import Statistic
from whit.models.layers import declared_end


def loss_labels(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """What the model shall predict: int64, in the shape its `labels` take.

    Labels of the data are taken as they are. Otherwise an encoder-decoder predicts the decoder's next input, and a
    language model its own input: a causal one shifts the labels itself, a masked one predicts every token in place.
    Positions outside the attention mask are not scored.

    Raises:
        ModelError: the model takes no labels, or they do not follow from its inputs.
    """
    if "labels" not in inspect.signature(model.forward).parameters:
        raise ModelError(f"{type(model).__name__} computes no loss, so it has no gradient: {without_gradients()}")
    if "labels" in batch:
        return batch["labels"]
    head = declared_end(model, "get_output_embeddings")
    if "decoder_input_ids" in batch:
        ids = batch["decoder_input_ids"]
        return torch.cat([ids[:, 1:], ids.new_full((len(ids), 1), IGNORED)], 1)
    if head is None or "input_ids" not in batch or getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(
            f"the loss of {type(model).__name__} does not follow from the calibration inputs ({', '.join(batch)}): "
            f"give them labels, or {without_gradients()}"
        )
    mask = batch.get("attention_mask")
    ids = batch["input_ids"]
    return ids if mask is None or mask.shape != ids.shape else ids.masked_fill(mask == 0, IGNORED)


def loss_of(answer: Any) -> Tensor:
    """The scalar loss in a model's answer to inputs with labels."""
    loss = answer.get("loss") if isinstance(answer, Mapping) else answer[0]
    assert isinstance(loss, Tensor)
    return loss


def without_gradients() -> str:
    """The advice of errors that only methods with gradients can run into."""
    names = [name for name, cls in available_methods().items() if Statistic.GRADIENT not in cls().required()]
    return f"choose a method that needs no gradients ({', '.join(names)})"
