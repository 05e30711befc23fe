"""A whole run as a story: prepare, plan, compress block by block, write, reload, measure, report."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from whit.errors import ResourceError
from whit.methods.base import Method
from whit.models.skeleton import build_skeleton
from whit.pipeline.checks import check_resources
from whit.pipeline.engine import OUTSIDE, Run, compress_units
from whit.pipeline.events import Listener, Plan
from whit.pipeline.finish import write_directory
from whit.pipeline.journal import WORK_FOLDER, Journal, JournalReader, check_directory
from whit.pipeline.options import RunOptions
from whit.pipeline.outcome import completed_result, make_result
from whit.pipeline.passes import has_passes, run_passes
from whit.pipeline.plan import make_plan
from whit.pipeline.prepare import Job, choose_device, prepare
from whit.pipeline.ranks import ALONE, Ranks, join
from whit.pipeline.recipe import RECIPE_FILE, Recipe, as_recipe
from whit.report.record import EvaluationRecord, Result
from whit.report.write import write_reports


def compress(
    model: str | Path | None = None,
    method: str | Method | Recipe = "billm",
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
        method: name (with `knobs`), a method value, or a recipe of several (`whit.Recipe`).
        output: directory to create; default `whit-output/<model>-<method>`.
        options: how to run. listener: told about progress.
        dry_run: stop after the plan.

    Returns:
        the result, also written to `output`; or the plan if `dry_run`.

    Started by torchrun, all processes work on the model together, the first writes, and all return the result.

    Raises:
        WhitError: a subclass per kind of problem, before any work where it can be known before.
    """
    options = options or RunOptions()
    recipe = as_recipe(method, knobs)
    ranks = join(choose_device(options.device))
    listener = listener if listener is not None and ranks.first else Listener()
    return _compress(model, recipe, output, options, listener, dry_run, ranks)


def _compress(
    model: str | Path | None,
    recipe: Recipe,
    output: str | Path | None,
    options: RunOptions,
    listener: Listener,
    dry_run: bool,
    ranks: Ranks,
) -> Result | Plan:
    started = time.perf_counter()
    with ranks.together():
        job = prepare(model, recipe, output, options)
        finished = completed_result(job) if ranks.first and not dry_run else None  # the others see what it decides
    if ranks.gather(finished is not None)[0]:
        if finished is None:
            return Result.load(job.output / "result.json")
        _clear_leftovers(job)
        listener.note(f"{str(job.output)!r} already holds the finished result of this very command: nothing to do")
        return finished
    with ranks.together():
        check_directory(job.output, job.identity)
        plan = make_plan(job, ranks.count)
        listener.planned(plan)
        if not dry_run:
            check_resources(job.output, plan, _bytes_in(job.output / WORK_FOLDER))
    if dry_run:
        return plan
    if not ranks.first:
        return _help(job, ranks)
    with _full_disk_explained(job.output):
        return _run(job, listener, started, ranks)


def _help(job: Job, ranks: Ranks) -> Result:
    """What every process but the first does: compute, and wait for the result."""
    with ranks.together():
        pass  # the first has opened the journal
    with ranks.telling():
        journal = JournalReader(job.output)
        journal.read()
        ranks.wait()
        compress_blocks(job, journal, Listener(), ranks)
    with ranks.together():
        pass  # the first has written everything
    return Result.load(job.output / "result.json")


def _run(job: Job, listener: Listener, started: float, ranks: Ranks = ALONE) -> Result:
    with ranks.together():
        journal = Journal(job.output, job.identity)
    try:
        with ranks.telling():
            ranks.wait()
            for note in journal.notes:
                listener.note(note)
            timings = compress_blocks(job, journal, listener, ranks)
        with ranks.together():
            return _finish(job, journal, listener, timings, started)
    finally:
        journal.close()


def _finish(job: Job, journal: Journal, listener: Listener, timings: dict[str, float], started: float) -> Result:
    """Write the loadable directory, measure it, report."""
    mark = time.perf_counter()
    listener.phase("saving", 1)
    fresh = build_skeleton(job.reference, job.dense_dtype)
    write_directory(job.output, job.reference, fresh, job.assignment, journal, job.dense_dtype)
    listener.step("model written")
    timings["saving"] = time.perf_counter() - mark
    mark = time.perf_counter()
    original, compressed = _evaluate(job, listener)
    timings["evaluation"] = time.perf_counter() - mark
    timings["total"] = time.perf_counter() - started
    result = make_result(job, journal, original, compressed, timings)
    if job.recipe.plain is None:
        job.recipe.save(job.output / RECIPE_FILE)
    write_reports(job.output, result)
    journal.remove()
    return result


def compress_blocks(job: Job, journal: JournalReader, listener: Listener, ranks: Ranks = ALONE) -> dict[str, float]:
    """Bring what is not in the journal yet into it; returns seconds by phase."""
    timings: dict[str, float] = {}
    start = time.perf_counter()
    units = {OUTSIDE, *(block for stack in job.stacks for block in stack.blocks)}
    if not units <= set(journal.units):
        run = Run(
            model=job.skeleton,
            source=job.reference.source,
            stacks=job.stacks,
            assignment=job.assignment,
            journal=journal,
            listener=listener,
            batches=merge_batches(job.calibration.batches, job.batch_size),
            dense_dtype=job.dense_dtype,
            compute_dtype=job.calibration_dtype,
            device=job.device,
            true_sequential=job.options.true_sequential,
            ranks=ranks,
        )
        if has_passes(job.assignment):
            run = _passes(run)
            timings["passes"] = time.perf_counter() - start
            start = time.perf_counter()
        compress_units(run)
    timings["compression"] = time.perf_counter() - start
    return timings


def _passes(run: Run) -> Run:
    """Passes before the block loop are made by the first process; the others read what it found."""
    with run.ranks.together():
        passed = run_passes(run) if run.ranks.first else run
    return passed if run.ranks.first else run_passes(run)


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


@contextmanager
def _full_disk_explained(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise ResourceError(
            f"{str(output)!r} cannot be written ({error.strerror}): free some space and run the same command again, "
            "finished blocks are kept"
        ) from error


def _clear_leftovers(job: Job) -> None:
    """Finish what a crash between the last report and the end of the run left undone."""
    if (job.output / WORK_FOLDER).exists():
        Journal(job.output, job.identity).remove()


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir()) if folder.is_dir() else 0


def _evaluate(job: Job, listener: Listener) -> tuple[EvaluationRecord | None, EvaluationRecord | None]:
    if job.evaluation is None:
        return None, None
    from whit.pipeline.compare import compare

    return compare(job.reference, job.output, job.evaluation, job.device, job.compute_dtype, listener, job.leak)
