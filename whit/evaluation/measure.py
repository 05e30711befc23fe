"""Measuring a compressed model, and in the same pass the original it came from.

What is measured follows from what the model answers:

- token logits that depend on earlier tokens only: perplexity exp(sum NLL / tokens), shifted inside each window; with
  an original also KL(original || compressed) per token and the share of equal most likely tokens;
- logits for given labels (encoder-decoder): the same, teacher forced and without shift, and the output error;
- any other output: output error ||f(x) - g(x)||^2 / ||f(x)||^2, the cosine similarity of mean-pooled hidden states,
  and top-1 agreement where there are logits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from whit.data.inputs import ModelInputs
from whit.errors import ModelError
from whit.evaluation.bootstrap import WindowSums
from whit.evaluation.outputs import is_causal, run_model
from whit.evaluation.protocol import protocol_id
from whit.evaluation.tokens import IGNORED, token_sums
from whit.heap import freed_memory_kept
from whit.report.record import EvaluationRecord, MetricRecord

HIGHER_IS_BETTER = frozenset({"top1_agreement", "cosine_similarity"})
#: Rows of an output compared at a time.
CHUNK = 256

Sums = dict[str, WindowSums]


def evaluate_model(
    model: nn.Module,
    data: ModelInputs,
    *,
    original: nn.Module | None = None,
    device: torch.device | str,
    protocol_fields: Mapping[str, Any],
    progress: Callable[[str], None] | None = None,
) -> tuple[EvaluationRecord, EvaluationRecord | None]:
    """Evaluate a model, and if given the original beside it (batch by batch, so no logits are kept).

    Args:
        model: the compressed (or any) model, already on `device`.
        data: from `load_evaluation`.
        original: the model it is compared with, on `device`; adds the metrics that need both.
        protocol_fields: added to the fields the data brings (at least `dtype`).
        progress: told about each window that is done.

    Returns:
        the record of the model, and that of the original or None. `seconds` counts each model's own forward passes.

    Raises:
        ModelError: a model refuses the inputs, answers with NaN or Inf, or in another shape than the original.
    """
    mine: Sums = {}
    theirs: Sums = {}
    clock = {"model": 0.0, "original": 0.0}
    with _evaluating(model), _evaluating(original), freed_memory_kept():
        causal = is_causal(model, data.batches[0], device)
        for number, batch in enumerate(data.batches, 1):
            reference = None
            if original is not None:
                start = time.perf_counter()
                _, reference = run_model(original, batch, device)
                clock["original"] += time.perf_counter() - start
            start = time.perf_counter()
            name, output = run_model(model, batch, device)
            if reference is not None and reference.shape != output.shape:
                raise ModelError(
                    f"{name} of {type(model).__name__} are {tuple(output.shape)}, those of the original "
                    f"{tuple(reference.shape)}: compare models of one vocabulary and shape"
                )
            _compare(name, output, reference, _targets(batch, output, causal), batch, causal, mine, theirs)
            clock["model"] += time.perf_counter() - start
            del output, reference
            if progress is not None:
                progress(f"window {number}/{len(data.batches)}")
    fields = dict(data.provenance.get("protocol", {})) | dict(protocol_fields)
    record = EvaluationRecord(_metrics(mine, fields), {}, data.provenance, clock["model"])
    if original is None:
        return record, None
    return record, EvaluationRecord(_metrics(theirs, fields), {}, data.provenance, clock["original"])


def _targets(batch: Mapping[str, Tensor], output: Tensor, causal: bool) -> Tensor | None:
    """What each row of the logits should predict, int64 (rows,), or None: next tokens, or given labels."""
    if causal:
        return batch["input_ids"][0, 1:]
    labels = batch.get("labels")
    if labels is not None and output.ndim == 3 and labels.shape == output.shape[:2]:
        return labels[0]
    return None


def _compare(
    name: str,
    output: Tensor,
    reference: Tensor | None,
    targets: Tensor | None,
    batch: Mapping[str, Tensor],
    causal: bool,
    mine: Sums,
    theirs: Sums,
) -> None:
    counted = targets if targets is not None else _attended(batch, output)
    if (name == "logits" or causal) and output.ndim in (2, 3):
        rows, other = _rows(output, causal), None if reference is None else _rows(reference, causal)
        sums = token_sums(rows, counted, other)
        if targets is not None and sums.likelihood is not None:
            _add(mine, "perplexity", sums.likelihood, sums.tokens)
        if targets is not None and sums.reference_likelihood is not None:
            _add(theirs, "perplexity", sums.reference_likelihood, sums.tokens)
        if sums.divergence is not None and sums.agreement is not None:
            _add(mine, "kl_divergence", sums.divergence, sums.tokens)
            _add(mine, "top1_agreement", sums.agreement, sums.tokens)
    if causal or reference is None:
        return
    if counted is not None:
        used = (counted != IGNORED).to(output.device)
        _add(mine, "output_error", *_squares(output[0, used], reference[0, used]))
    else:
        _add(mine, "output_error", *_squares(output, reference))
    if name == "last_hidden_state":
        mask = batch.get("attention_mask")
        similarity = torch.cosine_similarity(_pooled(output, mask), _pooled(reference, mask), dim=-1)
        _add(mine, "cosine_similarity", float(similarity.sum()), len(similarity))


def _rows(logits: Tensor, causal: bool) -> Tensor:
    """Logits of one sample as (rows, classes), without the last position where rows predict the next token."""
    return logits if logits.ndim == 2 else logits[0, : -1 if causal else None]


def _attended(batch: Mapping[str, Tensor], output: Tensor) -> Tensor | None:
    """A stand-in for targets that leaves padded positions out: 0 where the mask is set, `IGNORED` elsewhere."""
    mask = batch.get("attention_mask")
    if mask is None or output.ndim != 3 or mask.shape != output.shape[:2]:
        return None
    return torch.where(mask[0] > 0, 0, IGNORED)


def _squares(output: Tensor, reference: Tensor) -> tuple[float, float]:
    """||f - g||^2 and ||f||^2 of one sample, a few rows at a time."""
    above = below = 0.0
    flat, original = output.reshape(-1, output.shape[-1]), reference.reshape(-1, reference.shape[-1])
    for start in range(0, len(flat), CHUNK):
        kept = original[start : start + CHUNK].double()
        above += float((flat[start : start + CHUNK].double() - kept).square().sum())
        below += float(kept.square().sum())
    return above, below


def _pooled(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over positions, (samples, width): padded positions left out, (samples, channels, *space) over space."""
    hidden = hidden.double()
    if hidden.ndim > 3:
        return hidden.flatten(2).mean(-1)
    if hidden.ndim < 3:
        return hidden
    if mask is None or mask.shape != hidden.shape[:2]:
        return hidden.mean(1)
    weight = mask.to(hidden)[..., None]
    return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)


def _add(sums: Sums, name: str, numerator: float, denominator: float) -> None:
    sums.setdefault(name, WindowSums()).add(float(numerator), float(denominator))


def _metrics(sums: Sums, fields: Mapping[str, Any]) -> list[MetricRecord]:
    out = []
    for name, item in sums.items():
        value, (low, high) = item.value, item.interval()
        if name == "perplexity":  # the mean NLL is resampled; exp is monotone, so its interval is that of the log scale
            value, low, high = _exp(value), _exp(low), _exp(high)
        counted = (
            {"tokens": int(sum(item.denominators))} if name in ("perplexity", "kl_divergence", "top1_agreement") else {}
        )
        better = "higher" if name in HIGHER_IS_BETTER else "lower"
        out.append(MetricRecord(name, value, low, high, protocol_id(name, dict(fields) | counted), better))
    return out


def _exp(value: float) -> float:
    """e^value, infinity instead of an error above the range of a float."""
    return math.exp(value) if value < 700 else math.inf


@contextmanager
def _evaluating(model: nn.Module | None) -> Iterator[None]:
    """Switch dropout off, and leave the model as it was found."""
    if model is None:
        yield
        return
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
