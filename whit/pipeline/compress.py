"""A whole run as a story: resolve, plan, compress block by block, write, reload, measure, report."""

from __future__ import annotations

import dataclasses
import json
import platform
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from torch import nn

from whit import __version__
from whit.data.inputs import ModelInputs
from whit.data.leak import check_leak
from whit.data.load import load_calibration, load_evaluation
from whit.errors import KnobError, ResourceError
from whit.methods.base import Method, make_method
from whit.models.resolve import ModelReference, resolve_model
from whit.models.skeleton import build_skeleton
from whit.models.stacks import Stack, find_stacks
from whit.pipeline import plan as planning
from whit.pipeline.assign import Assignment, assign
from whit.pipeline.engine import Run, compress_units
from whit.pipeline.events import Listener, Plan, PlannedLayer
from whit.pipeline.finish import write_directory
from whit.pipeline.journal import RESULT_FILE, Journal, check_directory
from whit.pipeline.memory import peak_device_bytes, peak_host_bytes
from whit.pipeline.options import RunOptions
from whit.report.record import EvaluationRecord, Result, SizeRecord
from whit.report.write import write_reports

DEFAULT_SEQUENCE = 512
DEFAULT_WINDOW = 2048


@dataclass
class Job:
    """A run that was prepared and checked, but has not done any work yet."""

    reference: ModelReference
    method: Method
    options: RunOptions
    output: Path
    device: torch.device
    compute_dtype: torch.dtype
    dense_dtype: torch.dtype
    skeleton: nn.Module
    stacks: list[Stack]
    assignment: Assignment
    calibration: ModelInputs
    evaluation: ModelInputs | None
    leak: bool
    identity: dict[str, Any]


def compress(
    model: str | Path | None = None,
    method: str | Method = "billm",
    output: str | Path | None = None,
    *,
    options: RunOptions | None = None,
    listener: Listener | None = None,
    dry_run: bool = False,
    **knobs: Any,
) -> Result | Plan:
    """Compress a pretrained model into `output` and measure what is left.

    Args:
        model: directory, hub id, GGUF file, catalogue name, or None for the default model.
        method: name (with `knobs`) or a method value.
        output: directory to create; default `whit-output/<model>-<method>`.
        options: how to run. listener: told about progress.
        dry_run: stop after the plan.

    Returns:
        the result, also written to `output`; or the plan if `dry_run`.

    Raises:
        WhitError: a subclass per kind of problem, before any work where it can be known before.
    """
    listener = listener or Listener()
    started = time.perf_counter()
    value = _method(method, knobs)
    job = prepare(model, value, output, options or RunOptions(), listener)
    finished = completed_result(job.output, job.identity)
    if finished is not None and not dry_run:
        listener.note(f"{str(job.output)!r} already holds the finished result of this very command: nothing to do")
        return finished
    check_directory(job.output, job.identity)
    plan = make_plan(job)
    listener.planned(plan)
    if dry_run:
        return plan
    check_disk(job.output, plan)
    journal = Journal(job.output, job.identity)
    try:
        timings = execute(job, journal, listener)
        sizes = _sizes(job, journal)
        mark = time.perf_counter()
        original, compressed = _evaluate(job, listener)
        timings["evaluation"] = time.perf_counter() - mark
        timings["total"] = time.perf_counter() - started
        result = _result(job, journal, sizes, original, compressed, timings)
        write_reports(job.output, result)
        journal.remove()
    finally:
        journal.close()
    return result


def prepare(
    model: str | Path | None, method: Method, output: str | Path | None, options: RunOptions, listener: Listener
) -> Job:
    """Resolve the model, choose methods for its layers and read the data: all that can fail before work starts."""
    device = choose_device(options.device)
    reference = resolve_model(model)
    for note in reference.notes:
        listener.note(note)
    compute = compute_dtype(options.dtype, reference.dtype, device)
    skeleton = build_skeleton(reference, compute)
    stacks = find_stacks(skeleton)
    assignment = assign(skeleton, stacks, method, options, reference.dtype)
    limits = data_limits(reference.config)
    tokenizer = reference.load_tokenizer()
    calibration = load_calibration(
        options.calibration,
        tokenizer,
        samples=options.samples,
        sequence_length=options.sequence_length or min(DEFAULT_SEQUENCE, limits["max_positions"] or DEFAULT_SEQUENCE),
        seed=options.seed,
        **limits,
    )
    evaluation, leak = None, False
    if options.evaluate:
        evaluation = load_evaluation(
            options.evaluation,
            tokenizer,
            windows=options.evaluation_windows,
            window=options.window or min(DEFAULT_WINDOW, limits["max_positions"] or DEFAULT_WINDOW),
            **limits,
        )
        leak = check_leak(calibration.provenance, evaluation.provenance, allow=options.allow_leak)
    directory = Path(output) if output is not None else default_output(reference.label, method.name)
    identity = _identity(reference, method, options, calibration, device, compute)
    return Job(
        reference, method, options, directory, device, compute, reference.dtype, skeleton, stacks, assignment,
        calibration, evaluation, leak, identity,
    )  # fmt: skip


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
        torch.empty(1, device=device)
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


def make_plan(job: Job) -> Plan:
    """The plan of a prepared job, from exact layouts and a quick probe."""
    blocks = [block for stack in job.stacks for block in stack.blocks]
    layers, packed_bytes, packed_parameters = [], 0, 0
    for layer in job.assignment.layers.values():
        description, size = planning.summarise_layer(layer)
        layers.append(
            PlannedLayer(layer.name, layer.block, layer.rows, layer.columns, layer.method.name, description, size)
        )
        if layer.block:
            packed_bytes, packed_parameters = packed_bytes + size, packed_parameters + layer.rows * layer.columns
    width = max(layer.columns for layer in job.assignment.layers.values() if layer.block)
    peak = planning.expected_memory(
        job.skeleton, blocks, job.assignment,
        tokens=job.calibration.tokens, width=width, compute_dtype=job.compute_dtype,
    )  # fmt: skip
    on_cpu = job.device.type == "cpu"
    file_bytes = planning.expected_file_bytes(job.skeleton, job.assignment, job.dense_dtype)
    done = _units_done(job)
    left = 1 - done / (len(blocks) + 1)
    return Plan(
        model=job.reference.label,
        architecture=job.reference.model_class.__name__,
        layers=layers,
        untouched=job.assignment.untouched,
        parameters=planning.count_parameters(job.skeleton),
        compressed_bits=packed_bytes * 8 / packed_parameters,
        file_bytes=file_bytes,
        original_file_bytes=job.reference.source.stored_bytes,
        original_dense_bytes=job.reference.dense_bytes,
        host_bytes=planning.RUNTIME_BYTES + (peak if on_cpu else max(1 << 30, peak // 4)),
        device_bytes=0 if on_cpu else peak,
        minutes=left
        * planning.estimate_minutes(
            job.assignment,
            tokens=job.calibration.tokens,
            block_parameters=sum(p.numel() for block in blocks for p in job.skeleton.get_submodule(block).parameters()),
            device=job.device,
            compute_dtype=job.compute_dtype,
        ),
        blocks=len(blocks),
        blocks_done=done,
        calibration=job.calibration.provenance,
        notes=[*job.reference.notes, *([LEAK_NOTE] if job.leak else [])],
    )


LEAK_NOTE = "the calibration text is part of the evaluation text (--allow-leak): the figures flatter the method"


def check_disk(output: Path, plan: Plan) -> None:
    """Refuse before work if the disk cannot hold shards and final files, or memory is clearly too small.

    Raises:
        ResourceError: says how much is needed and how much there is.
    """
    place = output
    while not place.exists():
        place = place.parent
    free, needed = shutil.disk_usage(place).free, int(2.1 * plan.file_bytes) + (8 << 20)
    if free < needed:
        raise ResourceError(
            f"{str(output)!r} needs {needed / 1e6:,.0f} MB of disk (shards and final file), {free / 1e6:,.0f} MB are "
            "free: free some, or choose another disk with -o"
        )
    available = psutil.virtual_memory().available + psutil.Process().memory_info().rss
    if available < 0.8 * plan.host_bytes:
        raise ResourceError(
            f"the run needs about {plan.host_bytes / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are available: "
            "lower --samples or --sequence-length, or use a larger machine"
        )


def execute(job: Job, journal: Journal, listener: Listener) -> dict[str, float]:
    """Compress what is not in the journal yet and write the loadable directory; returns seconds by phase."""
    start = time.perf_counter()
    units = {"", *(block for stack in job.stacks for block in stack.blocks)}
    if not units <= set(journal.units):
        compress_units(
            Run(
                model=job.skeleton,
                source=job.reference.source,
                stacks=job.stacks,
                assignment=job.assignment,
                journal=journal,
                listener=listener,
                batches=merge_batches(job.calibration.batches, job.options.batch_size),
                dense_dtype=job.dense_dtype,
                compute_dtype=job.compute_dtype,
                device=job.device,
                true_sequential=job.options.true_sequential,
            )
        )
    timings = {"compression": time.perf_counter() - start}
    mark = time.perf_counter()
    listener.phase("saving", 1)
    fresh = build_skeleton(job.reference, job.dense_dtype)
    write_directory(job.output, job.reference, fresh, job.assignment, journal, job.dense_dtype)
    listener.step("model written")
    timings["saving"] = time.perf_counter() - mark
    return timings


def merge_batches(batches: list[dict[str, torch.Tensor]], size: int) -> list[dict[str, torch.Tensor]]:
    """Join neighbouring batches of equal shape until each holds about `size` sequences."""
    out: list[dict[str, torch.Tensor]] = []
    for batch in batches:
        count = len(next(iter(batch.values())))
        if out:
            last = out[-1]
            same = last.keys() == batch.keys() and all(last[k].shape[1:] == v.shape[1:] for k, v in batch.items())
            if same and len(next(iter(last.values()))) + count <= size:
                out[-1] = {key: torch.cat([last[key], value]) for key, value in batch.items()}
                continue
        out.append(batch)
    return out


def completed_result(output: Path, identity: dict[str, Any]) -> Result | None:
    """The result in `output` if it was made by the very same run."""
    path = output / RESULT_FILE
    if not path.is_file():
        return None
    try:
        result = Result.load(path)
    except (ValueError, TypeError, KeyError):
        return None
    return result if result.run.get("identity") == json.loads(json.dumps(identity)) else None


def data_limits(config: Any) -> dict[str, int]:
    """Vocabulary size and longest sequence of a model, 0 where the config does not say."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = ("max_position_embeddings", "n_positions", "max_target_positions")
    lengths = [value for name in names if isinstance(value := getattr(text, name, None), int) and value > 0]
    return {"vocabulary_size": int(getattr(text, "vocab_size", 0) or 0), "max_positions": lengths[0] if lengths else 0}


def _method(method: str | Method, knobs: dict[str, Any]) -> Method:
    if isinstance(method, str):
        return make_method(method, knobs)
    if knobs:
        raise KnobError(f"knobs {sorted(knobs)} were given beside a method value: put them into the value")
    return method


def _identity(
    reference: ModelReference,
    method: Method,
    options: RunOptions,
    calibration: ModelInputs,
    device: torch.device,
    compute: torch.dtype,
) -> dict[str, Any]:
    """What makes two runs the same run: everything the compressed bytes depend on."""
    return {
        "whit": __version__,
        "model": reference.identity,
        "method": method.to_json(),
        "calibration": calibration.provenance.get("sha256"),
        "samples": len(calibration.batches),
        "sequence_length": options.sequence_length,
        "embedding_bits": options.embedding_bits,
        "true_sequential": options.true_sequential,
        "skip": list(options.skip),
        "seed": options.seed,
        "batch_size": options.batch_size,
        "device": device.type,
        "dtype": str(compute).removeprefix("torch."),
        "torch": torch.__version__,
    }


def _units_done(job: Job) -> int:
    path = job.output / ".whit-run" / "journal.jsonl"
    return len(path.read_bytes().splitlines()) if path.is_file() else 0


def _sizes(job: Job, journal: Journal) -> SizeRecord:
    records = [record for layers in journal.units.values() for record in layers if record.block]
    files = [*job.output.glob("model*.safetensors*"), job.output / "config.json"]
    return SizeRecord(
        parameters=planning.count_parameters(job.skeleton),
        compressed_parameters=sum(record.parameters for record in records),
        compressed_bytes=sum(record.stored_bytes for record in records),
        file_bytes=sum(path.stat().st_size for path in files),
        original_file_bytes=job.reference.source.stored_bytes,
        original_dense_bytes=job.reference.dense_bytes,
    )


def _evaluate(job: Job, listener: Listener) -> tuple[EvaluationRecord | None, EvaluationRecord | None]:
    if job.evaluation is None:
        return None, None
    from whit.pipeline.compare import compare

    return compare(job.reference, job.output, job.evaluation, job.device, job.compute_dtype, listener, job.leak)


def _result(
    job: Job,
    journal: Journal,
    sizes: SizeRecord,
    original: EvaluationRecord | None,
    compressed: EvaluationRecord | None,
    timings: dict[str, float],
) -> Result:
    records = [record for layers in journal.units.values() for record in layers]
    timings["blocks"] = sum(journal.seconds.values())
    return Result(
        model={
            "label": job.reference.label,
            "architecture": job.reference.model_class.__name__,
            "identity": job.reference.identity,
            "notes": job.reference.notes,
        },
        run={
            "identity": job.identity,
            "method": job.method.to_json(),
            "options": {**dataclasses.asdict(job.options), "skip": list(job.options.skip)},
            "seed": job.options.seed,
            "calibration": job.calibration.provenance,
            "device": str(job.device),
            "device_name": torch.cuda.get_device_name(job.device)
            if job.device.type == "cuda"
            else platform.processor(),
            "compute_dtype": str(job.compute_dtype).removeprefix("torch."),
            "dense_dtype": str(job.dense_dtype).removeprefix("torch."),
            "versions": {
                "whit": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
        },
        layers=records,
        untouched=job.assignment.untouched,
        size=sizes,
        original=original,
        compressed=compressed,
        timings=timings,
        peak_host_bytes=peak_host_bytes(),
        peak_device_bytes=peak_device_bytes(job.device),
    )
