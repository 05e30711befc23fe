"""Running a model on one batch and reading what it answers, without knowing its family."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from whit.errors import ModelError

#: Names of the output that matters, in order of preference: heads first, then the body, then autoencoders.
PREFERRED = ("logits", "last_hidden_state", "sample", "reconstruction")
PROBE = 16


def run_model(model: nn.Module, batch: Mapping[str, Tensor], device: torch.device | str) -> tuple[str, Tensor]:
    """Name and value of the main output of `model(**batch)`.

    Floating inputs are cast to the model's dtype. Labels are held back where the decoder's inputs are given: the
    model would only compute a loss that is computed here anyway. Key-value caches are switched off.

    Raises:
        ModelError: the model refuses the inputs, answers nothing usable, or the answer holds NaN or Inf.
    """
    dtype = next((item.dtype for item in model.parameters() if item.is_floating_point()), torch.float32)
    inputs: dict[str, Any] = {
        name: item.to(device=device, dtype=dtype if item.is_floating_point() else item.dtype)
        for name, item in batch.items()
        if name != "labels" or needs_labels(model, batch)
    }
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    try:
        with torch.inference_mode():
            answer = model(**inputs)
    except (TypeError, ValueError, IndexError) as error:
        listed = ", ".join(sorted(batch))
        raise ModelError(f"{type(model).__name__} does not take the inputs {listed}: {_first_line(error)}") from error
    name, value = main_output(answer, type(model).__name__)
    if _broken(value):
        raise ModelError(
            f"{name} of {type(model).__name__} hold NaN or Inf: try --dtype float32, or check the model's weights"
        )
    return name, value


def needs_labels(model: nn.Module, batch: Mapping[str, Tensor]) -> bool:
    """Encoder-decoders make the decoder's inputs from labels when they are not given."""
    config = getattr(model, "config", None)
    return bool(getattr(config, "is_encoder_decoder", False)) and "decoder_input_ids" not in batch


def main_output(answer: Any, label: str) -> tuple[str, Tensor]:
    """The output that matters, from a tensor, a tuple or a mapping.

    Raises:
        ModelError: there is no floating-point tensor in the answer.
    """
    if isinstance(answer, Tensor):
        return "output", answer
    if isinstance(answer, Mapping):
        for name in PREFERRED:
            if isinstance(answer.get(name), Tensor):
                return name, answer[name]
        answer = tuple(answer.values())
    for item in answer if isinstance(answer, tuple | list) else ():
        if isinstance(item, Tensor) and item.is_floating_point() and item.ndim > 0:
            return "output", item
    raise ModelError(f"the answer of {label} holds no tensor to evaluate: give a model with logits or hidden states")


def is_causal(model: nn.Module, batch: Mapping[str, Tensor], device: torch.device | str) -> bool:
    """Whether position t of the logits is a function of tokens 0..t only, found by changing the last token.

    True for decoder-only language models, whatever they are called; false for encoders, classifiers, encoder-decoders
    and models without token logits. At most the first 16 tokens are used. Both versions go through the model as one
    batch, because a layer that rounds its inputs may round all tokens of a call by what it finds in any of them.
    """
    ids = batch.get("input_ids")
    if ids is None or ids.ndim != 2 or ids.shape[1] < 2 or "labels" in batch or "decoder_input_ids" in batch:
        return False
    probe = ids[:1, :PROBE].clone()
    changed = probe.clone()
    different = probe[0][probe[0] != probe[0, -1]]
    changed[0, -1] = different[0] if len(different) else (probe[0, -1] + 1 if probe[0, -1] == 0 else 0)
    both = torch.cat([probe, changed])
    name, answer = run_model(model, {"input_ids": both}, device)
    if name not in ("logits", "output") or answer.ndim != 3 or answer.shape[:2] != both.shape:
        return False
    moved = (answer[0] - answer[1]).nan_to_num(0).abs()  # NaN: -Inf on both sides
    return bool(moved[:-1].max() <= 1e-3 * moved[-1].max())


def _broken(value: Tensor) -> bool:
    """NaN or +Inf anywhere; -Inf is how models rule tokens out. The sum decides first: it needs no mask in memory."""
    if bool(torch.isfinite(value.sum(dtype=torch.float32))):
        return False
    return bool(value.isnan().any()) or bool((value == torch.inf).any())


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
