"""Show a study to people: in MLflow, or nowhere; what could not be shown is shown later."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lrbo.errors import TrackingError
from lrbo.mlflow_entities import first_line
from lrbo.mlflow_store import StudyRuns, is_busy, is_other_version, other_version, store_errors
from lrbo.presentation import Checkpoint, Presentation
from lrbo.shell import command as command_line
from lrbo.trial import TrialRecord

log = logging.getLogger(__name__)

RETRY_SECONDS = 60.0  # between attempts to reach a store that was lost
# Before each attempt at what nothing comes after, where other processes keep a store busy.
LAST_WAITS = (0.0, 1.0, 2.0, 4.0, 8.0)


@runtime_checkable
class Tracker(Protocol):
    """Shows a study to people; never decides, delays or loses anything."""

    def start(self, config: Mapping[str, Any]) -> None:
        """Begin or continue the study's parent run, with its flat configuration as params."""
        ...

    def trial(self, record: TrialRecord) -> None:
        """Show one trial that ended."""
        ...

    def sync(self, records: Iterable[TrialRecord]) -> int:
        """Show every ended trial that is not shown yet, and return how many those were."""
        ...

    def present(self, shown: Presentation) -> None:
        """Show what stands around the numbers: description, texts, saved views."""
        ...

    def checkpoint(self, written: Checkpoint) -> None:
        """Show a compressed model that was written, once; needs no :meth:`start`."""
        ...

    def summary(self, metrics: Mapping[str, float], artifacts: Iterable[Path]) -> None:
        """Put study-wide numbers, figures and tables on the parent run."""
        ...

    def finish(self, *, completed: bool) -> None:
        """Close the parent run: finished, or killed if the search is to be continued."""
        ...


class NullTracker:
    """Shows nothing."""

    def start(self, config: Mapping[str, Any]) -> None:
        """Do nothing."""

    def trial(self, record: TrialRecord) -> None:
        """Do nothing."""

    def sync(self, records: Iterable[TrialRecord]) -> int:
        """Do nothing."""
        del records
        return 0

    def present(self, shown: Presentation) -> None:
        """Do nothing."""

    def checkpoint(self, written: Checkpoint) -> None:
        """Do nothing."""

    def summary(self, metrics: Mapping[str, float], artifacts: Iterable[Path]) -> None:
        """Do nothing."""

    def finish(self, *, completed: bool) -> None:
        """Do nothing."""


class MlflowTracker:
    """Shows a study in MLflow: a parent run, and below it a child run per trial.

    The parent carries the configuration, the best value over the trials, figures and tables; a
    child carries the variables, metrics, times and the allocation of its trial. The parent is
    found again by ``study_id``, so a resumed search continues it.

    A store that cannot be reached, is locked, full or deleted costs the search one warning and a
    few seconds: what it lacks is shown with the next trials, tried at most once a minute. What is
    still missing when the process ends is in the journal.

    Note:
        The first use takes seconds (mlflow is imported; a new SQLite store gets its tables), a
        trial some hundredths of a second. Not for several threads.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        study_id: str,
        study_name: str,
        artifact_root: Path | None = None,
        strict: bool = False,
        prefix: str = "",
        keys: Mapping[str, str] | None = None,
    ) -> None:
        """Take note of the store; nothing is imported or opened before it is needed.

        Args:
            uri: ``sqlite:///`` and a file, or the address of a server.
            experiment: Name of the MLflow experiment; made if it does not exist.
            study_id: What the runs of this study are found by; never changes.
            study_name: Name of the study, for people.
            artifact_root: Folder for the artifacts of an SQLite store, ``mlartifacts`` beside
                the file by default. A server has its own.
            strict: Raise :class:`lrbo.errors.TrackingError` where MLflow fails, instead of
                warning and carrying on.
            prefix: Put before the names of variables, to say what their values are.
            keys: What is typed to mean the study; its name alone by default.
        """
        self._uri = uri
        self._experiment = experiment
        self._study_id = study_id
        self._study_name = study_name
        self._artifact_root = artifact_root
        self._strict = strict
        self._prefix = prefix
        self._keys = keys or {"study": study_name}
        self._config: dict[str, Any] = {}
        self._presented = Presentation()
        self._view: StudyRuns | None = None
        self._ended: dict[int, TrialRecord] = {}  # all of them: the store may be lost as a whole
        self._retry_at: float | None = None
        self._summary: tuple[Mapping[str, float], Sequence[Path]] | None = None
        self._is_busy = False  # what was lost last

    def start(self, config: Mapping[str, Any]) -> None:
        """Begin or continue the parent run.

        Args:
            config: Logged as params. MLflow never changes a param, so a key that the run
                already has keeps its first value.
        """
        self._config = dict(config)
        self._view = None
        with self._guarded():
            self._connected()

    def trial(self, record: TrialRecord) -> None:
        """Show one trial that ended, and those that could not be shown before."""
        if record.result is None:
            return
        self._ended[record.request.trial_index] = record
        if self._retry_at is None or time.monotonic() >= self._retry_at:
            self._show_missed()

    def sync(self, records: Iterable[TrialRecord]) -> int:
        """Show every ended trial that is not shown yet, and return how many those were."""
        for record in records:
            if record.result is not None:
                self._ended[record.request.trial_index] = record
        return self._show_missed() if self._retry_at is None else 0

    def present(self, shown: Presentation) -> None:
        """Show description, texts and saved views; again where the store was lost."""
        self._presented = shown
        if self._retry_at is None:
            with self._guarded():
                self._connected().present(shown)

    def checkpoint(self, written: Checkpoint) -> None:
        """Make a checkpoint a version of the study's registered model, unless it is one.

        The parent run stays as it is: a search may be going on.
        """
        self._insist(lambda: (self._view or self._opened()).register(written))

    def summary(self, metrics: Mapping[str, float], artifacts: Iterable[Path]) -> None:
        """Put study-wide numbers and files on the parent run, PNG files under ``figures/``."""
        self._summary = dict(metrics), list(artifacts)
        if self._retry_at is None:
            with self._guarded():
                self._connected().summarize(*self._summary)

    def finish(self, *, completed: bool) -> None:
        """Close the parent run: finished, or killed if the search is to be continued.

        Of a search that came to its end this is the last chance to show what a lost store misses;
        one that was stopped ends at once.
        """
        if completed:
            self._insist(self._finish)
        elif self._retry_at is None:
            with self._guarded():
                self._connected().finish("KILLED")

    def _finish(self) -> None:
        """Show what is missing, and close the parent run."""
        was_lost = self._view is None
        view = self._connected()
        if was_lost:
            self._show_all(view)
            if self._summary is not None:
                view.summarize(*self._summary)
        view.finish("FINISHED")

    def _insist(self, action: Callable[[], object]) -> None:
        """Do what nobody would do later, again where other processes kept the store busy."""
        for seconds in LAST_WAITS:
            time.sleep(seconds)
            self._is_busy = False
            with self._guarded():
                action()
            if not self._is_busy:
                return

    def _show_missed(self) -> int:
        """Show what is not shown yet, in the order of the trials, and return how many."""
        shown = 0
        with self._guarded():
            shown += self._show_all(self._connected())
        return shown

    def _show_all(self, view: StudyRuns) -> int:
        """Show every trial that is not shown yet, and return how many those were."""
        return sum(view.show(self._ended[index]) for index in sorted(self._ended))

    def _connected(self) -> StudyRuns:
        """Return the view, opened anew at first and after a failure."""
        if self._view is None:
            self._view = self._opened()
            self._view.begin(self._config)
            self._view.present(self._presented)
        return self._view

    def _opened(self) -> StudyRuns:
        """Connect to the store."""
        return StudyRuns(
            self._uri,
            self._experiment,
            self._study_id,
            self._study_name,
            self._artifact_root,
            self._prefix,
        )

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Turn a failure of the store into one warning, or into an error if strict."""
        try:
            yield
        except store_errors() as error:
            self._view = None  # what it remembers of the store may be wrong now
            self._is_busy = is_busy(error)
            reason = first_line(f"{type(error).__name__}: {error}")
            where = first_line(self._uri)
            if is_other_version(error):
                reason = other_version(where)
            command = command_line("report", **self._keys, sync=True)
            if self._strict:
                raise TrackingError(
                    f"MLflow at {where} failed ({reason}). The journal of study "
                    f"{self._study_name} is whole; when MLflow works again, run: {command}"
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
        else:
            if self._retry_at is not None:
                log.info("MLflow at %s works again", first_line(self._uri))
            self._retry_at = None
