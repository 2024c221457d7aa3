"""Shows a study in MLflow, or nowhere; what could not be shown is shown later."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import Timeout

from lrbo.config.shell import command as command_line
from lrbo.errors import TrackingError
from lrbo.tracking.mlflow_runs import Checkpoint, Presentation, StudyEntry, StudyRuns
from lrbo.tracking.mlflow_store import first_line, other_version, store_errors
from lrbo.tracking.recovery_run import RecoveryRuns
from lrbo.trials.records import TrialRecord

log = logging.getLogger(__name__)

RETRY_SECONDS = 60.0  # between attempts to reach a store that was lost
# Seconds before each last attempt, where other processes keep a store busy.
LAST_WAITS = (0.0, 1.0, 2.0, 4.0, 8.0)


class Tracker:
    """Shows a study to people; never decides, delays or loses anything. This one shows nothing."""

    def start(self, config: Mapping[str, Any]) -> None:
        """Begin or continue the study's parent run, with its flat configuration as params."""

    def trial(self, record: TrialRecord) -> None:
        """Show one trial that ended."""

    def sync(self, records: Iterable[TrialRecord]) -> int:
        """Show every ended trial that is not shown yet, and return how many those were."""
        del records
        return 0

    def present(self, presentation: Presentation) -> None:
        """Show what stands around the numbers: description and texts."""

    def checkpoint(self, checkpoint: Checkpoint) -> None:
        """Show a compressed model that was written, once; needs no :meth:`start`."""

    def recovery(
        self, identity: str, name: str, params: Mapping[str, Any], metrics: Mapping[str, float]
    ) -> None:
        """Show a recovery that ended, unless all of its numbers are shown already."""

    def summary(self, metrics: Mapping[str, float], artifacts: Iterable[Path]) -> None:
        """Put study-wide numbers, figures and tables on the parent run."""

    def finish(self, *, completed: bool) -> None:
        """Close the parent run: finished, or killed if the search is to be continued."""


class NullTracker(Tracker):
    """The tracker of a search without tracking."""


@dataclass
class MlflowTracker(StudyEntry, Tracker):
    """Shows a study in MLflow: a parent run, and below it a child run per trial.

    A store that cannot be reached, is locked, full or deleted costs the search one warning and a
    few seconds: what it lacks is shown with the next trials, tried at most once a minute. Nothing
    is imported or opened before it is needed. Not for several threads.
    """

    strict: bool = False  # raise a TrackingError where MLflow fails, instead of going on
    keys: Mapping[str, str] = field(default_factory=dict)  # to name the study on a command line

    def __post_init__(self) -> None:
        self._config: dict[str, Any] = {}
        self._presentation = Presentation()
        self._view: StudyRuns | None = None
        self._ended: dict[int, TrialRecord] = {}  # all of them: the store may be lost as a whole
        self._retry_at: float | None = None  # set while the store is lost
        self._summary: tuple[Mapping[str, float], Sequence[Path]] | None = None
        self._is_busy = False  # what was lost last

    def start(self, config: Mapping[str, Any]) -> None:
        """Begin or continue the parent run; a param that it already has keeps its first value."""
        self._config = dict(config)
        self._view = None
        self._attempt(self._connected)

    def trial(self, record: TrialRecord) -> None:
        """Show one trial that ended, and those that could not be shown before."""
        if record.result is None:
            return
        self._ended[record.request.trial_index] = record
        if self._retry_at is None or time.monotonic() >= self._retry_at:
            self._attempt(self._show_all)

    def sync(self, records: Iterable[TrialRecord]) -> int:
        """Show every ended trial that is not shown yet, and return how many those were."""
        self._ended |= {r.request.trial_index: r for r in records if r.result is not None}
        return self._attempt(self._show_all) or 0 if self._retry_at is None else 0

    def present(self, presentation: Presentation) -> None:
        """Show description and texts; again where the store was lost."""
        self._presentation = presentation
        if self._retry_at is None:
            self._attempt(lambda: self._connected().present(presentation))

    def checkpoint(self, checkpoint: Checkpoint) -> None:
        """Make a checkpoint a version of the study's registered model, unless it is one."""
        # The parent run stays as it is: a search may be going on.
        self._insist(lambda: (self._view or StudyRuns(self)).register(checkpoint))

    def recovery(
        self, identity: str, name: str, params: Mapping[str, Any], metrics: Mapping[str, float]
    ) -> None:
        """Write the run of a recovery that ended, unless all of its numbers are there."""
        self._insist(lambda: RecoveryRuns(self).complete(identity, name, params, metrics))

    def summary(self, metrics: Mapping[str, float], artifacts: Iterable[Path]) -> None:
        """Put study-wide numbers and files on the parent run, PNG files under ``figures/``."""
        self._summary = numbers, paths = dict(metrics), list(artifacts)
        if self._retry_at is None:
            self._attempt(lambda: self._connected().summarize(numbers, paths))

    def finish(self, *, completed: bool) -> None:
        """Close the parent run: finished, or killed if the search is to be continued."""
        if completed:  # the last chance to show what a lost store misses
            self._insist(self._finish)
        elif self._retry_at is None:
            self._attempt(lambda: self._connected().finish("KILLED"))

    def _finish(self) -> None:
        if self._view is None:
            self._show_all()
            if self._summary is not None:
                self._connected().summarize(*self._summary)
        self._connected().finish("FINISHED")

    def _show_all(self) -> int:
        """Show every trial that is not shown yet, in order, and return how many those were."""
        view = self._connected()
        return sum(view.show(self._ended[index]) for index in sorted(self._ended))

    def _connected(self) -> StudyRuns:
        """Return the view, opened anew at first and after a failure."""
        if self._view is None:
            self._view = StudyRuns(self)
            self._view.begin(self._config)
            self._view.present(self._presentation)
        return self._view

    def _insist(self, action: Callable[[], object]) -> None:
        """Act, again where other processes kept the store busy."""
        for seconds in LAST_WAITS:
            time.sleep(seconds)
            self._is_busy = False
            self._attempt(action)
            if not self._is_busy:
                return

    def _attempt(self, action: Callable[[], Any]) -> Any:
        """Act, and turn a failure of the store into one warning, or into an error if strict."""
        where = first_line(self.uri)
        try:
            result = action()
        except store_errors() as error:
            self._view = None  # what it remembers of the store may be wrong now
            self._is_busy = isinstance(error, Timeout) or "database is locked" in str(error)
            reason = other_version(error, where) or first_line(f"{type(error).__name__}: {error}")
            command = command_line("report", **(self.keys or {"study": self.study_name}), sync=True)
            if self.strict:
                raise TrackingError(
                    f"MLflow at {where} failed ({reason}). The journal of study {self.study_name} "
                    f"is whole; when MLflow works again, run: {command}"
                ) from error
            if self._retry_at is None:
                log.warning(
                    "MLflow at %s failed (%s). No trial is lost and the search goes on: the "
                    "journal has every trial. What MLflow misses comes back by itself if it "
                    "works again during this search; after it, with: %s",
                    where,
                    reason,
                    command,
                )
            self._retry_at = time.monotonic() + RETRY_SECONDS
            return None
        if self._retry_at is not None:
            log.info("MLflow at %s works again", where)
        self._retry_at = None
        return result
