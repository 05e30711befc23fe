"""Task scores as metrics: intervals over items, and paired differences to the original."""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from whit.data.leak import text_sketch
from whit.data.tokens import tokenizer_identity
from whit.evaluation.bootstrap import CONFIDENCE, WindowSums
from whit.evaluation.harness import TaskScores, item_texts, load_tasks, run_tasks
from whit.evaluation.protocol import protocol_id
from whit.report.record import EvaluationRecord, MetricRecord

#: Width of a 95 % interval in standard errors on either side, where only a standard error is known.
NORMAL_95 = 1.959964


class TaskRun:
    """Tasks with their data, to be scored with one model and perhaps another. A context manager: it holds files.

    Args:
        tasks: names of the harness or paths of task files.
        limit: items per task; None for all.

    Raises:
        KnobError, DataError, MissingDependencyError: as `whit.evaluation.harness.load_tasks`.
    """

    def __init__(self, tasks: Sequence[str], limit: int | None) -> None:
        self.limit = limit
        self._folder = TemporaryDirectory(prefix="whit-tasks-")
        try:
            self.tasks = load_tasks(tasks, Path(self._folder.name))
            texts = list(item_texts(self.tasks, limit))
        except BaseException:
            self._folder.cleanup()
            raise
        self.provenance: dict[str, Any] = {
            "name": ", ".join(self.tasks),
            "sha256": _hash(texts),
            "sketch": text_sketch(texts),
            "items": len(texts),
            "lm_eval": importlib.metadata.version("lm-eval"),
        }

    def __enter__(self) -> TaskRun:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def record(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        original: nn.Module | None,
        original_tokenizer: Any,
        batch_size: int,
        fields: Mapping[str, Any],
    ) -> EvaluationRecord:
        """Metrics `<task>/<metric>`; with an original also its own and the difference of both on the same items.

        Args:
            fields: for the protocol, at least `dtype`.

        Raises:
            ModelError: a model cannot be scored. DataError: a model has no tokenizer.
        """
        start = time.perf_counter()
        mine = run_tasks(model, tokenizer, self.tasks, limit=self.limit, batch_size=batch_size)
        seconds = time.perf_counter() - start
        theirs: list[TaskScores] = []
        if original is not None:
            theirs = run_tasks(original, original_tokenizer, self.tasks, limit=self.limit, batch_size=batch_size)
        fields = {**fields, "lm_eval": self.provenance["lm_eval"], "tokenizer": tokenizer_identity(tokenizer)}
        metrics: list[MetricRecord] = []
        errors: dict[str, float | None] = {}
        for index, scores in enumerate(mine):
            own = dict(fields) | {
                "corpus": f"{scores.name}@{self.provenance['sha256'][:8]}",
                "task_version": scores.version,
                "shots": scores.shots,
                "items": len(scores.ids),
            }
            metrics += _metrics(scores, own)
            errors |= {f"{scores.name}/{metric}": error for metric, (_, error) in scores.metrics.items()}
            if theirs:
                metrics += _metrics(theirs[index], own, "original ")
                metrics += _differences(scores, theirs[index], own)
        data = self.provenance | {"standard_errors": errors}
        return EvaluationRecord(metrics, {}, data, seconds)


def _metrics(scores: TaskScores, fields: Mapping[str, Any], prefix: str = "") -> list[MetricRecord]:
    out = []
    for metric, (value, error) in scores.metrics.items():
        items = scores.items.get(metric)
        low, high = _normal_interval(value, error) if items is None else item_interval(items, *_range(items))
        name = f"{scores.name}/{metric}"
        better = "higher" if metric in scores.higher else "lower"
        out.append(MetricRecord(prefix + name, value, low, high, protocol_id(name, fields), better))
    return out


def _differences(scores: TaskScores, original: TaskScores, fields: Mapping[str, Any]) -> list[MetricRecord]:
    """Mean over items of (this model's score - the original's), resampled item by item: the pairing is kept."""
    out = []
    for metric, mine in scores.items.items():
        theirs = original.items.get(metric)
        if theirs is None or scores.ids != original.ids:
            continue
        pairs = [first - second for first, second in zip(mine, theirs, strict=True)]
        name = f"{scores.name}/{metric} difference"
        better = "higher" if metric in scores.higher else "lower"
        lowest, highest = _range([*mine, *theirs])
        low, high = item_interval(pairs, lowest - highest, highest - lowest)
        out.append(MetricRecord(name, sum(pairs) / len(pairs), low, high, protocol_id(name, fields), better))
    return out


def item_interval(items: Sequence[float], lowest: float, highest: float) -> tuple[float, float]:
    """95 % interval of the mean of item scores: the bootstrap over items.

    Where all n items score the same, resampling them shows nothing. A share p of other items is missed by all n with
    probability (1 - p)^n, so the interval then reaches a share of 1 - 0.05^(1/n) (about 3 / n) of the way to `lowest`
    and `highest`, between which a score lies.
    """
    if len(set(items)) > 1:
        return WindowSums(list(items), [1.0] * len(items)).interval()
    value, share = items[0], 1 - (1 - CONFIDENCE) ** (1 / len(items))
    return value - share * (value - lowest), value + share * (highest - value)


def _range(items: Sequence[float]) -> tuple[float, float]:
    """Between which scores lie: 0 and 1, unless some do not."""
    return min(0.0, *items), max(1.0, *items)


def _normal_interval(value: float, error: float | None) -> tuple[float, float]:
    if error is None or not math.isfinite(error):
        return value, value
    return value - NORMAL_95 * error, value + NORMAL_95 * error


def _hash(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()
