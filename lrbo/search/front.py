"""Non-dominated results, from observations."""

from __future__ import annotations

from collections.abc import Iterable

from lrbo.trial import TrialRecord


def pareto_front(trials: Iterable[TrialRecord]) -> list[TrialRecord]:
    """Return the completed trials that no other beats in both loss and size.

    A trial is on the front if no other has a lower or equal ``nll`` and a lower or equal
    number of ``parameters`` with at least one of them lower. Of equal trials the first is kept.

    Args:
        trials: In any order and state; those without a value are passed over.

    Returns:
        The front from small to large.
    """
    completed = [trial for trial in trials if trial.is_completed]
    completed.sort(key=lambda t: (t.metrics["parameters"], t.metrics["nll"], t.request.trial_index))
    front: list[TrialRecord] = []
    for trial in completed:
        if not front or trial.metrics["nll"] < front[-1].metrics["nll"]:
            front.append(trial)
    return front
