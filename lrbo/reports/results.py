"""The results of a study as plain values: one dict, rows of scores, a frame of its trials."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from lrbo.allocation.loss_calibration import LossCalibration, sensitivity_file
from lrbo.config.choices import KEEP_RATIO, LOSS, PREDICTED
from lrbo.errors import StudyError
from lrbo.files.paths import model_folder
from lrbo.layers.options import UNITS, dense_cost
from lrbo.reports.allocations import dense_size
from lrbo.reports.gains import gains
from lrbo.reports.recoveries import checkpoint_folder, recovered_rows
from lrbo.study.front import hypervolume, pareto_front, reference_point
from lrbo.study.state import StudyState
from lrbo.study.study_record import StudyRecord
from lrbo.tasks.metrics import LATENCIES, PARAMETERS, SIZES, Task, count_text
from lrbo.trials.records import Origin, TrialRecord

LABELS = ("dense", "uniform", "analytic", "best")  # models that every table of results has
STAGES = ("suggestion", "allocation", "scoring", "logging")


def summary(study: StudyRecord) -> dict[str, Any]:
    """Results of a study as plain values that go to JSON.

    Every key is always there. What is not known yet is ``None``, or an empty list or dict.
    Scores are the metric that the task minimizes and its headline: of a language model ``nll``
    (nats per token) and ``perplexity``.

    Returns:
        - ``study``: its name;
        - ``trials_completed``, ``trials_stopped`` (early), ``trials_failed`` (without a value);
        - ``tokens_scored``: over all trials with a value;
        - ``validation_windows``: where they were chosen, ``chosen`` of how many in the ``pool``;
        - ``dense``, ``uniform``, ``analytic`` (least predicted loss), ``best`` (lowest objective):
          scores on the validation text, ``trial``, ``keep_ratio``, and ``parameters`` of the best;
        - ``test``: by the same labels, ``trial``, ``text``, and scores on the test text;
        - ``covered``: the parts that the budget covers (``include``), their share of the dense
          model's ``parameters`` and ``bytes``, and of those of the best trial, ``best_bytes``;
        - ``gains``: best minus ``analytic`` at each budget, in the minimized metric, with the
          ``standard_error`` over windows;
        - ``front``: ``trial``, minimized metric, ``keep_ratio`` and the size that is minimized, of
          each trial on it, from small to large; at one budget there is none;
        - ``hypervolume``: area that a front dominates below its ``reference``, loss times ``size``;
        - ``seconds``: sums over all trials, by stage;
        - ``checkpoints``: the models that were written, and whether each ``exists`` still;
        - ``recovered``: trials that were trained after the search, as
          :func:`lrbo.reports.recoveries.recovered_rows` says.
    """
    state, task, size = study.state, study.task, size_metric(study) or KEEP_RATIO
    scores = [metric.name for metric in task.scores]
    models: dict[str, Any] = dict.fromkeys(LABELS)
    more: dict[str, tuple[str, ...]] = {"dense": (), "best": (KEEP_RATIO, PARAMETERS.name)}
    for row in score_rows(study):
        names = (*scores, *more.get(row.label, (KEEP_RATIO,)))
        number = {} if row.trial is None else {"trial": row.trial}
        models[row.label] = number | _pick(row.validation, *names)
    windows = None
    if selection := state.selection:
        windows = {"chosen": len(selection["windows"]), "pool": selection["pool"]}
    return {
        "study": study.name,
        **_counts(state),
        "validation_windows": windows,
        **models,
        "covered": covered(study),
        "gains": [gain.to_dict() for gain in gains(state)],
        "front": [
            {"trial": record.request.trial_index}
            | _pick(record.metrics, task.minimized.name, KEEP_RATIO, size)
            for record in front(study)
        ],
        "hypervolume": hypervolume_of(study),
        "checkpoints": checkpoints(study),
        "recovered": recovered_rows(study),
        "seconds": seconds_by_stage(state),
        "test": {
            label: {"trial": test["trial"], "text": test["text"], **_pick(test["metrics"], *scores)}
            for label, test in state.tests.items()
        },
    }


def covered(study: StudyRecord) -> dict[str, Any]:
    """Return the parts of the model that the budget covers, and their shares of its size."""
    about, best = study.about, study.state.best()
    units = dense_cost(about.units.values(), about.itemsize)
    return {
        "include": list(about.include),
        "parameters": units.parameters / about.model_parameters,
        "bytes": units.bytes / (about.model_parameters * about.itemsize),
        "best_bytes": None if best is None else _covered_bytes(study, best),
    }


def _covered_bytes(study: StudyRecord, trial: TrialRecord) -> float:
    """Return the share of what the budget covers in the bytes of a trial's model."""
    about, stored = study.about, trial.request.allocation.cost.bytes
    dense = dense_cost(about.units.values(), about.itemsize).bytes
    return stored / (stored + about.model_parameters * about.itemsize - dense)


def covered_text(study: StudyRecord, trial: TrialRecord | None = None) -> str:
    """Say which share the budget covers, dense and as a trial stores it, by default the best."""
    share, trial = covered(study), trial or study.state.best()
    parts = " and ".join(filter(None, [", ".join(share["include"][:-1]), share["include"][-1]]))
    text = f"{parts}: {share['parameters']:.1%} of the dense model's parameters and bytes"
    if trial is not None:
        number = trial.request.trial_index
        text += f", {_covered_bytes(study, trial):.1%} of its bytes as trial {number} stores it"
    return text


def _counts(state: StudyState) -> dict[str, int]:
    completed, stopped = len(state.completed), len(state.stopped)
    return {
        "trials_completed": completed,
        "trials_stopped": stopped,
        "trials_failed": len(state.ended) - completed - stopped,
        "tokens_scored": int(sum(record.metrics.get("tokens", 0) for record in state.ended)),
    }


def seconds_by_stage(state: StudyState) -> dict[str, float]:
    """Sum up the seconds of all trials, those that did not end included."""
    return {
        stage: math.fsum(record.seconds.get(stage, 0.0) for record in state.records)
        for stage in STAGES
    }


def first_reason(record: TrialRecord) -> str:
    """First line of the reason why a trial has no value."""
    reason = record.result and record.result.error
    return ((reason or "").strip() or "no reason given").splitlines()[0]


def _pick(metrics: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: metrics.get(name) for name in names}


@dataclass(frozen=True)
class ScoreRow:
    """The dense model, or a trial, in a table of results."""

    label: str  # dense, uniform, analytic, best, or what proposed it
    trial: int | None  # its number; None for the dense model
    keep_ratio: float
    validation: Mapping[str, float]  # metrics on the validation text, and its sizes
    test: Mapping[str, float]  # metrics on the test text; empty if not known


def score_rows(study: StudyRecord, *origins: Origin) -> list[ScoreRow]:
    """Scores of the dense model, the baselines and the best trial, as far as known.

    The first trial with a value of each of the ``origins`` has a row too, before the best.
    """
    state = study.state
    dense = {m.name: m.dense for m in (*study.task.metrics, *SIZES) if m.dense is not None}
    dense |= {**dense_size(study.about), **state.dense}
    first = {record.request.origin: record for record in reversed(state.completed)}
    records = {"uniform": state.uniform, "analytic": state.analytic}
    records |= {origin: first.get(origin) for origin in origins} | {"best": state.best()}
    tests = {test["trial"]: test["metrics"] for test in state.tests.values()}
    rows = [ScoreRow("dense", None, 1.0, dense, tests.get(None, {}))] if state.dense else []
    for label, record in records.items():
        if record is not None:
            trial, metrics = record.request.trial_index, record.metrics
            rows.append(ScoreRow(label, trial, metrics[KEEP_RATIO], metrics, tests.get(trial, {})))
    return rows


def front(study: StudyRecord) -> list[TrialRecord]:
    """Pareto front from small to large; none at one budget, where sizes differ by rounding."""
    size = size_metric(study)
    return [] if size is None else pareto_front(study.state.completed, size)


def size_metric(study: StudyRecord) -> str | None:
    """Size that a study minimizes beside the loss; ``None`` at one budget."""
    config = study.config
    return None if config.budget.lowest is None else config.search.size


def checkpoints(study: StudyRecord) -> list[dict[str, Any]]:
    """Compressed models that were written, and whether they are still there."""
    headline = study.task.headline.name
    texts = ("validation", "test")
    tag_of = {KEEP_RATIO: KEEP_RATIO} | {f"{text}_{headline}": text for text in texts}
    written = {}
    for event in study.state.checkpoints:
        folder, tags = checkpoint_folder(study, event), event["tags"]
        written[folder] = {
            "trial": event["trial"],
            "folder": folder,
            "exists": (Path(model_folder(folder)) / "config.json").is_file(),
            "format": tags["format"],
            "dtype": tags["dtype"],
            **{key: float(tags[tag]) if tag in tags else None for key, tag in tag_of.items()},
        }
    return list(written.values())


def hypervolume_of(study: StudyRecord) -> dict[str, Any] | None:
    """Area that a searched front dominates, its reference point, and the size."""
    size, completed = size_metric(study), study.state.completed
    reference = size and reference_point(completed, size, study.config.search.thresholds)
    if not size or not reference:
        return None
    points = [(record.metrics["objective"], record.metrics[size]) for record in completed]
    ends = dict(zip((LOSS, size), reference, strict=True))
    return {"value": hypervolume(points, reference), "reference": ends, "size": size}


def metric_columns(task: Task) -> list[str]:
    """Columns of :func:`frame` that hold metrics of trials."""
    timed = [f"{metric.name}{end}" for metric in LATENCIES for end in ("", "_sem")]
    costs = [metric.name for metric in (*SIZES, PARAMETERS)]
    quality = [*(metric.name for metric in task.metrics), "objective"]
    return [*quality, *costs, *timed, "tokens", "peak_memory_gib"]


def frame(study: StudyRecord) -> pd.DataFrame:
    """Table with one row per trial that ended, in the order of their numbers.

    Returns:
        ``trial``, ``origin``, ``outcome``, ``error``, those of :func:`metric_columns`, ``seconds``
        and the four stages that it is the sum of, ``suggestion_s`` and so on,
        ``best_perplexity`` (the headline of the trial of the lowest objective up to this one),
        ``is_best`` (of all), and ``on_front``, of which there is none at one budget. Metrics of
        trials without a value are missing.
    """
    best, headline = study.state.best(), study.task.headline.name
    on_front = {record.request.trial_index for record in front(study)}
    rows = []
    lowest, so_far = math.inf, math.nan
    for record in study.state.ended:
        request, result = record.request, record.result
        assert result is not None
        if record.is_completed and record.metrics["objective"] < lowest:
            lowest, so_far = record.metrics["objective"], record.metrics[headline]
        rows.append(
            {
                **record.metrics,
                "trial": request.trial_index,
                "origin": request.origin,
                "outcome": result.outcome,
                "error": result.error,
                "seconds": math.fsum(record.seconds.values()),
                **{f"{stage}_s": seconds for stage, seconds in record.seconds.items()},
                f"best_{headline}": so_far,
                "is_best": record is best,
                "on_front": request.trial_index in on_front,
            }
        )
    stages = [f"{stage}_s" for stage in STAGES]
    numbers = [*metric_columns(study.task), "seconds", *stages, f"best_{headline}"]
    types = {
        "trial": int, **dict.fromkeys(("origin", "outcome", "error"), object),
        **dict.fromkeys(numbers, float), "is_best": bool, "on_front": bool,
    }  # fmt: skip
    return pd.DataFrame(rows, columns=list(types)).astype(types)


def sensitivity(study: StudyRecord) -> LossCalibration | None:
    """Measured losses of single layers, if there are any; StudyError if their file is damaged."""
    file = sensitivity_file(study.folder)
    try:
        return LossCalibration.load(file) if file.is_file() else None
    except StudyError as error:
        raise StudyError(
            f"{error}. Delete the file: the next search of the study measures it again"
        ) from error


def sums_of_predictions(study: StudyRecord) -> str | None:
    """Say how far sums of predicted losses are off over all scored trials; ``None`` before two."""
    name, state = study.task.minimized.name, study.state
    pairs = pd.DataFrame(
        [
            (record.metrics[PREDICTED], record.metrics[name] - state.dense[name])
            for record in state.completed
            if record.metrics.get(PREDICTED, 0.0) > 0
        ],
        columns=["predicted", "measured"],
    )
    if len(pairs) < 2:
        return None
    ratios = pairs["measured"] / pairs["predicted"]
    text = (
        f"summed predictions of {len(pairs)} trials: measured loss is {ratios.median():.2f} times "
        f"the sum ({ratios.min():.2f} to {ratios.max():.2f})"
    )
    if pairs.nunique().min() < 2:
        return text
    return f"{text}, rank correlation {pairs.rank().corr().iloc[0, 1]:.3f}"


def described(study: StudyRecord) -> dict[str, str]:
    """Say what was searched, under which budget, and how many trials ended: lines by name."""
    about, config, state = study.about, study.config, study.state
    keep, lowest = config.budget.kept(about.itemsize), config.budget.lowest
    unit = UNITS[about.budget.measure]
    budget = f"{about.budget.limit:,} {unit}, {keep:.4g} of the compressible ones"
    if (bits := config.budget.bits_per_parameter) is not None:
        budget += f", {bits:g} bits per parameter"
    if lowest is not None:
        budget = f"from {lowest:.4g} to {keep:.4g} of the {unit} of compressible layers"
    lines = {
        "Model": f"{config.model.name} ({about.dtype} on {about.device})",
        "Method": f"{config.method['name']}, space {config.space.name}",
        "Budget": budget,
        "Covered": covered_text(study),
    }
    if (base := config.model.base) is not None:
        lines["Base"] = (
            f"{base} (fingerprint {about.base_fingerprint}), shared and not counted: sizes are of "
            "what the model adds to it"
        )
    if weight := config.search.kl_weight:
        loss = about.task.minimized.label
        lines["Loss"] = f"{loss} + {weight:g} KL(dense || compressed), which the best has lowest"
    completed, stopped, failed, tokens = _counts(state).values()
    others = {"stopped early": stopped, "without a value": failed, "not ended": len(state.open)}
    ends = [f"{completed} completed", *(f"{n} {name}" for name, n in others.items() if n)]
    ends += [f"{count_text(tokens)} {about.task.counted} scored"] if tokens else []
    return {**lines, "Trials": ", ".join(ends)}
