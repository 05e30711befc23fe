"""The progress bar on a terminal: what stays on the screen, and what is cleaned up."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from tests.report.example import example_plan, example_result
from whit.cli.display import TerminalDisplay


def play(display: TerminalDisplay, fail: bool = False) -> None:
    result = example_result(2)
    with display:
        display.planned(example_plan(2))
        display.phase("calibration", 1)
        display.step("batch [1/1]")
        display.phase("compression", len(result.layers))
        for layer in result.layers:
            display.layer(layer)
        display.block(0, 2, "model.layers.0")
        if fail:
            raise RuntimeError("stop")
        display.finished(result, Path("out"))


def test_terminal_shows_plan_progress_and_table() -> None:
    screen = io.StringIO()
    play(TerminalDisplay(Console(file=screen, force_terminal=True, width=160)))
    text = screen.getvalue()
    parts = ("Plan", "compression", "block 1/2", "model.embed_tokens error", "131.4 [113.9, 152.6]", "written to out")
    for part in parts:
        assert part in text
    assert text.count("\x1b[?25h") >= 1  # the cursor is shown again


def test_terminal_is_restored_after_a_failure() -> None:
    screen = io.StringIO()
    with pytest.raises(RuntimeError, match="stop"):
        play(TerminalDisplay(Console(file=screen, force_terminal=True, width=160)), fail=True)
    text = screen.getvalue()
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l")
