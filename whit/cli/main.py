"""Entry point: parse, run, and turn every ending into an exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

import typer

from whit.cli.commands import build
from whit.cli.engine import Engine, default_engine
from whit.cli.failures import BROKEN_PIPE, report_failure
from whit.cli.options import RECIPE, requested_method, requested_recipe


def main(argv: Sequence[str] | None = None, engine: Engine | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; None takes those of the process.
        engine: stands in for `whit.api`.

    Returns:
        the exit code (docs/cli.md lists them).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    try:
        outcome = typer.main.get_command(build(arguments)).main(arguments, prog_name="whit", standalone_mode=False)
        if not callable(outcome):
            return int(outcome or 0)
        outcome(lambda: engine if engine is not None else default_engine(debug))
        sys.stdout.flush()
        return 0
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        code = report_failure(error, _method(arguments))
        if code == BROKEN_PIPE:  # nobody reads on: keep Python from complaining again when it closes the stream
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return code


def _method(arguments: Sequence[str]) -> str | None:
    if "compress" not in arguments:
        return None
    return RECIPE if requested_recipe(arguments) else requested_method(arguments)
