"""Shows a recovery in MLflow: a run below the study's, with curves; or nowhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from lrbo.tracking import mlflow_store as store
from lrbo.tracking.mlflow_runs import StudyEntry, StudyRuns, key_of
from lrbo.tracking.mlflow_store import first_line, store_errors

log = logging.getLogger(__name__)


class RecoveryRun:
    """The run of one recovery, which goes on where it was; this one shows nothing."""

    def log(self, metric: str, value: float, step: int) -> None:
        """Show a number at a step of its own curve."""

    def finish(self, metrics: Mapping[str, float], status: str) -> None:
        """Show the last numbers, and close the run."""


class MlflowRecoveryRun(RecoveryRun):
    """A run in the store of a study. What the store does not take is lost, with one warning."""

    def __init__(self, study: StudyEntry, identity: str, name: str, params: Mapping[str, Any]):
        """Find or make the run with the identity of a recovery; ``params`` are its settings."""
        self._study, self._identity, self._name = study, identity, name
        self._params = dict(params)
        self._run: RecoveryRuns | None = None
        self._is_lost = False
        self._attempt(self._opened)

    def log(self, metric: str, value: float, step: int) -> None:
        """Show a number at a step of its own curve."""
        self._attempt(lambda: self._opened().put({metric: value}, step))

    def finish(self, metrics: Mapping[str, float], status: str) -> None:
        """Show the last numbers, and close the run."""
        self._attempt(lambda: self._opened().close(metrics, status))

    def _opened(self) -> RecoveryRuns:
        if self._run is None:
            self._run = RecoveryRuns(self._study)
            self._run.open(self._identity, self._name, self._params)
        return self._run

    def _attempt(self, action: Any) -> None:
        if self._is_lost:
            return
        try:
            action()
        except store_errors() as error:
            self._is_lost = True
            log.warning(
                "MLflow at %s failed (%s). The recovery goes on, and is no longer shown there.",
                first_line(self._study.uri),
                first_line(f"{type(error).__name__}: {error}"),
            )


class RecoveryRuns(StudyRuns):
    """Writes the run of one recovery."""

    def open(self, identity: str, name: str, params: Mapping[str, Any]) -> None:
        """Find the run with the identity of a recovery, or make it below the study's."""
        own = store.with_tags(study_id=self._study.study_id, role="recovery", recovery=identity)
        if runs := self._search(own):
            run = runs[0]
            self._client.update_run(run.info.run_id, status="RUNNING")
        else:
            tags = self._tags("recovery", recovery=identity)
            of_study = store.with_tags(study_id=self._study.study_id, role="study")
            if parents := self._search(of_study):
                parent = min(parents, key=lambda one: (one.info.start_time, one.info.run_id))
                tags["mlflow.parentRunId"] = parent.info.run_id
            run = self._client.create_run(self._experiment_id, tags=tags, run_name=name)
            self._log(run.info.run_id, {}, 0, 0, params)
        self._run_id, self._started = run.info.run_id, run.info.start_time

    def complete(
        self, identity: str, name: str, params: Mapping[str, Any], metrics: Mapping[str, float]
    ) -> None:
        """Write the run of a recovery that ended, unless all of its numbers are there."""
        own = store.with_tags(study_id=self._study.study_id, role="recovery", recovery=identity)
        for run in self._search(own):
            if run.info.status == "FINISHED" and run.data.metrics.keys() >= {*map(key_of, metrics)}:
                return
        self.open(identity, name, params)
        self.close(metrics, "FINISHED")

    def put(self, metrics: Mapping[str, float], step: int) -> None:
        """Write numbers at a step."""
        self._check_free()
        self._log(self._run_id, metrics, _now(), step)

    def close(self, metrics: Mapping[str, float], status: str) -> None:
        """Write the last numbers, and close the run."""
        self.put(metrics, 0)
        self._client.set_terminated(
            self._run_id, status=status, end_time=max(self._started, _now())
        )


def _now() -> int:
    return round(1000 * time.time())
