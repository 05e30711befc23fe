"""What a run found, as a `Result`; and whether a directory already holds the result of the very same run."""

from __future__ import annotations

import dataclasses
import json
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

from whit import __version__
from whit.errors import OutputError
from whit.pipeline.journal import Journal
from whit.pipeline.memory import peak_device_bytes, peak_host_bytes
from whit.pipeline.passes import recorded_allocation
from whit.pipeline.prepare import Job
from whit.report.record import RESULT_FILE, EvaluationRecord, Result, SizeRecord


def completed_result(job: Job) -> Result | None:
    """The result in the output directory if this very run made it and its files are all there; else None.

    Raises:
        OutputError: the same compression is there, but measured on other data than asked for now.
    """
    path = job.output / RESULT_FILE
    if not path.is_file():
        return None
    try:
        result = Result.load(path)
    except (ValueError, TypeError, KeyError):
        return None
    if result.run.get("identity") != json.loads(json.dumps(job.identity)):
        return None
    if saved_bytes(job.output) != result.size.file_bytes:
        return None
    if job.evaluation is not None and _measured(result) != _asked(job):
        raise OutputError(
            f"output {str(job.output)!r} holds this compressed model, but measured on other data or not at all: "
            f"measure it with whit evaluate {str(job.output)!r}, or choose another directory with -o"
        )
    return result


def _measured(result: Result) -> dict[str, Any] | None:
    return None if result.compressed is None else _fingerprint(result.compressed.data)


def _asked(job: Job) -> dict[str, Any] | None:
    return None if job.evaluation is None else _fingerprint(job.evaluation.provenance)


def _fingerprint(provenance: dict[str, Any]) -> dict[str, Any]:
    return {key: provenance.get(key) for key in ("sha256", "sequences", "sequence_length")}


def saved_bytes(directory: Path) -> int:
    """Bytes of the weight files and the config in a directory."""
    files = [*directory.glob("model*.safetensors"), directory / "model.safetensors.index.json"]
    return sum(path.stat().st_size for path in [*files, directory / "config.json"] if path.is_file())


def _division_notes(allocation: list[dict[str, Any]]) -> list[str]:
    return [
        f"A survey of the dense model divided the budget of {item['method']['method']} among {len(item['blocks'])} "
        "blocks (run.allocation in result.json)"
        for item in allocation
    ]


def make_result(
    job: Job,
    journal: Journal,
    original: EvaluationRecord | None,
    compressed: EvaluationRecord | None,
    timings: dict[str, float],
) -> Result:
    """Everything a finished run found. Layers come in the order of the model, however often it was interrupted."""
    records = {record.name: record for layers in journal.units.values() for record in layers}
    ordered = [records[name] for name in sorted(records, key=list(job.assignment.layers).index)]
    inside = [record for record in ordered if record.block] or ordered
    place = job.device
    allocation = recorded_allocation(journal.folder, job.assignment)
    return Result(
        model={
            "label": job.reference.label,
            "architecture": job.reference.model_class.__name__,
            "identity": job.reference.identity,
            "license": job.reference.license,
            "notes": job.reference.notes,
        },
        run={
            "identity": job.identity,
            "method": job.recipe.to_json(),
            **({"allocation": allocation, "notes": _division_notes(allocation)} if allocation else {}),
            "options": {**dataclasses.asdict(job.options), "skip": list(job.options.skip)},
            "seed": job.options.seed,
            "calibration": job.calibration.provenance,
            "device": str(place),
            "device_name": torch.cuda.get_device_name(place) if place.type == "cuda" else platform.processor(),
            "compute_dtype": str(job.compute_dtype).removeprefix("torch."),
            "calibration_dtype": str(job.calibration_dtype).removeprefix("torch."),
            "dense_dtype": str(job.dense_dtype).removeprefix("torch."),
            "versions": {
                "whit": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
        },
        layers=ordered,
        untouched=job.assignment.untouched,
        size=SizeRecord(
            parameters=sum(parameter.numel() for parameter in job.skeleton.parameters()),
            compressed_parameters=sum(record.parameters for record in inside),
            compressed_bytes=sum(record.stored_bytes for record in inside),
            file_bytes=saved_bytes(job.output),
            original_file_bytes=job.reference.source.stored_bytes,
            original_dense_bytes=job.reference.dense_bytes,
        ),
        original=original,
        compressed=compressed,
        timings=timings,
        peak_host_bytes=peak_host_bytes(),
        peak_device_bytes=peak_device_bytes(place),
    )
