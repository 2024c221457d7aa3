"""The tables of a study, each built once: scores, gains, front, allocation, checkpoints, time."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lrbo.files.tables import Column, Table, columns
from lrbo.layers.form import DENSE_FORM
from lrbo.layers.options import UNITS
from lrbo.reports import allocations, results
from lrbo.reports.gains import MEANING, gains
from lrbo.reports.recoveries import recovery_tables
from lrbo.study.state import StudyState
from lrbo.study.study_record import StudyRecord
from lrbo.tasks.metrics import COSTS, KEEP_RATIO, LATENCIES, MISSING, PARAMETERS, SIZES
from lrbo.trials.records import TrialRecord

ORIGINS = {
    "analytic": "analytic: the options of least predicted loss",
    "start": "start: what the search space starts from, such as ratios",
    "transfer": "transfer: an allocation of another study, at this budget",
}


def head_tables(study: StudyRecord) -> list[Table]:
    """Scores of the models of a study, and what the search adds."""
    return [table for table in (_scores(study), _gains(study)) if table.rows]


def detail_tables(study: StudyRecord) -> list[Table]:
    """Front, allocation of the best trial, checkpoints, failures and time."""
    best = study.state.best()
    tables = [
        *([] if (size := results.size_metric(study)) is None else [_front(study, size)]),
        *([] if best is None else [_allocation(study, best), _weights(study, best)]),
        *recovery_tables(study),
        _checkpoints(study),
        _failures(study.state),
        _seconds(study.state),
    ]
    return [table for table in tables if table.rows]


def _scores(study: StudyRecord) -> Table:
    """A row for the dense model, each baseline, start values and the best trial."""
    task, rows = study.task, results.score_rows(study, "start", "transfer")
    cells = [
        [
            row.label,
            "" if row.trial is None else str(row.trial),
            *(metric.of(row.validation) for metric in (*task.metrics, *SIZES)),
            *(metric.of(row.test) for metric in task.scores),
        ]
        for row in rows
    ]
    scored = [Column(f"validation {metric.label}", metric.head) for metric in task.metrics]
    tested = [
        Column(f"test {metric.label}", f"test {metric.head}", is_extra=metric is not task.headline)
        for metric in task.scores
    ]
    sizes = [metric.head for metric in SIZES]
    secondary = [metric.head for metric in task.metrics if metric is not task.headline]
    return Table(
        "Results",
        columns("model", "trial", *scored, *sizes, *tested),
        cells,
        _notes_on_scores(study, rows),
        bold="best",
        expendable=[*secondary, *sizes[1:]][::-1],
    )


def _notes_on_scores(study: StudyRecord, rows: Sequence[results.ScoreRow]) -> list[str]:
    """Say what the columns and rows of the scores mean."""
    task, state, labels = study.task, study.state, {row.label for row in rows}
    notes = []
    is_delta = study.about.base_fingerprint is not None
    whole = "what the model adds to its base; MACs with it" if is_delta else "the whole model"
    for unit in dict.fromkeys(metric.unit for metric in task.metrics if metric.unit):
        names = " and ".join(metric.label for metric in task.metrics if metric.unit == unit)
        notes.append(f"{names}: {unit} on the validation text")
    notes += [
        f"kept: share of the {UNITS[study.about.budget.measure]} of the compressible layers",
        "params, size (in the dtype of the model's files), "
        f"MACs (per {task.counted.removesuffix('s')}): of {whole}",
    ]
    if selection := state.selection:
        notes.append(
            f"validation text: {len(selection['windows'])} of {selection['pool']} windows, chosen "
            "because they rank allocations as all of them do: its losses compare trials of this "
            "study, their level is not that of the text they came from; the test text is whole"
        )
    if results.size_metric(study) is not None:
        notes.append("best: the lowest loss at any size; uniform and analytic: the largest")
    notes += [text for label, text in ORIGINS.items() if label in labels]
    for metric in LATENCIES:
        timed = [row for row in rows if metric.name in row.validation]
        ratios = ", ".join(f"{row.label} {metric.of(row.validation)}" for row in timed)
        notes += [f"{metric.name}, compressed to dense: {ratios}"] if timed else []
    measured = results.sensitivity(study)
    if measured is not None and not math.isnan(measured.rank_correlation):
        notes.append(
            f"predicted against measured loss of single layers, {len(measured.measurements)} "
            f"points: rank correlation {measured.rank_correlation:.3f}"
        )
    if (sums := results.sums_of_predictions(study)) is not None:
        notes.append(sums)
    if state.tests:
        texts = dict.fromkeys(str(test["text"]) for test in state.tests.values())
        notes.append(f"test: {', '.join(texts)}")
    return notes


def _gains(study: StudyRecord) -> Table:
    minimized, rows = study.task.minimized, []
    for gain in gains(study.state):
        trials = f"{gain.best.request.trial_index} - {gain.analytic.request.trial_index}"
        ratio = KEEP_RATIO.of(gain.analytic.metrics)
        rows += [[trials, ratio, text, line] for text, line in gain.lines.items()]
    added = Column("best - analytic", folds=True)
    return Table(
        f"What the search adds, {minimized.unit or minimized.label}",
        columns("trials", KEEP_RATIO.head, Column("text", is_text=True), added),
        rows,
        [MEANING],
        expendable=(KEEP_RATIO.head, "trials"),
    )


def _front(study: StudyRecord, size: str) -> Table:
    headline, minimized = study.task.headline, study.task.minimized
    beside = [COSTS[size]] if size != KEEP_RATIO.name else []  # which is a column anyway
    rows = [
        [
            str(record.request.trial_index),
            headline.of(record.metrics),
            minimized.of(record.metrics),
            KEEP_RATIO.precise(record.metrics.get(KEEP_RATIO.name)),
            *(metric.of(record.metrics) for metric in (PARAMETERS, *beside)),
        ]
        for record in results.front(study)
    ]
    notes = []
    if (area := results.hypervolume_of(study)) is not None:
        ends = ", ".join(f"{name} {value:.6g}" for name, value in area["reference"].items())
        notes.append(f"hypervolume {area['value']:.4g} (loss x {size}) below {ends}")
    heads = [headline.label, minimized.label, KEEP_RATIO.head, PARAMETERS.head]
    return Table(
        "Front: no other trial is both smaller and better",
        columns("trial", *heads, *(metric.name for metric in beside)),
        rows,
        notes,
        expendable=(PARAMETERS.head, minimized.label),
        further="larger",
    )


def _allocation(study: StudyRecord, best: TrialRecord) -> Table:
    about = study.about
    table = allocations.options_frame(about, best.request.allocation)
    shares = allocations.kept_by_depth(table)
    counted = table.assign(layers=1, left=table["form"] == DENSE_FORM)
    counts = counted.groupby("kind", sort=False)[["layers", "left", "dense", "stored"]].sum()
    dense = counts.index[counts["left"] == counts["layers"]]
    counts.loc["all"] = counts.sum()
    rows = [
        [
            str(kind),
            *(f"{count:,}" for count in counts.loc[kind]),
            *(MISSING if math.isnan(share) else f"{share:.1%}" for share in shares.loc[kind]),
        ]
        for kind in shares.index
    ]
    unit = UNITS[about.budget.measure]
    notes = [
        f"budget: {about.budget.limit:,} {unit}, biases that the method adds included; "
        f"a layer is dense or {', '.join(about.forms)}"
    ]
    if len(dense):
        notes.append(f"dense in every block: {', '.join(dense)}")
    heads = ("layers", "left dense", f"{unit} before", "after")
    return Table(
        f"Share of the {unit} kept in the best trial, {best.request.trial_index}",
        columns("kind", *(Column(head, is_extra=True) for head in heads), *shares.columns),
        rows,
        notes,
        bold="all",
    )


def _weights(study: StudyRecord, best: TrialRecord) -> Table:
    is_weights = study.config.space.type == "weights"
    rows = [
        [name, f"{value:+.3f}", f"{math.exp(value):.3f}"]
        for name, value in best.request.variables.items()
        if is_weights and name != KEEP_RATIO.name
    ]
    return Table(
        f"Weights of the best trial, {best.request.trial_index}",
        columns("variable", "weight", "factor"),
        rows,
        ["factor: exp(weight), on predicted losses; that of exponent is their power"],
    )


def _checkpoints(study: StudyRecord) -> Table:
    metric = study.task.headline
    rows = [
        [
            written["folder"],
            str(written["trial"]),
            KEEP_RATIO.of(written),
            metric.text(written[f"validation_{metric.name}"]),
            metric.text(written[f"test_{metric.name}"]),
            written["format"],
            written["dtype"],
            "there" if written["exists"] else "gone",
        ]
        for written in results.checkpoints(study)
    ]
    folder = Column("folder", is_text=True, folds=True)
    validation = Column(f"validation {metric.label}", metric.head)
    test = Column(f"test {metric.label}", f"test {metric.head}")
    return Table(
        "Checkpoints",
        columns(folder, "trial", "kept", validation, test, "format", "dtype", "files"),
        rows,
        [f"{metric.head}: on the validation text, after the refit if there was one"],
        expendable=("dtype", "format"),
    )


def _failures(state: StudyState) -> Table:
    trials: dict[tuple[str, str], list[str]] = {}
    for record in state.ended:
        if record.result is not None and not (record.is_completed or record.is_stopped):
            key = (record.result.outcome, results.first_reason(record))
            trials.setdefault(key, []).append(str(record.request.trial_index))
    heads = {"trials": True, "outcome": False, "reason": True}
    return Table(
        "Trials without a value",
        [Column(head, is_text=True, folds=folds) for head, folds in heads.items()],
        [[", ".join(numbers), *key] for key, numbers in trials.items()],
        further="more reasons",
    )


def _seconds(state: StudyState) -> Table:
    by_stage = results.seconds_by_stage(state)
    total = math.fsum(by_stage.values())
    rows = []
    for stage, seconds in by_stage.items() if state.ended else ():
        trials = sum(stage in record.seconds for record in state.records)
        each = seconds / trials if trials else math.nan
        whole = format(seconds, ",.1f" if seconds >= 0.05 else ".1g")
        mean = format(each, ",.2f" if each >= 0.005 else ".1g") if trials else MISSING
        share = f"{seconds / total:.0%}" if total else MISSING
        rows.append([stage, whole, mean, "<1%" if 0 < seconds < 0.005 * total else share])
    return Table("Time", columns("stage", "seconds", "per trial", "share"), rows)


def trials_table(study: StudyRecord) -> Table:
    """A row for every trial that ended."""
    metrics = study.task.metrics
    rows = [
        [
            str(record.request.trial_index),
            record.request.origin,
            record.result.outcome,
            *(metric.of(record.metrics) for metric in (*metrics, KEEP_RATIO)),
            f"{math.fsum(record.seconds.values()):.1f}",
            record.result.error or "",
        ]
        for record in study.state.ended
        if record.result is not None
    ]
    heads = ("trial", "origin", "outcome", *(metric.label for metric in metrics), KEEP_RATIO.head)
    return Table("All trials", columns(*heads, "seconds", "reason"), rows)
