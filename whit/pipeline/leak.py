"""The leak rule for models compressed earlier: their recorded calibration text must not be part of the evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from whit.data.leak import check_leak
from whit.errors import DataError
from whit.models.loading import is_compressed
from whit.report.record import RESULT_FILE, Result


def check_recorded_leak(model: str | Path | None, evaluation: dict[str, Any], *, allow: bool) -> bool:
    """Compare the calibration recorded in `model`'s result.json, if there is one, with evaluation data.

    Returns:
        whether there is a leak (only if `allow`).

    Raises:
        DataError: `allow` is false, and there is a leak or the record cannot be read.
    """
    path = Path(model or "") / RESULT_FILE
    if model is None or not path.is_file() or not is_compressed(model):  # other tools write files of that name, too
        return False
    try:
        calibration = Result.load(path).run["calibration"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if allow:
            return False
        raise DataError(
            f"{str(path)!r} is damaged, so its calibration text is unknown: copy it again, or pass --allow-leak"
        ) from error
    return check_leak(calibration, evaluation, allow=allow)
