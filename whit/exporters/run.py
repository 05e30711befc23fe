"""`whit export`: check the output, plan, write beside the place, move into place."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from whit.errors import ExportError, MissingDependencyError, OutputError
from whit.exporters.base import CannotHoldError, Target, available_targets, make_target
from whit.exporters.source import CompressedModel
from whit.models.write import sync_folder
from whit.pipeline.journal import check_directory
from whit.pipeline.outcome import saved_bytes
from whit.report.record import ExportRecord


def export(directory: str | Path, target: str, output: str | Path, *, prefer: str | None = None) -> ExportRecord:
    """Write a compressed model in the format of another tool, exactly: nothing is quantised again.

    Args:
        directory: written by `whit.compress`.
        target: one of `available_targets()`.
        output: directory that does not exist or is empty; for "gguf" also the name of a file that does not exist.
        prefer: for "gguf" a block type to take where it is exact, even if a smaller one is ("TQ2_0" decodes faster than
            "TQ1_0").

    Returns:
        what was written, and remarks.

    Raises:
        KnobError: no such target or type. ModelError: not a compressed directory, or damaged.
        ExportError: the target cannot represent a layer; names it, its format and the targets that can.
        OutputError: the output exists. MissingDependencyError: a package the target writes with is missing.
    """
    chosen = make_target(target, prefer)
    model = CompressedModel(directory)
    place = Path(output)
    check_output(place, chosen)
    try:
        plan = chosen.plan(model)
        with _written_whole(place, chosen) as path:
            written = chosen.write(model, plan, path)
    except CannotHoldError as error:
        raise _refusal(model, chosen, error) from error
    return ExportRecord(
        chosen.name, str(place), written.stored, saved_bytes(model.directory), written.bytes, written.notes
    )


def check_output(output: Path, target: Target) -> None:
    """Refuse an output that holds something: the rules of `whit compress`, for a directory or a single file.

    Raises:
        OutputError: says what is there.
    """
    if not _is_file(output, target):
        check_directory(output, {"export": target.name})
        return
    if output.exists():
        raise OutputError(f"output {str(output)!r} exists: choose another name with -o, or remove it")
    file = next((path for path in output.parents if path.is_file()), None)
    if file is not None:
        raise OutputError(f"output {str(output)!r} lies under {str(file)!r}, which is a file: choose another with -o")


def _is_file(output: Path, target: Target) -> bool:
    return bool(target.suffix) and output.suffix.lower() == target.suffix


@contextmanager
def _written_whole(output: Path, target: Target) -> Iterator[Path]:
    """A directory (or file) to write to, which appears under its name when complete, or not at all."""
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.parent / f".{output.name}.{os.getpid()}.partial"
    shutil.rmtree(temporary, ignore_errors=True)  # a process of this number that was killed
    temporary.mkdir()
    try:
        single = temporary / f"model{target.suffix}"
        yield single if target.suffix else temporary
        moved = single if _is_file(output, target) else temporary
        if moved is single and output.exists():  # rename would replace it
            raise OutputError(f"output {str(output)!r} appeared while whit was exporting: choose another name with -o")
        try:
            moved.rename(output)
        except OSError as error:
            raise OutputError(f"output {str(output)!r} cannot be put in place ({error.strerror}): use -o") from error
        sync_folder(output.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _refusal(model: CompressedModel, target: Target, error: CannotHoldError) -> ExportError:
    able = [name for name, cls in available_targets().items() if name != target.name and _can_hold(cls(), model)]
    if able:
        remedy = f"{' and '.join(able)} can: --to {able[0]}"
    else:
        remedy = "no other target can, so use the directory as it is (import whit, then from_pretrained)"
    subject = str(model.layers[error.layer]) if error.layer in model.layers else f"the model {str(model.directory)!r}"
    return ExportError(f"{target.name} cannot hold {subject}: {error.reason}; {remedy}")


def _can_hold(target: Target, model: CompressedModel) -> bool:
    try:
        target.plan(model)
    except (CannotHoldError, MissingDependencyError):
        return False
    return True
