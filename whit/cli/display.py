"""How a run is shown while it happens: a progress bar, plain lines, JSON lines, or nothing. All are `Listener`s."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from whit.cli.tables import plan_view, result_view
from whit.pipeline.events import Listener, Plan
from whit.report.figures import format_number, format_seconds
from whit.report.record import LayerRecord, Result

PLAIN_WIDTH = 110


class Display(Listener):
    """Shows nothing (`--quiet`); the other displays override what they show. Used as a context manager around a run."""

    def __init__(self) -> None:
        self.plan_seen = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close what is still open; called on errors as well."""

    def planned(self, plan: Plan) -> None:
        """Remember that the plan was shown, so that a dry run does not show it again."""
        self.plan_seen = True

    def finished(self, result: Result, directory: Path) -> None:
        """The run is done and its files are written."""

    def show(self, renderable: RenderableType, data: Any) -> None:
        """Show the answer of a command that has no progress: for people, or as JSON."""


class PlainDisplay(Display):
    """One line per event, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console
        self._started = 0.0
        self._done_before = 0
        self._errors: list[float] = []
        self._notes: set[str] = set()

    def planned(self, plan: Plan) -> None:
        """Print the plan."""
        super().planned(plan)
        fresh = [note for note in plan.notes if note not in self._notes]
        self.console.print(plan_view(dataclasses.replace(plan, notes=fresh)))
        self._done_before = plan.blocks_done

    def phase(self, name: str, total: int) -> None:
        """Announce a phase."""
        if name == "compression" and not self._started:
            self._started = time.perf_counter()
        self._line(f"{name}: {total} steps")

    def layer(self, record: LayerRecord) -> None:
        """Name, bits and error."""
        self._errors.append(record.error)
        self._line(f"  {record.name}: {record.stored_bits:.3f} bits, error {format_number(record.error)}")

    def block(self, index: int, total: int, name: str) -> None:
        """Block, mean error, time left."""
        mean = sum(self._errors) / max(len(self._errors), 1)
        self._errors.clear()
        left = ""
        fresh = index + 1 - self._done_before
        if fresh > 0 and index + 1 < total:
            seconds = (time.perf_counter() - self._started) / fresh * (total - index - 1)
            left = f", about {format_seconds(seconds)} left"
        self._line(f"block {index + 1}/{total} {name}: mean error {format_number(mean)}{left}")

    def note(self, message: str) -> None:
        """Print the note."""
        self._notes.add(message)
        self._line(f"note: {message}")

    def finished(self, result: Result, directory: Path) -> None:
        """The table before/after, and where to look."""
        self.console.print()
        self.console.print(result_view(result))
        self._line(f"written to {directory} (open report.html; result.json holds every number)")

    def show(self, renderable: RenderableType, data: Any) -> None:
        """Print what is for people."""
        self.console.print(renderable)

    def _line(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class TerminalDisplay(PlainDisplay):
    """A progress bar with block, layer, error and the time left."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}", style="dim"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None
        self._block = ""

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Remove the bar."""
        self._progress.stop()

    def planned(self, plan: Plan) -> None:
        """Print the plan, then start the bar."""
        super().planned(plan)
        self._progress.start()

    def phase(self, name: str, total: int) -> None:
        """A new bar in place of the last."""
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(name, total=total, detail="")
        self._progress.start()

    def step(self, description: str) -> None:
        """Advance."""
        self._advance(escape(description))

    def layer(self, record: LayerRecord) -> None:
        """Advance, and show which layer it was."""
        local = record.name.removeprefix(record.block + ".") if record.block else record.name
        where = f"{record.block} " if record.block else ""
        self._advance(escape(f"{where}{local} error {format_number(record.error)}"))

    def block(self, index: int, total: int, name: str) -> None:
        """The block number stands in front of the bar."""
        if self._task is not None:
            self._progress.update(self._task, description=f"compression, block {index + 1}/{total}")

    def finished(self, result: Result, directory: Path) -> None:
        """Take the bar away, then the table."""
        self._progress.stop()
        super().finished(result, directory)

    def _advance(self, detail: str) -> None:
        if self._task is not None:
            self._progress.update(self._task, advance=1, detail=detail)


class JsonDisplay(Display):
    """One JSON value per line on standard output, and nothing else there."""

    def planned(self, plan: Plan) -> None:
        """`{"event": "plan", ...}`."""
        super().planned(plan)
        self._write("plan", dataclasses.asdict(plan))

    def phase(self, name: str, total: int) -> None:
        """`{"event": "phase", "name", "total"}`."""
        self._write("phase", {"name": name, "total": total})

    def layer(self, record: LayerRecord) -> None:
        """`{"event": "layer", ...}`."""
        self._write("layer", {**dataclasses.asdict(record), "stored_bits": record.stored_bits})

    def block(self, index: int, total: int, name: str) -> None:
        """`{"event": "block", "index", "total", "name"}`."""
        self._write("block", {"index": index, "total": total, "name": name})

    def note(self, message: str) -> None:
        """`{"event": "note", "message"}`."""
        self._write("note", {"message": message})

    def finished(self, result: Result, directory: Path) -> None:
        """`{"event": "result", "directory", ...}`."""
        self._write("result", {"directory": str(directory), **result.to_json()})

    def show(self, renderable: RenderableType, data: Any) -> None:
        """One line of JSON."""
        sys.stdout.write(json.dumps(data, default=str) + "\n")
        sys.stdout.flush()

    def _write(self, event: str, fields: dict[str, Any]) -> None:
        self.show("", {"event": event, **fields})


def make_display(*, as_json: bool, quiet: bool) -> Display:
    """The display for these flags and this standard output."""
    if as_json:
        return JsonDisplay()
    if quiet:
        return Display()
    console = Console()
    if console.is_terminal:
        return TerminalDisplay(console)
    return PlainDisplay(Console(width=PLAIN_WIDTH))
