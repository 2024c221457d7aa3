"""Non-dominated results and the hypervolume that they cover, from observations."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from lrbo.trial import TrialRecord

KEEP_RATIO = "keep_ratio"  # also the variable of a front
# What a search may trade loss against, smaller is better: metrics of every trial, and those that
# are measured where latency.enabled asks for it, each with its standard error beside it.
SIZES = (KEEP_RATIO, "model_parameters", "model_bytes", "macs_per_token")
LATENCIES = ("prefill_latency_ratio", "decode_latency_ratio")
LOSS = "loss"  # the search's objective: nll, and the divergence if it is weighted


def pareto_front(trials: Iterable[TrialRecord], size: str = "parameters") -> list[TrialRecord]:
    """Return the completed trials that no other beats in both loss and size.

    A trial is on the front if no other has a lower or equal ``objective`` and a lower or equal
    size with at least one of them lower. Of equal trials the first is kept.

    Args:
        trials: In any order and state; those without a value are passed over.
        size: The metric that says how large a trial is.

    Returns:
        The front from small to large.
    """
    completed = [trial for trial in trials if trial.is_completed]
    completed.sort(key=lambda t: (t.metrics[size], t.metrics["objective"], t.request.trial_index))
    front: list[TrialRecord] = []
    for trial in completed:
        if not front or trial.metrics["objective"] < front[-1].metrics["objective"]:
            front.append(trial)
    return front


def hypervolume(points: Iterable[tuple[float, float]], reference: tuple[float, float]) -> float:
    """Return the area that points dominate, up to a reference point.

    Args:
        points: Loss and size of each, both to be minimised, in any order.
        reference: Loss and size beyond which nothing counts.

    Returns:
        In units of loss times units of size; 0 if no point is below the reference in both.
    """
    worst, largest = reference
    area, lowest = 0.0, worst
    for size, loss in sorted((size, loss) for loss, size in points if size < largest):
        if loss < lowest:
            area += (lowest - loss) * (largest - size)
            lowest = loss
    return area


def reference_point(
    trials: Sequence[TrialRecord], size: str, thresholds: Mapping[str, float]
) -> tuple[float, float] | None:
    """Return the loss and size from which on a trial is of no use.

    Without thresholds that is a little worse than the allocations of least predicted loss are
    at the ends of the range (than the uniform baselines, if losses are not predicted): a tenth
    of what lies between the ends. Those are evaluated first, so that the point does not move.

    Args:
        trials: Of one study.
        size: The metric that says how large a trial is.
        thresholds: Given ones, by the name of the objective: ``loss`` or the metric.

    Returns:
        ``None`` while the trials that decide it have no value.
    """
    found = []
    for objective, metric in ((LOSS, "objective"), (size, size)):
        if objective in thresholds:
            found.append(thresholds[objective])
            continue
        for origin in ("analytic", "uniform"):
            values = [
                trial.metrics[metric]
                for trial in trials
                if trial.is_completed and trial.request.origin == origin
            ]
            if values:
                found.append(max(values) + 0.1 * (max(values) - min(values)))
                break
        else:
            return None
    return found[0], found[1]


def ceiling_of(point: object) -> tuple[str, float] | None:
    """Return the metric and its largest value that ``keep=0.75`` and the like stand for.

    Returns:
        ``None`` where ``point`` is no such name and number.
    """
    name, is_given, value = str(point).partition("=")
    metrics = {"keep": "keep_ratio"} | {latency: latency for latency in LATENCIES}
    if not is_given or name not in metrics:
        return None
    try:
        return metrics[name], float(value)
    except ValueError:
        return None


def is_point(point: object) -> bool:
    """Return whether ``point`` can name a trial."""
    ceiling = ceiling_of(point)
    if ceiling is None:
        return str(point) == "best" or str(point).isdigit()
    metric, value = ceiling
    return 0 < value <= (1 if metric == "keep_ratio" else math.inf)
