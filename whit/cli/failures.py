"""Every failure as one line on standard error and an exit code with a meaning (the table is in docs/cli.md)."""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence

import typer

from whit.cli.options import explain_unknown
from whit.errors import MissingDependencyError, ResourceError, WhitError

UNEXPECTED = 1
USAGE = 2
INTERRUPTED = 130
BROKEN_PIPE = 141


def report_failure(error: BaseException, method: str | None) -> int:
    """Print one line about the error and return the exit code of the process.

    Args:
        error: what ended the command.
        method: the method that a `compress` command asked for, for advice about its knobs.
    """
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        again = ": run the same command again to continue" if method is not None else ""
        print(f"interrupted{again}", file=sys.stderr)
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):
        return BROKEN_PIPE
    code, message = _explain(error, method)
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return code


def _explain(error: BaseException, method: str | None) -> tuple[int, str]:
    if isinstance(error, WhitError):
        return error.exit_code, str(error)
    if hasattr(error, "format_message"):  # typer's own errors; their base class has no public name
        return USAGE, _usage(error, method)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {error.filename!r}" if error.filename else ""
        return ResourceError.exit_code, f"no space left on the disk{where}: free some and run the same command again"
    if _out_of_memory(error):
        advice = "try fewer --samples, a shorter --sequence-length or --batch-size 1"
        return ResourceError.exit_code, f"out of memory ({_first_line(error)}): {advice}"
    if isinstance(error, ImportError) and not isinstance(error, WhitError) and error.name:
        missing = error.name.partition(".")[0]
        if missing != "whit":
            return MissingDependencyError.exit_code, f"package {missing!r} cannot be imported ({_first_line(error)})"
    if isinstance(error, OSError) and error.filename:
        return UNEXPECTED, f"{error.strerror or type(error).__name__}: {str(error.filename)!r} (--debug shows where)"
    return UNEXPECTED, f"{type(error).__name__}: {_first_line(error)} (run again with --debug for the traceback)"


def _usage(error: BaseException, method: str | None) -> str:
    option = getattr(error, "option_name", None)
    if option is not None and hasattr(error, "possibilities"):
        return explain_unknown(str(option), _known_options(error), method)
    text: str = error.format_message()  # type: ignore[attr-defined]
    return text[:1].lower() + text[1:].rstrip(".")


def _known_options(error: BaseException) -> Sequence[str]:
    context = getattr(error, "ctx", None)
    if context is None:
        return []
    return [name for item in context.command.params for name in (*item.opts, *item.secondary_opts)]


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
