"""Errors a user can act on: one line that quotes the input and names the remedy, with an exit code of its own.

The command line prints these without a traceback (`--debug` shows it); Python code catches `WhitError` or a subclass.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class WhitError(Exception):
    """Base of every error whit raises on purpose. `exit_code` is what the command line returns."""

    exit_code = 1


class KnobError(WhitError, ValueError):
    """A method knob or option is unknown, of the wrong type or out of range."""

    exit_code = 2


class ModelError(WhitError):
    """The model cannot be read, is of an unsupported kind, or holds values that cannot be compressed."""

    exit_code = 3


class DataError(WhitError):
    """Calibration or evaluation data is missing, unreadable, too short or leaks into the evaluation."""

    exit_code = 4


class OutputError(WhitError):
    """The output directory holds something else, or the journal in it belongs to another run."""

    exit_code = 5


class ResourceError(WhitError):
    """Not enough disk or memory; the message says how much is needed and how much there is."""

    exit_code = 6


class MissingDependencyError(WhitError, ImportError):
    """An optional package is missing; the message holds the exact install command."""

    exit_code = 7


class ExportError(WhitError):
    """An export target cannot represent the model; the message names the layer and the targets that can."""

    exit_code = 8


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the known word closest to `word`, or an empty string."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""
