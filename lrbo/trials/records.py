"""What is asked of a trial and what comes back: plain records that go to JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from lrbo.allocation import Allocation
from lrbo.errors import Outcome

Origin = Literal["uniform", "analytic", "start", "transfer", "sobol", "model", "between"]


@dataclass(frozen=True)
class TrialRequest:
    """What a worker needs to know; small enough to send anywhere.

    Attributes:
        trial_index: Number of the trial in its study, from 0.
        origin: Who proposed it: the uniform baseline, the least predicted loss, the space's
            start values, an allocation of another study, the initial Sobol design, the
            surrogate model, or the line between two points of a front.
        variables: The point of the search space that the allocation realises.
        allocation: The ranks to evaluate.
        seed: Of this trial.
        rival: Number of the best trial so far, where the trial is given up once it is surely
            worse than that one.
        rival_losses: Of each validation window, of the rival; filled in when the trial starts.
    """

    trial_index: int
    origin: Origin
    variables: Mapping[str, float]
    allocation: Allocation
    seed: int
    rival: int | None = None
    rival_losses: tuple[float, ...] = ()


@dataclass(frozen=True)
class TrialResult:
    """What came of a request.

    Attributes:
        trial_index: Number of the trial.
        outcome: ``"completed"``, ``"stopped"`` (given up: surely worse than its rival),
            ``"failed"`` (may be tried again) or ``"abandoned"``.
        metrics: Numbers by name; empty without a value. Of a stopped trial the ``objective`` is
            an estimate, ``objective_sem`` its standard error, and there is no ``nll``.
        seconds: Of the worker, in all.
        error: Why there is no value.
        window_nll: Mean nats per token of each validation window; of a completed trial.
        window_kl: Mean divergence from the dense model of each, likewise.
    """

    trial_index: int
    outcome: Outcome
    metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    error: str | None = None
    window_nll: tuple[float, ...] = ()
    window_kl: tuple[float, ...] = ()


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
        """Return whether the trial was evaluated on the whole validation text."""
        return self.result is not None and self.result.outcome == "completed"

    @property
    def is_stopped(self) -> bool:
        """Return whether the trial was given up, because it was surely worse than the best."""
        return self.result is not None and self.result.outcome == "stopped"

    @property
    def metrics(self) -> Mapping[str, float]:
        """Return the metrics; empty without a value."""
        return {} if self.result is None else self.result.metrics
