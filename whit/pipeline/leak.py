"""The leak rule for models compressed earlier: their recorded calibration text must not be part of the evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from whit.data.leak import check_leak
from whit.pipeline.journal import RESULT_FILE
from whit.report.record import Result


def check_recorded_leak(model: str | Path | None, evaluation: dict[str, Any], *, allow: bool) -> bool:
    """Compare the calibration recorded in `model`'s result.json, if there is one, with evaluation data.

    Returns:
        whether there is a leak (only if `allow`).

    Raises:
        DataError: there is a leak and `allow` is false.
    """
    path = Path(model or "") / RESULT_FILE
    if model is None or not path.is_file():
        return False
    return check_leak(Result.load(path).run["calibration"], evaluation, allow=allow)
