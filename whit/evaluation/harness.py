"""Tasks of the LM Evaluation Harness (lm-eval): what to install, which tasks, and one run of one model.

The harness (Gao et al., https://github.com/EleutherAI/lm-evaluation-harness) defines tasks and scores; here it is told
where local data lies, kept from changing the caller's random numbers, and asked for the score of every item.
A task is a name of the harness (its data comes from the hub) or a YAML file (its data lies beside it, nothing is
fetched). No Python code of a task file is run: a file that asks for it by `!function` is refused.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from whit.errors import DataError, KnobError, MissingDependencyError, ModelError, nearest

INSTALL = "pip install 'whit[lm-eval]'"
#: Dataset builders that read local files.
_LOCAL_BUILDERS = frozenset({"json", "csv", "text", "parquet", "arrow"})


@dataclass(frozen=True)
class TaskScores:
    """What one model scored in one task.

    Attributes:
        name: of the task. version: as its author numbers it. shots: examples before each item.
        metrics: name -> (value, standard error or None) as the harness reports them.
        items: metric -> score of each item, in the order of `ids`; only metrics that are means of item scores.
        ids: of the items. higher: metrics of which more is better.
    """

    name: str
    version: str
    shots: int
    metrics: dict[str, tuple[float, float | None]]
    items: dict[str, list[float]]
    ids: list[int]
    higher: frozenset[str]


def require_harness() -> None:
    """Raise `MissingDependencyError` with the install command unless lm-eval and datasets are installed."""
    if any(importlib.util.find_spec(name) is None for name in ("lm_eval", "datasets")):
        raise MissingDependencyError(f"--tasks needs the LM Evaluation Harness: {INSTALL}")


def load_tasks(tasks: Sequence[str], cache: Path) -> dict[str, Any]:
    """The harness's task objects by name, their data read.

    Args:
        tasks: names of the harness, or paths of YAML files.
        cache: empty folder for what the harness makes of local data; needed as long as the tasks are.

    Raises:
        KnobError: no task given, an unknown name (the nearest is named), or the same twice.
        DataError: a task file or its data cannot be read, or it wants to run code.
        MissingDependencyError: the harness is not installed.
    """
    require_harness()
    from lm_eval.tasks import TaskManager

    if not tasks or not all(tasks):
        raise KnobError("--tasks needs the name of a task or the path of a task file")
    specs = [_read_task_file(Path(task), cache) if _is_file(task) else task for task in tasks]
    names = [spec for spec in specs if isinstance(spec, str)]
    with _quiet(), _same_random_numbers():
        manager = TaskManager(include_defaults=bool(names))
        for name in names:
            if name not in manager.all_tasks:
                raise KnobError(
                    f"no task {name!r} in lm-eval, and no such file{nearest(name, manager.all_tasks)} "
                    "(lm-eval ls tasks lists them; a task file ends in .yaml)"
                )
        loaded: dict[str, Any] = {}
        for task, spec in zip(tasks, specs, strict=True):
            try:
                found = manager.load([spec])["tasks"]
            except Exception as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise DataError(f"task {task!r} cannot be loaded ({type(error).__name__}: {reason})") from error
            twice = sorted(set(loaded) & set(found))
            if twice:
                raise KnobError(f"task {twice[0]!r} is asked for twice: name each task once")
            loaded |= found
    return loaded


def run_tasks(
    model: nn.Module, tokenizer: Any, tasks: Mapping[str, Any], *, limit: int | None, batch_size: int
) -> list[TaskScores]:
    """Score a model in every task.

    Args:
        model: a causal transformers model on its device. tokenizer: its tokenizer.
        tasks: from `load_tasks`. limit: items per task; None for all.

    Raises:
        ModelError: the model is no causal language model of transformers, or cannot answer.
        DataError: there is no tokenizer.
    """
    import transformers
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    if tokenizer is None:
        raise DataError("tasks need a tokenizer, and the model has none: copy the original's tokenizer files beside it")
    if not isinstance(model, transformers.PreTrainedModel) or not model.can_generate() or _encodes(model):
        raise ModelError(f"tasks need a causal language model, and {type(model).__name__} is none")
    with _quiet(), _same_random_numbers(), torch.inference_mode():
        try:
            wrapped = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
            answer = simple_evaluate(
                wrapped,
                tasks=list(tasks.values()),
                limit=limit,
                log_samples=True,
                bootstrap_iters=1000,
                # The default one reads thousands of task files, which takes longer than a small task.
                task_manager=TaskManager(include_defaults=False),
            )
        except (RuntimeError, ValueError, IndexError, KeyError, TypeError, AssertionError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ModelError(f"lm-eval could not score {type(model).__name__}: {reason}") from error
    return [_scores(name, answer) for name in tasks]


def item_texts(tasks: Mapping[str, Any], limit: int | None) -> Iterator[str]:
    """The text of every item that will be scored: its question and, where it has them, its choices."""
    for task in tasks.values():
        for _, document in zip(range(limit or len(task.eval_docs)), task.eval_docs, strict=False):
            parts = [task.doc_to_text(document)]
            if task.OUTPUT_TYPE == "multiple_choice":
                parts += list(task.doc_to_choice(document))
            yield " ".join(str(part) for part in parts)


def _is_file(task: str) -> bool:
    return Path(task).suffix in (".yaml", ".yml") or Path(task).is_file()


def _read_task_file(path: Path, cache: Path) -> dict[str, Any]:
    """A task file as the harness wants it, with paths of local data made absolute."""
    import yaml

    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read task file {str(path)!r}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        if "!function" in str(error):
            raise DataError(
                f"task file {str(path)!r} runs Python code (!function), which whit does not: write what it needs into "
                "the data, or into the templates doc_to_text, doc_to_choice and doc_to_target"
            ) from error
        raise DataError(f"task file {str(path)!r} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("task"), str):
        raise DataError(f"task file {str(path)!r} names no 'task': see docs/evaluation.md for an example")
    if "include" in fields:
        raise DataError(f"task file {str(path)!r} includes {fields['include']!r}: write all fields into one file")
    if fields.get("dataset_path") not in _LOCAL_BUILDERS:
        return fields
    options = dict(fields.get("dataset_kwargs") or {})
    files = options.get("data_files")
    if not isinstance(files, dict) or not files:
        raise DataError(f"task file {str(path)!r} names no data_files under dataset_kwargs (split: file)")
    options["data_files"] = {split: _data_file(path, value) for split, value in files.items()}
    return fields | {"dataset_kwargs": options | {"cache_dir": str(cache)}}


def _data_file(task: Path, value: Any) -> str:
    if not isinstance(value, str):
        raise DataError(f"task file {str(task)!r} has data_files that are no paths: {value!r}")
    found = task.parent / value
    if not found.is_file():
        raise DataError(f"task file {str(task)!r} wants {value!r}, which does not lie beside it ({str(found)!r})")
    return str(found.resolve())


def _scores(name: str, answer: Mapping[str, Any]) -> TaskScores:
    results, samples = answer["results"][name], answer["samples"][name]
    metrics: dict[str, tuple[float, float | None]] = {}
    items: dict[str, list[float]] = {}
    ordered = sorted(samples, key=lambda sample: int(sample["doc_id"]))
    for key, value in results.items():
        metric, _, kind = key.partition(",")
        if metric.endswith("_stderr") or not kind or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        error = results.get(f"{metric}_stderr,{kind}")
        metrics[metric] = (float(value), float(error) if isinstance(error, int | float) else None)
        scored = [sample.get(metric) for sample in ordered]
        if all(isinstance(score, int | float) for score in scored):
            values = [float(score) for score in scored]
            if values and abs(sum(values) / len(values) - float(value)) < 1e-9:
                items[metric] = values
    higher = (answer.get("higher_is_better") or {}).get(name) or {}
    return TaskScores(
        name,
        str((answer.get("versions") or {}).get(name, "unknown")),
        int((answer.get("n-shot") or {}).get(name) or 0),
        metrics,
        items,
        [int(sample["doc_id"]) for sample in ordered],
        frozenset(metric for metric in metrics if higher.get(metric, True)),
    )


def _encodes(model: Any) -> bool:
    return bool(getattr(model.config, "is_encoder_decoder", False))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Errors only, and no bar for reading data: the harness logs its whole configuration."""
    import datasets

    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def _same_random_numbers() -> Iterator[None]:
    """The harness seeds every generator; the caller's must not notice."""
    state, numbers = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(state)
            np.random.set_state(numbers)
