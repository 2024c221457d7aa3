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
FEWSHOT_SEED = 1234  # the harness's own, which its numbers elsewhere were made with


@dataclass(frozen=True)
class Metric:
    """A number of a task.

    Attributes:
        name: The harness's, with its filter where it has one.
        value: For example the share of items answered right; ``None`` if it is not finite.
        error: Standard error of the mean over items; ``None`` where there is none.
    """

    name: str
    value: float | None
    error: float | None


@dataclass(frozen=True)
class TaskScore:
    """What a model reaches on a task, or on a group of them.

    Attributes:
        task: The harness's name.
        metrics: In the order of the task.
        items: That were answered.
        shots: Solved examples in front of each item.
        version: Of the task; numbers of different versions do not compare.
    """

    task: str
    metrics: tuple[Metric, ...]
    items: int | None
    shots: int | None
    version: Any


def missing_harness() -> str | None:
    """Return the problem, with its pip command, if the harness is not installed."""
    if importlib.util.find_spec("lm_eval") is not None:
        return None
    return "tasks need lm-evaluation-harness; run: pip install 'lrbo[eval]'"


def load_tasks(names: Sequence[str], folder: Path | None) -> Any:
    """Find tasks and read their data, before any model is loaded.

    Args:
        names: Of tasks or groups.
        folder: With YAML files of tasks, which go before the harness's own; ``None`` has none.

    Returns:
        The tasks, in the harness's own form.

    Raises:
        DataError: Listing every name that is not known, with what is near; or if the data of a
            task cannot be read.
    """
    from lm_eval.tasks import TaskManager

    # The index of the harness's own 14,000 tasks takes ten seconds, which own tasks do without.
    manager = TaskManager(include_path=folder, include_defaults=False)
    own = list(manager.all_tasks)
    if not set(names) <= set(own):
        manager = TaskManager(include_path=folder)
    problems = [
        _unknown(name, own, manager.all_tasks) for name in names if name not in manager.all_tasks
    ]
    if problems:
        raise DataError(*problems)
    try:
        return manager.load(list(names))
    except Exception as error:  # the harness and the hub raise many kinds; all mean: no data
        raise DataError(
            f"tasks: cannot read {', '.join(names)}: {error}; without the hub, give "
            "task_folder=FOLDER with a YAML file of each task whose data_files lie here"
        ) from error


def _unknown(name: str, own: Sequence[str], known: Sequence[str]) -> str:
    """Return the problem of a name that nobody knows, and what may have been meant."""
    near = difflib.get_close_matches(name, known, n=NEAREST)
    listed = list(dict.fromkeys([*near, *own]))
    return (
        f"tasks: no task of the name {name}; near it or in task_folder: "
        f"{', '.join(listed) or 'none'}; all {len(known):,} are listed by: lm-eval ls tasks"
    )


def score_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Any,
    *,
    batch_items: int = 16,
    limit: int | None = None,
) -> list[TaskScore]:
    """Score a model on tasks, each with the number of examples that it states itself.

    Args:
        model: In evaluation mode.
        tokenizer: Of the model.
        tasks: What :func:`load_tasks` returned.
        batch_items: Requests per forward pass.
        limit: Only so many items of each task; ``None`` takes all.

    Returns:
        A score per task, and one per group of tasks.
    """
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    for task in tasks["tasks"].values():  # as simple_evaluate does, which takes names only
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_items)
    found = evaluate(wrapped, tasks, limit=limit, log_samples=False)
    return [_score(task, found) for task in found["results"]]


def _score(task: str, found: Any) -> TaskScore:
    """Return the numbers of one task out of the harness's tables."""
    row = found["results"][task]
    metrics = []
    for key, value in row.items():
        name, comma, rule = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        label = name if rule == "none" else key
        error = row.get(f"{name}_stderr,{rule}")
        metrics.append(Metric(label, _finite(value), _finite(error)))
    items = found.get("n-samples", {}).get(task, {}).get("effective")
    shots = found.get("n-shot", {}).get(task)
    version = found.get("versions", {}).get(task)
    stated = None if version == "Yaml" else version  # what the harness puts where there is none
    return TaskScore(task, tuple(metrics), items, shots, stated)


def _finite(value: object) -> float | None:
    """Return a number; ``None`` for what is none, as the harness's ``"N/A"``."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
