"""What a search adds to the allocation that it starts from, with the error of the difference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lrbo.optimization.study import StudyState
from lrbo.paired import paired_difference
from lrbo.trial import TrialRecord

ERRORS = 2.0  # standard errors, within which a difference is none that was measured
UNIT = "nats per token"
MEANING = (
    "best - analytic: the same windows in both, +- one standard error over windows; within two of "
    "them no difference was measured. The best trial was chosen on the validation text, which "
    "flatters it there; nothing was chosen on the test text"
)


def with_error(value: float, error: float) -> str:
    """Write a number and its standard error to the digits that the error leaves.

    Example:
        >>> with_error(-0.00123, 0.00207), with_error(1.2345, 0.51), with_error(31.4, 12.0)
        ('-0.0012 +- 0.0021', '1.23 +- 0.51', '31 +- 12')
    """
    if not (error > 0 and math.isfinite(error)):
        return f"{value:.4g} +- {error:.2g}"
    digits = max(0, 1 - math.floor(math.log10(float(f"{error:.1e}"))))
    return f"{value:.{digits}f} +- {error:.{digits}f}"


@dataclass(frozen=True)
class Difference:
    """What a trial loses more than another on the same text, nats per token.

    Attributes:
        nats: Mean over the windows; below 0 the trial is better.
        error: Its standard error, of paired windows; ``None`` where single windows are not known.
    """

    nats: float
    error: float | None

    @classmethod
    def paired(cls, mine: Sequence[float], other: Sequence[float], nats: float) -> Difference:
        """Compare two trials window by window.

        Args:
            mine: Mean nats per token of each window.
            other: Of the other trial, on the same windows; empty like ``mine`` if not known.
            nats: The difference of the means, for where windows are not known.
        """
        if len(mine) != len(other) or len(mine) < 2:
            return cls(nats, None)
        return cls(*paired_difference(mine, other))

    @property
    def is_measurable(self) -> bool | None:
        """Return whether it is beyond two standard errors; ``None`` if nobody can tell."""
        return None if self.error is None else abs(self.nats) > ERRORS * self.error

    def __str__(self) -> str:
        """Write it as what it is: a difference, none, or one of which the error is not known."""
        if self.error is None:
            return f"{self.nats:+.4f}, its error is not known"
        text = with_error(self.nats, self.error)
        return text if self.is_measurable else f"no measurable difference: {text}"


@dataclass(frozen=True)
class Gain:
    """The best trial of a budget beside the analytic allocation of the same budget.

    Attributes:
        analytic: Of least predicted loss: where the search starts.
        best: Of the lowest objective within the same budget.
        validation: Best minus analytic on the validation text.
        test: The same on the test text; ``None`` where one of the two was not scored on it.
    """

    analytic: TrialRecord
    best: TrialRecord
    validation: Difference
    test: Difference | None

    @property
    def adds_nothing(self) -> bool:
        """Return whether the analytic allocation is the best itself."""
        return self.analytic is self.best

    @property
    def sentences(self) -> list[str]:
        """Write the differences where no table says what they are."""
        return [
            f"best - analytic, {UNIT}, {name} text: {line}" for name, line in self.lines.items()
        ]

    @property
    def lines(self) -> dict[str, str]:
        """Write the differences, by text."""
        if self.adds_nothing:
            return {"any": "none: the best trial is the analytic one"}
        texts = {"validation": self.validation, "test": self.test}
        return {name: str(found) for name, found in texts.items() if found is not None}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values: trials, keep ratio, and the differences by text."""
        texts = {"validation": self.validation, "test": self.test}
        return {
            "keep_ratio": self.analytic.metrics["keep_ratio"],
            "analytic": self.analytic.request.trial_index,
            "best": self.best.request.trial_index,
            **{
                name: None
                if found is None
                else {
                    "difference": found.nats,
                    "standard_error": found.error,
                    "is_measurable": found.is_measurable,
                }
                for name, found in texts.items()
            },
        }


def gains(state: StudyState) -> list[Gain]:
    """Return what the search adds, at each budget of an analytic trial, from large to small.

    There is one at one budget, and several on a front, whose best trial at any size would be
    compared with a smaller model; there is none where losses were not predicted.
    """
    analytic = [r for r in state.completed if r.request.origin == "analytic"]
    analytic.sort(key=lambda r: -r.metrics["keep_ratio"])
    return [_gain(state, record) for record in analytic]


def _gain(state: StudyState, analytic: TrialRecord) -> Gain:
    """Compare an analytic trial with the best of those that its budget holds."""
    ceiling = analytic.request.allocation.budget.parameters
    within = [r for r in state.completed if r.request.allocation.parameters <= ceiling]
    best = min(within, key=lambda r: r.metrics["objective"])
    mine, other = (record.result.window_nll if record.result else () for record in (best, analytic))
    validation = Difference.paired(mine, other, best.metrics["nll"] - analytic.metrics["nll"])
    tests = {test["trial"]: test for test in state.tests.values()}
    found = [tests.get(record.request.trial_index) for record in (best, analytic)]
    test = None
    if found[0] is not None and found[1] is not None:
        means = [one["metrics"]["nll"] for one in found if one is not None]
        test = Difference.paired(
            found[0]["window_nll"], found[1]["window_nll"], means[0] - means[1]
        )
    return Gain(analytic, best, validation, test)
