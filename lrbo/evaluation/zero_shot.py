"""Tasks of lm-evaluation-harness on a model in memory; the harness is imported on use."""

from __future__ import annotations

import difflib
import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lrbo.errors import DataError

NEAREST = 8
FEWSHOT_SEED = 1234  # the harness's own, of its published scores


@dataclass(frozen=True)
class Metric:
    """One score of a task."""

    name: str  # the harness's, with its filter where it has one
    value: float | None  # None where it is not finite
    error: float | None  # over items; likewise, or where the harness has none


@dataclass(frozen=True)
class TaskScore:
    """The scores of a model on a task, or on a group of tasks."""

    task: str
    metrics: tuple[Metric, ...]
    items: int | None  # that were scored
    shots: int | None  # solved examples in front of each
    version: Any  # of the task; scores of different ones do not compare


def missing_harness() -> str | None:
    """Name the problem, with its pip command, if the harness is not installed."""
    if importlib.util.find_spec("lm_eval") is not None:
        return None
    return "tasks need lm-evaluation-harness; run: pip install 'lrbo[eval]'"


def load_tasks(names: Sequence[str], folder: Path | None) -> Any:
    """Find tasks or groups of them and read their data, before any model is loaded.

    YAML files of tasks in ``folder`` go before the harness's own.

    Raises:
        DataError: Listing every unknown name with the nearest ones; or if the data of a task
            cannot be read.
    """
    from lm_eval.tasks import TaskManager

    # The index of the harness's own 14,000 tasks takes ten seconds, which own tasks do without.
    manager = TaskManager(include_path=folder, include_defaults=False)
    own = list(manager.all_tasks)
    if not set(names) <= set(own):
        manager = TaskManager(include_path=folder)
    available, problems = manager.all_tasks, []
    unknown = [name for name in names if name not in available]
    for name in unknown:
        near = dict.fromkeys([*difflib.get_close_matches(name, available, n=NEAREST), *own])
        problems.append(
            f"tasks: no task of the name {name}; near it or in task_folder: "
            f"{', '.join(near) or 'none'}; all {len(available):,} are listed by: lm-eval ls tasks"
        )
    if problems:
        raise DataError(*problems)
    try:
        return manager.load(list(names))
    except Exception as error:  # the harness and the hub raise many kinds; all mean: no data
        raise DataError(
            f"tasks: cannot read {', '.join(names)}: {error}; without the hub, give "
            "task_folder=FOLDER with a YAML file of each task whose data_files lie here"
        ) from error


def score_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Any,
    *,
    batch_items: int = 16,
    limit: int | None = None,
) -> list[TaskScore]:
    """Score a model on tasks of :func:`load_tasks`, and on each group of them.

    ``batch_items`` requests go into a forward pass; ``limit`` takes only so many items of a task.
    """
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    for task in tasks["tasks"].values():  # as simple_evaluate does, which takes names only
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_items)
    tables = evaluate(wrapped, tasks, limit=limit, log_samples=False)
    return [_score(task, tables) for task in tables["results"]]


def _score(task: str, tables: Any) -> TaskScore:
    """Take the score of one task out of the harness's tables."""
    row = tables["results"][task]
    metrics = []
    for key, value in row.items():
        name, comma, rule = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = row.get(f"{name}_stderr,{rule}")
        metrics.append(Metric(name if rule == "none" else key, _finite(value), _finite(error)))
    items = tables.get("n-samples", {}).get(task, {}).get("effective")
    shots = tables.get("n-shot", {}).get(task)
    version = tables.get("versions", {}).get(task)
    stated = None if version == "Yaml" else version  # the harness's word for none
    return TaskScore(task, tuple(metrics), items, shots, stated)


def _finite(value: object) -> float | None:
    """A finite number, and ``None`` for anything else, as the harness's ``"N/A"``."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
