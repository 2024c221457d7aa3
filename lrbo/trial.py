"""What is asked of a trial and what comes back: plain records that go to JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from lrbo.allocation import Allocation
from lrbo.errors import Outcome

Origin = Literal["uniform", "analytic", "start", "sobol", "model", "between"]


@dataclass(frozen=True)
class TrialRequest:
    """What a worker needs to know; small enough to send anywhere.

    Attributes:
        trial_index: Number of the trial in its study, from 0.
        origin: Who proposed it: the uniform baseline, the least predicted loss, the space's
            start values, the initial Sobol design, the surrogate model, or the line between
            two points of a front.
        variables: The point of the search space that the allocation realises.
        allocation: The ranks to evaluate.
        seed: Of this trial.
    """

    trial_index: int
    origin: Origin
    variables: Mapping[str, float]
    allocation: Allocation
    seed: int


@dataclass(frozen=True)
class TrialResult:
    """What came of a request.

    Attributes:
        trial_index: Number of the trial.
        outcome: ``"completed"``, ``"failed"`` (may be tried again) or ``"abandoned"``.
        metrics: Numbers by name; empty unless completed.
        seconds: Of the worker, in all.
        error: Why there is no value.
    """

    trial_index: int
    outcome: Outcome
    metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    error: str | None = None


@dataclass(frozen=True)
class TrialRecord:
    """Everything a study knows of a trial.

    Attributes:
        request: What was asked.
        result: What came of it; ``None`` while it has not ended.
        started: Unix time of the last start, seconds; ``None`` before it.
        ended: Unix time of the end, seconds.
        attempts: How often it was started.
        seconds: Where its time went: ``suggestion``, ``allocation``, ``scoring``, ``logging``.
    """

    request: TrialRequest
    result: TrialResult | None = None
    started: float | None = None
    ended: float | None = None
    attempts: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_completed(self) -> bool:
        """Return whether the trial has a value."""
        return self.result is not None and self.result.outcome == "completed"

    @property
    def metrics(self) -> Mapping[str, float]:
        """Return the metrics; empty unless completed."""
        return {} if self.result is None else self.result.metrics
