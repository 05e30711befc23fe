"""Measuring: the original and the packed model, reloaded from disk, under one protocol."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import psutil
import torch
from torch import nn

from whit.data.inputs import ModelInputs
from whit.evaluation.measure import evaluate_model
from whit.evaluation.sample import sample_record
from whit.models.loading import load_directory, load_tokenizer
from whit.models.resolve import ModelReference
from whit.models.skeleton import load_dense
from whit.pipeline.events import Listener
from whit.report.record import EvaluationRecord

PROMPT = "The capital of France is"


def compare(
    reference: ModelReference,
    directory: Path,
    data: ModelInputs,
    device: torch.device,
    dtype: torch.dtype,
    listener: Listener,
    leak: bool,
) -> tuple[EvaluationRecord | None, EvaluationRecord]:
    """Evaluate the original (unless it does not fit) and the compressed model in `directory`."""
    listener.phase("evaluation", 1)
    original: nn.Module | None = None
    if _fits(reference, dtype, device):
        original = load_dense(reference, dtype, device)
    else:
        listener.note(
            "the original does not fit in memory beside its compressed form: measured alone, without KL divergence"
        )
    compressed = load_directory(directory, dtype=dtype, device=device)
    fields = {"dtype": str(dtype).removeprefix("torch.")}
    after, before = evaluate_model(compressed, data, original=original, device=device, protocol_fields=fields)
    tokenizer = load_tokenizer(directory)
    after = dataclasses.replace(after, leak=leak, sample=sample_record(compressed, tokenizer, PROMPT, data))
    if before is not None and original is not None:
        before = dataclasses.replace(before, leak=leak, sample=sample_record(original, tokenizer, PROMPT, data))
    listener.step("both models measured" if original is not None else "compressed model measured")
    return before, after


def _fits(reference: ModelReference, dtype: torch.dtype, device: torch.device) -> bool:
    needed = reference.dense_bytes / max(reference.dtype.itemsize, 1) * dtype.itemsize * 1.3
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return bool(needed < 0.8 * free)
    return bool(needed < 0.8 * psutil.virtual_memory().available)
