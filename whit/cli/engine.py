"""What the command line needs of the Python API, as a protocol: tests drive the commands with a stand-in."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from whit.kernels.tuning import TunedProduct
from whit.pipeline.events import Listener, Plan
from whit.pipeline.options import RunOptions
from whit.pipeline.recipe import Recipe
from whit.report.record import EvaluationRecord, ExportRecord, Result


class Engine(Protocol):
    """The verbs of `whit.api`."""

    def compress(
        self,
        model: str | None = None,
        method: str | Recipe = "billm",
        output: Path | None = None,
        *,
        options: RunOptions | None = None,
        listener: Listener | None = None,
        dry_run: bool = False,
        **knobs: Any,
    ) -> Result | Plan:
        """Compress a model into a directory, or only plan it."""
        ...

    def evaluate(
        self,
        model: str,
        *,
        against: str | None = None,
        options: RunOptions | None = None,
        tasks: Sequence[str] | None = None,
        limit: int | None = None,
    ) -> EvaluationRecord:
        """Measure a model, beside another if given."""
        ...

    def export(self, directory: Path, target: str, output: Path, *, prefer: str | None = None) -> ExportRecord:
        """Write a compressed model in the format of another tool."""
        ...

    def generate(
        self,
        directory: str,
        prompt: str,
        *,
        new_tokens: int = 64,
        dtype: torch.dtype | None = None,
        device: str = "auto",
    ) -> str:
        """Continue a prompt."""
        ...

    def tune(
        self,
        directory: Path,
        *,
        vectors: Sequence[int] = (1, 16),
        dtype: torch.dtype | None = None,
        device: str = "auto",
    ) -> Iterator[TunedProduct]:
        """Find and keep the fastest launches of a model's products."""
        ...


def default_engine(debug: bool = False) -> Engine:
    """The real API; the libraries under it keep quiet (their bars would tear ours) unless `debug` is on."""
    if not debug:
        logging = importlib.import_module("transformers").utils.logging
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    return cast(Engine, importlib.import_module("whit.api"))
