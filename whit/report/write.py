"""Writes the three files that tell what a run found: `result.json`, `README.md` and `report.html`."""

from __future__ import annotations

from pathlib import Path

from whit.report.card import model_card
from whit.report.page import report_page
from whit.report.record import RESULT_FILE, Result

CARD_FILE = "README.md"
PAGE_FILE = "report.html"


def write_reports(directory: Path, result: Result) -> None:
    """Write the model card, the HTML page and the record into `directory`, replacing earlier ones.

    Raises:
        OSError: the directory cannot be written.
    """
    (directory / CARD_FILE).write_text(model_card(result), encoding="utf-8")
    (directory / PAGE_FILE).write_text(report_page(result), encoding="utf-8")
    result.save(directory / RESULT_FILE)  # last: its presence means that the run is complete
