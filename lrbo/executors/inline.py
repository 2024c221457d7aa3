"""Same process: the default, and what tests use."""

from __future__ import annotations

from dataclasses import dataclass

from lrbo.executors.base import Evaluate
from lrbo.trial import TrialRequest, TrialResult


@dataclass(frozen=True)
class FinishedJob:
    """A trial that ran while it was submitted."""

    job_id: str
    finished: TrialResult

    def done(self) -> bool:
        """Return true: there is nothing to wait for."""
        return True

    def result(self) -> TrialResult:
        """Return the result."""
        return self.finished

    def cancel(self) -> None:
        """Do nothing: the trial is over."""


@dataclass(frozen=True)
class InlineExecutor:
    """Runs each trial in this process, one after the other."""

    capacity: int = 1

    def submit(self, worker: Evaluate, request: TrialRequest) -> FinishedJob:
        """Run the trial now and return its finished job."""
        return FinishedJob(f"trial-{request.trial_index}", worker(request))
