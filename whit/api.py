"""The public functions: compress, load, evaluate, export, generate, tune; save and load_into for modules in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import nn

from whit.data.load import load_evaluation
from whit.errors import DataError, KnobError
from whit.evaluation.measure import evaluate_model
from whit.evaluation.sample import sample_record, sample_text
from whit.evaluation.tasks import TaskRun
from whit.exporters import export
from whit.generation.step_tuning import tuned_steps
from whit.generation.weights import meeting_weights, multiplied_weights
from whit.kernels.tuning import TunedProduct, tune_products
from whit.methods.base import Method
from whit.models.loading import is_compressed, load_directory, load_tokenizer, saved_dtype
from whit.models.resolve import resolve_model
from whit.models.skeleton import load_dense
from whit.module.calibration import Forward
from whit.module.compress import compress_module
from whit.module.files import load_into, save
from whit.module.gradients import Loss
from whit.module.result import CompressedModule
from whit.pipeline.compare import PROMPT
from whit.pipeline.compress import compress as compress_model
from whit.pipeline.events import Listener, Plan
from whit.pipeline.leak import check_recorded_leak
from whit.pipeline.options import RunOptions
from whit.pipeline.prepare import choose_device, compute_dtype, data_limits, decoding_dtype
from whit.pipeline.recipe import Recipe
from whit.report.record import EvaluationRecord, Result

__all__ = ["compress", "evaluate", "export", "generate", "load", "load_into", "save", "tune"]

Methods = str | Method | Recipe


@overload
def compress(
    model: nn.Module,
    method: Methods = ...,
    output: None = ...,
    *,
    listener: Listener | None = ...,
    calibration: Iterable[Any] | None = ...,
    loss: Loss | None = ...,
    forward: Forward | None = ...,
    skip: Sequence[str] = ...,
    true_sequential: bool = ...,
    in_place: bool = ...,
    **knobs: Any,
) -> CompressedModule: ...


@overload
def compress(
    model: str | Path | None = ...,
    method: Methods = ...,
    output: str | Path | None = ...,
    *,
    options: RunOptions | None = ...,
    listener: Listener | None = ...,
    dry_run: Literal[False] = ...,
    **knobs: Any,
) -> Result: ...


@overload
def compress(
    model: str | Path | None = ...,
    method: Methods = ...,
    output: str | Path | None = ...,
    *,
    options: RunOptions | None = ...,
    listener: Listener | None = ...,
    dry_run: bool,
    **knobs: Any,
) -> Result | Plan: ...


def compress(
    model: nn.Module | str | Path | None = None,
    method: Methods = "billm",
    output: str | Path | None = None,
    **arguments: Any,
) -> CompressedModule | Result | Plan:
    """Compress a pretrained model into a directory, or a module held in memory.

    `compress(model, method, output, options=..., listener=..., dry_run=..., **knobs)` with a directory, hub id, GGUF
    file, catalogue name or None (the default model) streams the model block by block into `output` and measures what
    is left: see `whit.pipeline.compress.compress` for arguments, the returned `Result` (or `Plan`) and errors.

    `compress(module, method, calibration=..., loss=..., forward=..., skip=..., true_sequential=..., in_place=...,
    **knobs)` with a `torch.nn.Module` returns a compressed copy and its records as a `CompressedModule`: see
    `whit.module.compress.compress_module`.

    Args:
        method: name (with its `knobs`), a method value, or a recipe of several (`whit.Recipe`).

    Raises:
        WhitError: a subclass per kind of problem.
    """
    if not isinstance(model, nn.Module):
        if "calibration" in arguments:
            raise KnobError(
                "calibration=... is for a module in memory; for a model by name give "
                "options=whit.RunOptions(calibration=...)"
            )
        return compress_model(model, method, output, **arguments)
    given = [name for name in ("options", "dry_run") if name in arguments] + ["output"] * (output is not None)
    if given:
        raise KnobError(
            f"{given[0]} is for a model by name: a module in memory is compressed in memory, and saved with "
            "whit.save(result.module, directory)"
        )
    return compress_module(model, method, **arguments)


def load(
    directory: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> nn.Module:
    """Load a compressed model: the same as transformers' `from_pretrained` for the class in its config.

    Args:
        dtype: compute dtype; default as saved. device: default CPU.

    Raises:
        ModelError: the directory does not hold a model compressed by whit.
    """
    return load_directory(directory, dtype=dtype, device=device)


def evaluate(
    model: str | Path | None,
    *,
    against: str | Path | None = None,
    options: RunOptions | None = None,
    tasks: Sequence[str] | None = None,
    limit: int | None = None,
) -> EvaluationRecord:
    """Measure a model, and its distance to another.

    Args:
        model: compressed directory or any model reference (None: the default model).
        against: the original; adds KL divergence and agreement, or with `tasks` the difference on the same items.
        options: evaluation data, window, device and dtype.
        tasks: measure tasks of the LM Evaluation Harness instead: names, or paths of task files.
        limit: items per task; None for all.

    Raises:
        DataError: the model was calibrated on the evaluation text and `options.allow_leak` is not set, or a task cannot
            be read. KnobError: an unknown task. MissingDependencyError: tasks without lm-eval.
    """
    options = options or RunOptions()
    if tasks is not None:
        return _evaluate_tasks(model, against, options, tasks, limit)
    if limit is not None:
        raise KnobError("--limit counts the items of tasks: give --tasks as well, or use --evaluation-windows")
    device = choose_device(options.device)
    subject, tokenizer, dtype, limits = _open(model, options, device)
    data = load_evaluation(
        options.evaluation, tokenizer, windows=options.evaluation_windows, window=options.window, **limits
    )
    leak = check_recorded_leak(model, data.provenance, allow=options.allow_leak)
    original = None
    if against is not None:  # in the same dtype: rounding of the computation is not the method's doing
        original = _open(against, dataclasses.replace(options, dtype=str(dtype).removeprefix("torch.")), device)[0]
    fields = {"dtype": str(dtype).removeprefix("torch.")}
    record, _ = evaluate_model(subject, data, original=original, device=device, protocol_fields=fields)
    return dataclasses.replace(record, leak=leak, sample=sample_record(subject, tokenizer, PROMPT, data))


def _evaluate_tasks(
    model: str | Path | None,
    against: str | Path | None,
    options: RunOptions,
    tasks: Sequence[str],
    limit: int | None,
) -> EvaluationRecord:
    if limit is not None and limit < 1:
        raise KnobError(f"limit must be at least 1, got {limit}")
    device = choose_device(options.device)
    with TaskRun(tasks, limit) as run:
        leak = check_recorded_leak(model, run.provenance, allow=options.allow_leak)
        subject, tokenizer, dtype, _ = _open(model, options, device)
        name = str(dtype).removeprefix("torch.")
        original = original_tokenizer = None
        if against is not None:
            original, original_tokenizer, _, _ = _open(against, dataclasses.replace(options, dtype=name), device)
        record = run.record(
            subject,
            tokenizer,
            original=original,
            original_tokenizer=original_tokenizer,
            batch_size=max(1, options.batch_size),
            fields={"dtype": name},
        )
    return dataclasses.replace(record, leak=leak)


def generate(
    directory: str | Path,
    prompt: str,
    *,
    new_tokens: int = 64,
    dtype: torch.dtype | None = None,
    device: str = "auto",
) -> str:
    """Greedy continuation of `prompt` by a compressed model.

    Args:
        dtype: compute dtype; default float32 on a CPU, on a GPU as saved, or bfloat16 if that is float32.

    Raises:
        DataError: the directory holds no tokenizer, or the text would be longer than the model's positions.
    """
    place = choose_device(device)
    dtype = dtype or decoding_dtype(saved_dtype(directory), place)
    model = load_directory(directory, dtype=dtype, device=place)
    tokenizer = load_tokenizer(directory)
    if tokenizer is None:
        raise DataError(f"{str(directory)!r} holds no tokenizer: copy the original's tokenizer files into it")
    return sample_text(model, tokenizer, prompt, new_tokens, join=True)


def tune(
    directory: str | Path,
    *,
    vectors: Sequence[int] = (1, 16),
    dtype: torch.dtype | None = None,
    device: str = "auto",
) -> Iterator[TunedProduct]:
    """Find the fastest launch of every product of a compressed model on this GPU, and keep it for all later runs.

    Results come one at a time, as they are found, and hold for every model with layers of the same format and shape.
    Products with one vector are tuned twice: by themselves, and then where they stand in a step of decoding.

    Args:
        vectors: numbers of input vectors: 1 for decoding one text, 16 for sixteen, more for reading prompts.
        dtype: of the inputs, float16 or bfloat16; default as in `generate`.

    Raises:
        KnobError: no CUDA device, or a number of vectors below one. ModelError: not a compressed model.
    """
    wrong = [count for count in vectors if count < 1]
    if wrong or not vectors:
        raise KnobError(f"vectors must be whole numbers of at least 1, got {wrong[0] if wrong else 'none'}")
    place = choose_device(device)
    if place.type != "cuda":
        raise KnobError(
            f"--device {device!r}: launches are chosen on a CUDA device, and this is {place.type!r}; on a "
            f"{place.type.upper()} there is nothing to tune"
        )
    dtype = dtype or decoding_dtype(saved_dtype(directory), place)
    if dtype.itemsize != 2:
        raise KnobError(f"launches are chosen for 16-bit inputs, not for {dtype}: give --dtype bfloat16 or float16")
    model = load_directory(directory, dtype=dtype, device=place)
    products = tune_products(multiplied_weights(model), vectors, dtype, meeting_weights(model))
    return chain(products, tuned_steps(model)) if 1 in vectors else products


def _open(
    model: str | Path | None, options: RunOptions, device: torch.device
) -> tuple[nn.Module, object, torch.dtype, dict[str, int | None]]:
    if model is not None and is_compressed(model):
        dtype = compute_dtype(options.dtype, saved_dtype(model), device)
        loaded = load_directory(model, dtype=dtype, device=device)
        return loaded, load_tokenizer(model), dtype, data_limits(loaded.config)
    reference = resolve_model(model)
    dtype = compute_dtype(options.dtype, reference.dtype, device)
    return load_dense(reference, dtype, device), reference.load_tokenizer(), dtype, data_limits(reference.config)
