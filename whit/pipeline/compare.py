"""Measuring: the original and the packed model, reloaded from disk, under one protocol."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import nn

from whit.data.inputs import ModelInputs
from whit.evaluation.measure import evaluate_model
from whit.evaluation.sample import sample_record
from whit.models.loading import load_directory, load_tokenizer
from whit.models.resolve import ModelReference
from whit.models.skeleton import load_dense
from whit.pipeline.events import Listener
from whit.pipeline.memory import available_bytes, original_fits
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
    """Evaluate the original (unless it does not fit) and the compressed model in `directory`.

    The phase has one step per window and one per sample.
    """
    original: nn.Module | None = None
    dense = reference.dense_bytes * dtype.itemsize // reference.dtype.itemsize
    beside = original_fits(dense, available_bytes(device))
    listener.phase("evaluation", len(data.batches) + 1 + beside)
    if beside:
        original = load_dense(reference, dtype, device)
    else:
        listener.note(
            "the original does not fit in memory beside its compressed form: measured alone, without KL divergence"
        )
    compressed = load_directory(directory, dtype=dtype, device=device)
    fields = {"dtype": str(dtype).removeprefix("torch.")}
    after, before = evaluate_model(
        compressed, data, original=original, device=device, protocol_fields=fields, progress=listener.step
    )
    tokenizer = load_tokenizer(directory)
    after = dataclasses.replace(after, leak=leak, sample=sample_record(compressed, tokenizer, PROMPT, data))
    listener.step("sample of the compressed model")
    if before is not None and original is not None:
        before = dataclasses.replace(before, leak=leak, sample=sample_record(original, tokenizer, PROMPT, data))
        listener.step("sample of the original")
    return before, after
