"""What a search adds to the allocation that it starts from, with the error of the difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lrbo.study.state import StudyState
from lrbo.tasks.metrics import Metric, with_error
from lrbo.trials.racing import paired_difference
from lrbo.trials.records import TrialRecord

ERRORS = 2.0  # standard errors, within which no difference was measured
MEANING = (
    "best - analytic: the same windows in both, +- one standard error over windows; within two of "
    "them no difference was measured. The best trial was chosen on the validation text, which "
    "flatters it there; nothing was chosen on the test text"
)


@dataclass(frozen=True)
class Difference:
    """What a trial loses more than another on the same text, in the metric that is minimized."""

    mean: float  # over the windows; below 0 the trial is better
    error: float | None  # standard error of paired windows; None where single ones are not known

    @classmethod
    def paired(cls, losses: Sequence[float], baseline: Sequence[float], mean: float) -> Difference:
        """Compare losses of the same windows; where they are not known, only ``mean`` is."""
        if len(losses) != len(baseline) or len(losses) < 2:
            return cls(mean, None)
        return cls(*paired_difference(losses, baseline))

    @property
    def is_measurable(self) -> bool | None:
        """Whether it is beyond two standard errors; ``None`` without an error."""
        return None if self.error is None else abs(self.mean) > ERRORS * self.error

    def __str__(self) -> str:
        if self.error is None:
            return f"{self.mean:+.4f}, its error is not known"
        text = with_error(self.mean, self.error)
        return text if self.is_measurable else f"no measurable difference: {text}"


@dataclass(frozen=True)
class Gain:
    """The best trial of a budget beside the analytic allocation of the same budget."""

    metric: Metric
    analytic: TrialRecord
    best: TrialRecord  # of the lowest objective within the same budget
    differences: Mapping[str, Difference]  # by text: validation, and test where both have one

    @property
    def lines(self) -> dict[str, str]:
        """The differences in words, by text."""
        if self.best is self.analytic:
            return {"any": "none: the best trial is the analytic one"}
        return {text: str(difference) for text, difference in self.differences.items()}

    @property
    def sentences(self) -> list[str]:
        """The differences in words, where no table says what they are."""
        what = f"best - analytic, {self.metric.unit or self.metric.label}"
        return [f"{what}, {name} text: {line}" for name, line in self.lines.items()]

    def to_dict(self) -> dict[str, Any]:
        """Plain values: keep ratio, trials, and the difference on each text or ``None``."""
        plain: dict[str, Any] = {
            "keep_ratio": self.analytic.metrics["keep_ratio"],
            "analytic": self.analytic.request.trial_index,
            "best": self.best.request.trial_index,
            "validation": None,
            "test": None,
        }
        for text, difference in self.differences.items():
            fields = {"difference": difference.mean, "standard_error": difference.error}
            plain[text] = fields | {"is_measurable": difference.is_measurable}
        return plain


def gains(state: StudyState) -> list[Gain]:
    """Gain at each budget of an analytic trial, from large to small.

    One budget has one, and a front several; there is none where losses were not predicted.
    """
    analytic = [record for record in state.completed if record.request.origin == "analytic"]
    analytic.sort(key=lambda record: -record.metrics["keep_ratio"])
    return [_gain(state, record) for record in analytic]


def _gain(state: StudyState, analytic: TrialRecord) -> Gain:
    """Compare an analytic trial with the best of those that its budget holds."""
    metric = state.fixed.task.minimized
    budget = analytic.request.allocation.budget
    within = [
        record
        for record in state.completed
        if record.request.allocation.cost.of(budget.measure) <= budget.limit
    ]
    best = min(within, key=lambda r: r.metrics["objective"])
    pair = (best, analytic)
    tests = {test["trial"]: test for test in state.tests.values()}
    tested = [tests.get(record.request.trial_index) for record in pair]
    scores = {
        "validation": [(r.metrics, r.result.example_losses) for r in pair if r.result],
        "test": [(test["metrics"], test["example_losses"]) for test in tested if test],
    }
    differences = {}
    for text, both in scores.items():
        if len(both) == 2:
            (mine, losses), (baseline, baseline_losses) = both
            mean = mine[metric.name] - baseline[metric.name]
            differences[text] = Difference.paired(losses, baseline_losses, mean)
    return Gain(metric, analytic, best, differences)
