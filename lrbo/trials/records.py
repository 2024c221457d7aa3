"""Request, result and record of a trial, and who takes a request and gives a job to wait for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from lrbo.allocation.allocate import Allocation
from lrbo.errors import Outcome

# The uniform baseline, the least predicted loss, the configured start, an allocation of another
# study, the initial Sobol design, the surrogate model, or the line between points of a front.
Origin = Literal["uniform", "analytic", "start", "transfer", "sobol", "model", "between"]


@dataclass(frozen=True)
class TrialRequest:
    """An allocation to evaluate, small enough to send anywhere."""

    trial_index: int  # in its study, from 0
    origin: Origin
    variables: Mapping[str, float]  # the point that the allocation realises; empty without one
    allocation: Allocation
    seed: int
    rival: int | None = None  # the best trial so far: one that is surely worse is given up
    rival_losses: tuple[float, ...] = ()  # of each validation window; set when the trial starts


@dataclass(frozen=True)
class TrialResult:
    """The outcome of a request; its metrics are empty without a value.

    Of a stopped trial the ``objective`` is an estimate, ``objective_sem`` its standard error, and
    there is no ``nll``.
    """

    trial_index: int
    outcome: Outcome  # `stopped` is surely worse than its rival, `failed` may be tried again
    metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    error: str | None = None
    # Of a completed trial: mean nats per token of each window, and divergence from the dense model.
    example_losses: tuple[float, ...] = ()
    example_divergences: tuple[float, ...] = ()


@dataclass(frozen=True)
class TrialRecord:
    """A trial of a study, with Unix times in seconds."""

    request: TrialRequest
    result: TrialResult | None = None  # until the trial ends
    started: float | None = None  # the last of `attempts`
    ended: float | None = None
    attempts: int = 0
    # Spent in `suggestion`, `allocation`, `scoring` and `logging`.
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_completed(self) -> bool:
        """Whether the trial was evaluated on the whole validation text."""
        return self.result is not None and self.result.outcome == "completed"

    @property
    def is_stopped(self) -> bool:
        """Whether the trial was given up, as surely worse than the best."""
        return self.result is not None and self.result.outcome == "stopped"

    @property
    def metrics(self) -> Mapping[str, float]:
        """The metrics; empty without a value."""
        return {} if self.result is None else self.result.metrics


Evaluate = Callable[[TrialRequest], TrialResult]


@runtime_checkable  # type checks of the tests look inside
class Job(Protocol):
    """A submitted trial."""

    def done(self) -> bool:
        """Whether :meth:`result` returns at once."""

    def result(self) -> TrialResult:
        """Wait for the result and return it."""


@runtime_checkable
class Executor(Protocol):
    """Runs trials, as many at a time as it has capacity for."""

    @property
    def capacity(self) -> int:
        """The number of trials that can run at the same time."""

    def submit(self, worker: Evaluate, request: TrialRequest) -> Job:
        """Start a trial, or put it in a queue."""


@dataclass(frozen=True)
class InlineExecutor:
    """Runs each trial in this process, one after the other."""

    capacity: int = 1

    def submit(self, worker: Evaluate, request: TrialRequest) -> Future[TrialResult]:
        """Run the trial to its end."""
        job: Future[TrialResult] = Future()
        job.set_result(worker(request))
        return job
