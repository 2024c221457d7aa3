"""Several studies beside each other: one frame, and the tables made of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from lrbo.config.choices import KEEP_RATIO
from lrbo.errors import StudyError
from lrbo.files.tables import Column, Table, columns
from lrbo.reports.gains import MEANING, gains
from lrbo.reports.results import LABELS, score_rows, size_metric
from lrbo.study.front import pareto_front
from lrbo.study.study_record import StudyRecord
from lrbo.tasks.metrics import MISSING, Task


def common_task(studies: Sequence[StudyRecord]) -> Task:
    """Task of studies; StudyError if they have several, which have no metric in common."""
    tasks = {study.name: study.task for study in studies}
    if len(set(tasks.values())) > 1:
        each = ", ".join(f"{name} ({task.name})" for name, task in tasks.items())
        raise StudyError(f"studies of several tasks have no metric in common: {each}")
    return next(iter(tasks.values()))


def compared(studies: Sequence[StudyRecord]) -> pd.DataFrame:
    """Table with one row per study, in the given order.

    Returns:
        ``study``, ``model``, ``method``, ``space``, ``keep_ratio`` (that of the best trial),
        ``measure`` (of the budget), ``seed``, ``trials`` (with a value); of the validation text
        the headline of the task (perplexity) of ``dense``, ``uniform``, ``analytic`` and ``best``,
        and ``gain`` and ``gain_error``, what the search adds to the analytic allocation at the
        largest budget, in the minimized metric; the same of the test text as ``test_dense`` and
        so on. Missing where it is not known.

    Raises:
        StudyError: If the studies have several tasks.
    """
    headline, rows = common_task(studies).headline.name, []
    for study in studies:
        config, state = study.config, study.state
        row: dict[str, Any] = {
            "study": study.name,
            "model": config.model.name,
            "method": config.method["name"],
            "space": config.space.name,
            "measure": config.budget.measure,
            "seed": config.seed,
            "trials": len(state.completed) + len(state.stopped),
        }
        for score in score_rows(study):
            row[score.label] = score.validation.get(headline)
            row[f"test_{score.label}"] = score.test.get(headline)
            if score.label == "best":
                row["keep_ratio"] = score.keep_ratio
        for gain in gains(state)[:1]:
            for text, difference in gain.differences.items():
                prefix = "test_" if text == "test" else ""
                row |= {f"{prefix}gain": difference.mean, f"{prefix}gain_error": difference.error}
        rows.append(row)
    numbers = [*LABELS, *(f"test_{label}" for label in LABELS)]
    numbers += ["gain", "gain_error", "test_gain", "test_gain_error"]
    settings = ["study", "model", "method", "space", "keep_ratio", "measure", "seed", "trials"]
    types = dict.fromkeys(["keep_ratio", *numbers], float)
    return pd.DataFrame(rows, columns=[*settings, *numbers]).astype(types)


def fronts(studies: Sequence[StudyRecord]) -> pd.DataFrame:
    """Table with a row per trial on the front of each study that searched one, and per baseline.

    Returns:
        ``study``, ``line`` (method and space, or the study where that is not enough to tell them
        apart), ``what`` (front, uniform or analytic), ``measure``, ``keep_ratio``, and the headline
        of the task on the validation text, as ``value``. A front is one of the objective against
        the keep ratio, whatever size the search minimised.

    Raises:
        StudyError: If the studies have several tasks.
    """
    headline, rows = common_task(studies).headline.name, []
    searched = [study for study in studies if size_metric(study) is not None]
    lines = [f"{each.config.method['name']} {each.config.space.name}" for each in searched]
    if len(set(lines)) < len(lines):
        lines = [study.name for study in searched]
    for study, line in zip(searched, lines, strict=True):
        completed = study.state.completed
        parts = {"front": pareto_front(completed, KEEP_RATIO)}
        for origin in ("uniform", "analytic"):
            own = [each for each in completed if each.request.origin == origin]
            parts[origin] = sorted(own, key=lambda each: each.metrics[KEEP_RATIO])
        for what, records in parts.items():
            for record in records:
                values = record.metrics[KEEP_RATIO], record.metrics[headline]
                rows.append((study.name, line, what, study.config.budget.measure, *values))
    return pd.DataFrame(
        rows, columns=["study", "line", "what", "measure", "keep_ratio", "value"]
    ).astype({"keep_ratio": float, "value": float})


def comparison_tables(studies: Sequence[StudyRecord], frame: pd.DataFrame) -> list[Table]:
    """Tables that compare studies: their models on each text, and what searches add.

    The frame is that of :func:`compared`. Studies are called by their names where something else
    than method, space, size and seed tells them apart.
    """
    task = common_task(studies)
    settings = ["method", "space", "kept", "seed"]
    # Rounded as far as ranks are, so that studies of one budget have one size.
    kept = [MISSING if math.isnan(ratio) else f"{ratio:.1%}" for ratio in frame["keep_ratio"]]
    table = frame.assign(kept=kept)
    if table["measure"].nunique() > 1:  # shares of bytes are none of parameters
        table["kept"] += " of " + table["measure"]
    if table["model"].nunique() > 1 or table.duplicated(settings).any():
        settings = ["study", "kept"]
    names = table[settings].astype(str).to_numpy().tolist()
    heads: list[str | Column] = [Column(settings[0], is_text=True, folds=True), *settings[1:]]
    tables = []
    for text, prefix in (("validation", ""), ("test", "test_")):
        labels = [label for label in LABELS if table[f"{prefix}{label}"].notna().any()]
        if not labels:
            continue
        more = [] if prefix else ["trials"]
        scores = {label: table[f"{prefix}{label}"].map(task.headline.text) for label in labels}
        values = table[more].astype(str).assign(**scores)
        cells = [[*name, *row] for name, row in zip(names, values.to_numpy().tolist(), strict=True)]
        title = f"{task.headline.label.capitalize()} of {len(table)} studies on the {text} text"
        tables.append(Table(title, columns(*heads, *more, *labels), cells))
    cells = [
        [*name, text, line]
        for name, study in zip(names, studies, strict=True)
        for gain in gains(study.state)[:1]
        for text, line in gain.lines.items()
    ]
    if cells:
        added = [Column("text", is_text=True), Column("best - analytic", folds=True)]
        title = f"What the searches add, {task.minimized.unit or task.minimized.label}"
        shown = columns(*heads, *added)
        tables.append(Table(title, shown, cells, [MEANING], expendable=settings[1:]))
    return tables
