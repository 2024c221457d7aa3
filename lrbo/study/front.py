"""Non-dominated results and the hypervolume that they cover, from observations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from lrbo.config.choices import LOSS
from lrbo.trials.records import TrialRecord


def pareto_front(trials: Iterable[TrialRecord], size: str = "parameters") -> list[TrialRecord]:
    """Return the completed trials that no other beats in both loss and size, from small to large.

    A trial is on the front if no other has a lower or equal ``objective`` and a lower or equal
    size with at least one of them lower; of equal trials the first is on it.

    Args:
        trials: In any order and state.
        size: The metric of the size.
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
    point = []
    for objective, metric in ((LOSS, "objective"), (size, size)):
        values: dict[str, list[float]] = {"analytic": [], "uniform": []}
        for trial in trials:
            if trial.is_completed and trial.request.origin in values:
                values[trial.request.origin].append(trial.metrics[metric])
        if objective in thresholds:
            point.append(thresholds[objective])
        elif ends := values["analytic"] or values["uniform"]:
            point.append(max(ends) + 0.1 * (max(ends) - min(ends)))
        else:
            return None
    return point[0], point[1]
