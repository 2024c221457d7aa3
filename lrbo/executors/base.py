"""Executor and Job."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from lrbo.trial import TrialRequest, TrialResult

Evaluate = Callable[[TrialRequest], TrialResult]


@runtime_checkable
class Job(Protocol):
    """A trial that was handed out."""

    @property
    def job_id(self) -> str:
        """Return a name for messages."""
        ...

    def done(self) -> bool:
        """Return whether :meth:`result` will answer at once."""
        ...

    def result(self) -> TrialResult:
        """Wait for the result and return it."""
        ...

    def cancel(self) -> None:
        """Ask the trial to stop; it may still finish."""
        ...


@runtime_checkable
class Executor(Protocol):
    """A place to run trials."""

    @property
    def capacity(self) -> int:
        """Return how many trials can run at the same time."""
        ...

    def submit(self, worker: Evaluate, request: TrialRequest) -> Job:
        """Hand out a trial."""
        ...
