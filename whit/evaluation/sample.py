"""What a model says: one greedy continuation or transcription, so that a reader sees more than a number."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from whit.data.inputs import ModelInputs
from whit.errors import DataError, ModelError
from whit.evaluation.tokens import IGNORED
from whit.generation import continue_greedily

NEW_TOKENS = 32


def sample_text(
    model: nn.Module, tokenizer: Any, prompt: str, new_tokens: int, *, way: str = "auto", join: bool = False
) -> str:
    """Greedy continuation of a prompt by a causal language model: deterministic, special tokens left out.

    Args:
        way, join: as in `whit.generation.continue_greedily`.

    Raises:
        ModelError: the model cannot generate text.
        DataError: prompt and new tokens are more than the model has positions for.
    """
    if not _can_generate(model):
        raise ModelError(f"{type(model).__name__} cannot generate text: it has no language-modelling head")
    device = next(model.parameters()).device
    inputs = {name: item.to(device) for name, item in tokenizer(prompt, return_tensors="pt").items()}
    continued = continue_greedily(
        model,
        inputs["input_ids"],
        inputs.get("attention_mask"),
        new_tokens=new_tokens,
        stop_tokens=_stop_tokens(model),
        way=way,
        join=join,
    )
    logging.getLogger(__name__).info("decoded %s", continued.explain())
    ids = continued.tokens
    start = inputs["input_ids"].shape[1]
    # Many tokenizers drop the space before the first token of what they decode: so both are decoded from the start.
    before, whole = (str(tokenizer.decode(part, skip_special_tokens=True)) for part in (ids[0, :start], ids[0]))
    if whole.startswith(before):
        return whole[len(before) :]
    return str(tokenizer.decode(ids[0, start:], skip_special_tokens=True))


def transcribe(model: nn.Module, tokenizer: Any, batch: dict[str, Tensor], new_tokens: int) -> str:
    """Greedy output of an encoder-decoder for one sample, with the decoder started as the data starts it.

    The start is what `decoder_input_ids` holds up to the first scored label (for Whisper: the task tokens); without
    it the model's own `decoder_start_token_id`.

    Args:
        batch: keyword inputs with a leading dimension of 1.

    Raises:
        ModelError: the model has no encoder, or nothing says how the decoder starts.
    """
    parameter = next(model.parameters())
    device = parameter.device
    decoder = {"labels", "decoder_input_ids", "decoder_attention_mask"}
    inputs = {
        name: item.to(device, parameter.dtype if item.is_floating_point() else item.dtype)
        for name, item in batch.items()
        if name not in decoder
    }
    get_encoder: Any = getattr(model, "get_encoder", None)
    if get_encoder is None:
        raise ModelError(f"{type(model).__name__} has no encoder: there is nothing to transcribe")
    answer: Any = model
    ids, stops = _decoder_start(model, batch).to(device), _stop_tokens(model)
    start = ids.shape[1]
    with torch.inference_mode():
        encoded = get_encoder()(**inputs)
        mask = {"attention_mask": inputs["attention_mask"]} if "attention_mask" in inputs else {}
        for _ in range(new_tokens):
            logits = answer(encoder_outputs=encoded, decoder_input_ids=ids, use_cache=False, **mask).logits
            following = logits[:, -1].argmax(-1, keepdim=True)
            if int(following) in stops:
                break
            ids = torch.cat([ids, following], dim=1)
    return str(tokenizer.decode(ids[0, start:], skip_special_tokens=True)).strip()


def sample_record(
    model: nn.Module, tokenizer: Any, prompt: str, data: ModelInputs, *, new_tokens: int = NEW_TOKENS
) -> dict[str, str]:
    """The sample of an evaluation record: `prompt` and `text`, and `reference` where the data knows the answer.

    Empty where the model is no generator; a `note` with an empty `text` where generating failed, because a sample is
    never worth losing a finished evaluation for.
    """
    if tokenizer is None or not _can_generate(model):
        return {}
    encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    shown = f"first sample of {data.provenance['name']}" if encoder_decoder else prompt
    try:
        if not encoder_decoder:
            # A few dozen tokens are over before a CPU has compiled a program for more.
            way = "library" if next(model.parameters()).device.type == "cpu" else "auto"
            return {"prompt": shown, "text": sample_text(model, tokenizer, prompt, new_tokens, way=way)}
        batch = data.batches[0]
        out = {"prompt": shown, "text": transcribe(model, tokenizer, batch, new_tokens)}
        if "labels" in batch:
            labels = batch["labels"][0]
            out["reference"] = str(tokenizer.decode(labels[labels != IGNORED], skip_special_tokens=True)).strip()
        return out
    except (DataError, ModelError, RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return {"prompt": shown, "text": "", "note": f"no sample: {reason}"}


def _can_generate(model: nn.Module) -> bool:
    can_generate: Any = getattr(model, "can_generate", None)
    return bool(can_generate()) if callable(can_generate) else False


def _stop_tokens(model: nn.Module) -> list[int]:
    for holder in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        stop = getattr(holder, "eos_token_id", None)
        if stop is not None:
            return [int(stop)] if isinstance(stop, int) else [int(item) for item in stop]
    return []


def _decoder_start(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    given, labels = batch.get("decoder_input_ids"), batch.get("labels")
    if given is not None and labels is not None and given.shape == labels.shape:
        scored = (labels[0] != IGNORED).nonzero()
        return given[:1, : int(scored[0]) + 1] if len(scored) else given[:1, :1]
    if given is not None:
        return given[:1, :1]
    for holder in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        start = getattr(holder, "decoder_start_token_id", None)
        if start is not None:
            return torch.tensor([[int(start)]])
    raise ModelError("nothing says how the decoder starts: give decoder_input_ids in the evaluation file")
