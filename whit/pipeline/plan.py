"""The plan: what will be done, how large the result, how much memory and how long the wait, before any work."""

from __future__ import annotations

from whit.models.write import safetensors_bytes
from whit.pipeline.assign import AssignedLayer
from whit.pipeline.estimate import estimate_minutes
from whit.pipeline.events import Plan, PlannedLayer
from whit.pipeline.finish import saved_config, saved_specs
from whit.pipeline.journal import finished_units
from whit.pipeline.memory import available_bytes, expected_memory, gradient_sizes, original_fits
from whit.pipeline.prepare import Job
from whit.pipeline.survey import surveying_methods

LEAK_NOTE = "the calibration text is part of the evaluation text (--allow-leak): the figures flatter the method"


def make_plan(job: Job, processes: int = 1) -> Plan:
    """The plan of a prepared job, from exact layouts and a quick probe; memory is that of one of its processes."""
    blocks = [block for stack in job.stacks for block in stack.blocks]
    layers, sizes = [], {}
    for layer in job.assignment.layers.values():
        description, size = _layout(layer)
        layers.append(
            PlannedLayer(layer.name, layer.block, layer.rows, layer.columns, layer.method.name, description, size)
        )
        sizes[layer.name] = size
    counted = job.assignment.main()
    packed_bytes = sum(sizes[layer.name] for layer in counted)
    packed_parameters = sum(layer.rows * layer.columns for layer in counted)
    done = finished_units(job.output)
    file_bytes = _file_bytes(job)
    available = available_bytes(job.device)
    memory = expected_memory(job, file_bytes, available, processes)
    parameters = sum(parameter.numel() for parameter in job.skeleton.parameters())
    models = 2 if original_fits(parameters * job.compute_dtype.itemsize, available) else 1
    minutes = estimate_minutes(
        job.assignment,
        tokens=job.calibration.tokens,
        block_parameters=sum(p.numel() for block in blocks for p in job.skeleton.get_submodule(block).parameters()),
        evaluated=0 if job.evaluation is None else models * job.evaluation.tokens * parameters,
        device=job.device,
        compute_dtype=job.compute_dtype,
        calibration_dtype=job.calibration_dtype,
        left=1 - len(done & set(blocks)) / len(blocks),
    )
    return Plan(
        model=job.reference.label,
        architecture=job.reference.model_class.__name__,
        layers=layers,
        untouched=job.assignment.untouched,
        parameters=parameters,
        compressed_bits=packed_bytes * 8 / packed_parameters,
        file_bytes=file_bytes,
        original_file_bytes=job.reference.source.stored_bytes,
        original_dense_bytes=job.reference.dense_bytes,
        host_bytes=memory.host,
        device_bytes=memory.device,
        minutes=minutes,
        blocks=len(blocks),
        blocks_done=len(done & set(blocks)),
        calibration=job.calibration.provenance,
        notes=[
            *job.reference.notes,
            *_method_notes(job),
            *([LEAK_NOTE] if job.leak else []),
            *_survey_notes(job),
        ],
        working_bytes=gradient_sizes(job).disk,
    )


def _method_notes(job: Job) -> list[str]:
    """What methods say about sizes that are not known yet, each once."""
    notes = (layer.method.plan_note() for layer in job.assignment.layers.values())
    return list(dict.fromkeys(note for note in notes if note is not None))


def _survey_notes(job: Job) -> list[str]:
    names = dict.fromkeys(method.name for method in surveying_methods(job.assignment))
    return [
        f"a survey divides the budget of {name} among the blocks before they are compressed: sizes here are those of "
        "an even division"
        for name in names
    ]


def _layout(layer: AssignedLayer) -> tuple[str, int]:
    """Short description of the layout a layer gets, and its stored bytes."""
    layout = layer.method.format(layer.rows, layer.columns)
    fields = {key: value for key, value in layout.to_json().items() if key != "format"}
    return f"{layout.name}({', '.join(f'{k}={v}' for k, v in fields.items())})", layout.bytes(layer.rows, layer.columns)


def _file_bytes(job: Job) -> int:
    """Weight file and config as they will be written (the index of a sharded model left out)."""
    formats = {name: layer.method.format(layer.rows, layer.columns) for name, layer in job.assignment.layers.items()}
    config = saved_config(job.reference, job.assignment, formats, job.dense_dtype)
    weights = safetensors_bytes(saved_specs(job.skeleton, job.assignment, job.dense_dtype))
    return weights + len(config.to_json_string(use_diff=True).encode())
