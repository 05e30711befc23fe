"""Preparing a run: the model resolved, methods assigned, data read and checked, so that what can fail fails early."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from whit import __version__
from whit.data.corpora import DEFAULT_CALIBRATION, DEFAULT_EVALUATION
from whit.data.inputs import ModelInputs
from whit.data.leak import check_leak
from whit.data.load import load_calibration, load_evaluation
from whit.data.read import read_source
from whit.errors import KnobError, OutputError
from whit.kernels.cpu.bfloat16 import has_matrix_units
from whit.kernels.cpu.compiling import numba_works
from whit.methods.base import Method
from whit.models.resolve import ModelReference, resolve_model
from whit.models.skeleton import build_skeleton
from whit.models.stacks import Stack, find_stacks
from whit.pipeline.assign import Assignment, assign
from whit.pipeline.estimate import load_kernels
from whit.pipeline.gradient_task import gradient_layers
from whit.pipeline.loss import loss_labels
from whit.pipeline.options import RunOptions
from whit.pipeline.recipe import Recipe, as_recipe

# Activations of a block in one forward pass (a few MB stay in the caches of a CPU), sequences in one, and passes that
# several processes can divide.
BATCH_BYTES = {"cuda": 2**32, "cpu": 2**26}
LARGEST_BATCH = 64
FEWEST_BATCHES = 8


@dataclass
class Job:
    """A run that was prepared and checked, but has not done any work yet."""

    reference: ModelReference
    recipe: Recipe
    options: RunOptions
    output: Path
    device: torch.device
    compute_dtype: torch.dtype
    calibration_dtype: torch.dtype
    dense_dtype: torch.dtype
    skeleton: nn.Module
    stacks: list[Stack]
    assignment: Assignment
    batch_size: int
    calibration: ModelInputs
    evaluation: ModelInputs | None
    leak: bool
    identity: dict[str, Any]


def prepare(model: str | Path | None, recipe: Recipe | Method, output: str | Path | None, options: RunOptions) -> Job:
    """Resolve the model, choose methods for its layers and read the data: all that can fail before work starts.

    Raises:
        WhitError: a subclass per kind of problem; nothing was written.
    """
    _check_name(output)
    recipe = as_recipe(recipe, {})
    device = choose_device(options.device)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="whit-kernels") as beside:

        def load_beside() -> None:  # what fails there will say so where it is needed
            beside.submit(load_kernels, [step.method for step in recipe.steps], _own_device(device))

        if device.type == "cuda":  # hashing large files takes longer than its kernels
            load_beside()
            return _prepare(model, recipe, output, options, device, lambda: None)
        return _prepare(model, recipe, output, options, device, load_beside)


def _prepare(
    model: str | Path | None,
    recipe: Recipe,
    output: str | Path | None,
    options: RunOptions,
    device: torch.device,
    accepted: Callable[[], None],
) -> Job:
    """As `prepare`; `accepted` is called once the model, the layers and the files of the data are known to be there."""
    reference = resolve_model(model)
    compute = compute_dtype(options.dtype, reference.dtype, device)
    calibrating = calibration_dtype(options.dtype, reference.dtype, device)
    skeleton = build_skeleton(reference, calibrating)
    stacks = find_stacks(skeleton)
    assignment = assign(skeleton, stacks, recipe, options, reference.dtype)
    limits = data_limits(reference.config)
    given, measured_on = read_source(options.calibration, DEFAULT_CALIBRATION), None
    if options.evaluate:
        measured_on = read_source(options.evaluation, DEFAULT_EVALUATION)
    accepted()
    tokenizer = reference.load_tokenizer()
    calibration = load_calibration(
        given,
        tokenizer,
        samples=options.samples,
        sequence_length=options.sequence_length,
        seed=options.seed,
        **limits,
    )
    if gradient_layers(assignment):
        loss_labels(skeleton, calibration.batches[0])  # refused now rather than when the pass begins
    evaluation, leak = None, False
    if measured_on is not None:
        evaluation = load_evaluation(
            measured_on, tokenizer, windows=options.evaluation_windows, window=options.window, **limits
        )
        leak = check_leak(calibration.provenance, evaluation.provenance, allow=options.allow_leak)
    directory = Path(output) if output is not None else default_output(reference.label, recipe.label)
    positions = calibration.tokens // len(calibration.batches)
    sequence_bytes = positions * assignment.widest_sum() * calibrating.itemsize
    batch = options.batch_size or batch_size_for(device, sequence_bytes, len(calibration.batches))
    identity = _identity(reference, recipe, options, batch, calibration, device, compute, calibrating)
    return Job(
        reference, recipe, options, directory, device, compute, calibrating, reference.dtype, skeleton, stacks,
        assignment, batch, calibration, evaluation, leak, identity,
    )  # fmt: skip


def _own_device(device: torch.device) -> torch.device:
    """A device by number: which one is the current one is known to each thread by itself."""
    return torch.device("cuda", torch.cuda.current_device()) if str(device) == "cuda" else device


def _check_name(output: str | Path | None) -> None:
    if output is not None and str(output).startswith("-"):
        raise OutputError(
            f"output {str(output)!r} looks like an option, not a directory: give -o a name, or './{output}' if you "
            "mean it"
        )


def default_output(label: str, method: str) -> Path:
    """`whit-output/<last part of the model's name>-<method>`."""
    stem = Path(label).name.removesuffix(".gguf") or "model"
    return Path("whit-output") / f"{stem}-{method}"


def choose_device(name: str) -> torch.device:
    """Device by name; "auto" takes the first CUDA device if there is one.

    Raises:
        KnobError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()  # "meta" has no values
    except (RuntimeError, AssertionError) as error:
        raise KnobError(
            f"--device {name!r} cannot be used here ({str(error).splitlines()[0]}); try --device cpu"
        ) from None
    return device


def compute_dtype(name: str, model_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Compute dtype by name; "auto" is float32 on CPU, the model's own elsewhere."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    return torch.float32 if device.type == "cpu" else model_dtype


def decoding_dtype(saved: torch.dtype, device: torch.device) -> torch.dtype:
    """Dtype to generate text in, if none is asked for: as `compute_dtype`, but 16 bit on a GPU whatever was saved.

    The GPU's kernels multiply 16-bit inputs; a model saved in float32 would run without them.
    """
    dtype = compute_dtype("auto", saved, device)
    return torch.bfloat16 if device.type == "cuda" and dtype.itemsize > 2 else dtype


def batch_size_for(device: torch.device, sequence_bytes: int, sequences: int) -> int:
    """Sequences per forward pass: the largest power of two within `BATCH_BYTES` that leaves `FEWEST_BATCHES`.

    It must not depend on the memory that happens to be free, or on how many processes there are: sums follow the
    batches.

    Args:
        sequence_bytes: outputs of all layers of a block for one sequence.
        sequences: how many there are.
    """
    fitting = BATCH_BYTES.get(device.type, 0) // max(1, sequence_bytes)
    most = max(1, min(LARGEST_BATCH, fitting, sequences // FEWEST_BATCHES))
    return 1 << (most.bit_length() - 1)


def calibration_dtype(name: str, model_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Dtype of the calibration's forward passes: the compute dtype, but for "auto" and a 16-bit model on a CPU.

    There it is bfloat16 if the CPU has matrix units for it, as a GPU would run a 16-bit model in 16 bits.
    """
    if name == "auto" and device.type == "cpu" and model_dtype.itemsize == 2 and has_matrix_units():
        return torch.bfloat16
    return compute_dtype(name, model_dtype, device)


def data_limits(config: Any) -> dict[str, int | None]:
    """Vocabulary size and longest sequence of a model, None where the config does not say."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = ("max_position_embeddings", "n_positions", "max_target_positions")
    lengths = [value for name in names if isinstance(value := getattr(text, name, None), int) and value > 0]
    return {"vocabulary_size": getattr(text, "vocab_size", None) or None, "max_positions": next(iter(lengths), None)}


def _identity(
    reference: ModelReference,
    recipe: Recipe,
    options: RunOptions,
    batch_size: int,
    calibration: ModelInputs,
    device: torch.device,
    compute: torch.dtype,
    calibrating: torch.dtype,
) -> dict[str, Any]:
    """What makes two runs the same run: everything the compressed bytes depend on."""
    return {
        "whit": __version__,
        "model": reference.identity,
        "method": recipe.to_json(),
        "calibration": calibration.provenance.get("sha256"),
        "samples": len(calibration.batches),
        "sequence_length": options.sequence_length,
        "embedding_bits": options.embedding_bits,
        "true_sequential": options.true_sequential,
        "skip": list(options.skip),
        "seed": options.seed,
        "batch_size": batch_size,
        # Sums are split among threads, and devices round differently: neither may change in the middle of a run.
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads() if device.type == "cpu" else 0,
        "dtype": str(compute).removeprefix("torch."),
        **({"calibration_dtype": str(calibrating).removeprefix("torch.")} if calibrating != compute else {}),
        # Compiled and plain loops agree up to rounding.
        "compiled": device.type == "cpu" and numba_works(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
