"""The runs of one study in one store of MLflow; nothing else asks the store."""

from __future__ import annotations

import io
import logging
import os
import sqlite3
import time
from collections.abc import Iterable, Mapping
from contextlib import closing, redirect_stdout
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from filelock import FileLock, Timeout

from lrbo import mlflow_registry, mlflow_ui
from lrbo.errors import TrackingError, cut
from lrbo.mlflow_entities import (
    TAG_LENGTH,
    file_name,
    first_line,
    input_of,
    key_of,
    metrics_of,
    milliseconds,
    params_of,
    with_tags,
)
from lrbo.options import SQLITE
from lrbo.presentation import Checkpoint, Presentation
from lrbo.storage import is_full, replacing
from lrbo.trial import TrialRecord

log = logging.getLogger(__name__)

# mlflow is imported where it is first used, not here: it takes 1.5 to 2.5 s, which a search that
# tracks nothing, and every command but search, resume and report, would pay for nothing.

BUSY_SECONDS = 3.0  # that an SQLite file may stay locked before it counts as lost
MIGRATION_SECONDS = 15.0  # that another process may take to make the tables of a new store
PAGE = 1000  # runs per answer to a search
# What MLflow calls the end of a trial.
ENDED: Mapping[str, str] = {
    "completed": "FINISHED",
    "stopped": "KILLED",
    "failed": "FAILED",
    "abandoned": "FAILED",
}

# Else the UI opens on traces of chat models instead of the table of runs.
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}


class StudyRuns:
    """The runs of one study in one store; passes on whatever the store raises."""

    def __init__(
        self,
        uri: str,
        experiment: str,
        study_id: str,
        study_name: str,
        artifact_root: Path | None,
        prefix: str = "",
    ) -> None:
        """Connect to the store, and make its tables and the experiment if it has none.

        ``prefix`` is put before the names of the variables that a trial has as params.
        """
        self._database = _sqlite_file(uri)
        self._study_id = study_id
        self._study_name = study_name
        self._prefix = prefix
        self._client: Any
        location = None
        if self._database is None:
            self._client = _client(uri)
        else:
            self._database.parent.mkdir(parents=True, exist_ok=True)
            if not self._database.exists():
                _client_class()  # imported before, so that nobody waits for that
                # The lock, because of searches that begin at once only one is to make the tables.
                with FileLock(f"{self._database}.lock", timeout=MIGRATION_SECONDS):
                    if not self._database.exists():
                        _make_store(self._database)
            self._file = _identity(self._database)
            self._check_free()
            self._client = _client(uri)
            _prepare_engine(self._client)
            root = artifact_root or self._database.parent / "mlartifacts"
            location = (root.resolve() / file_name(experiment)).as_uri()
        self._experiment_id = self._find_experiment(experiment, location)
        self._parent_id = ""
        self._parent_started = 0
        self._artifacts: Path | None = None  # of the parent run, where they are files here
        self._shown: set[int] = set()
        self._half_written: dict[int, str] = {}
        self._values: dict[int, tuple[float, float]] = {}  # objective and nll of a trial

    def begin(self, config: Mapping[str, Any]) -> None:
        """Find or make the parent run, and look up which trials have their child run."""
        found = self._search(with_tags(study_id=self._study_id, role="study"))
        if found:
            parent = min(found, key=lambda run: (run.info.start_time, run.info.run_id))
            self._client.update_run(parent.info.run_id, status="RUNNING")
        else:
            tags = self._tags("study")
            parent = self._client.create_run(
                self._experiment_id, tags=tags, run_name=self._study_name
            )
        self._parent_id = parent.info.run_id
        self._parent_started = parent.info.start_time
        place = urlparse(parent.info.artifact_uri)
        self._artifacts = Path(unquote(place.path)) if place.scheme == "file" else None
        known = parent.data.params
        params = {key: value for key, value in config.items() if key_of(key) not in known}
        self._log(self._parent_id, params=params_of(params))
        for run in self._search(f"tags.`mlflow.parentRunId` = '{self._parent_id}'"):
            number = run.data.tags.get("lrbo.trial", "")
            if not number.isdecimal():  # a run that somebody else put there
                continue
            index = int(number)
            if run.info.status in ENDED.values():
                self._shown.add(index)
                if "nll" in run.data.metrics:
                    self._values[index] = _values(run.data.metrics)
            else:
                self._half_written[index] = run.info.run_id

    def show(self, record: TrialRecord) -> bool:
        """Write the child run of a trial that ended, unless it is there; return whether it was.

        The run is closed last, so one that is closed is whole and its numbers are on the parent.
        """
        request, result = record.request, record.result
        index = request.trial_index
        if result is None or index in self._shown:
            return False
        self._check_free()
        if index in self._half_written:
            self._client.delete_run(self._half_written.pop(index))
        tags = {
            **self._tags("trial"),
            "mlflow.parentRunId": self._parent_id,
            "lrbo.trial": str(index),
            "lrbo.origin": request.origin,
            "lrbo.outcome": result.outcome,
        }
        if result.error is not None:
            tags["lrbo.error"] = cut(result.error, TAG_LENGTH)
        ended = milliseconds(time.time() if record.ended is None else record.ended)
        started = ended if record.started is None else milliseconds(record.started)
        ended = max(started, ended)  # the clock of the machine may have been set back in between
        run = self._client.create_run(
            self._experiment_id, start_time=started, tags=tags, run_name=f"trial-{index:03d}"
        )
        run_id = run.info.run_id
        self._client.log_text(run_id, request.allocation.to_json(), "allocation.json")
        # What stands before a slash is a section of its own on the page of charts.
        seconds = {f"seconds/{name}": value for name, value in record.seconds.items()}
        self._log(
            run_id,
            metrics=metrics_of({"trial": index, **record.metrics, **seconds}, ended, index),
            params=params_of(
                {
                    # The keep ratio of a front is no weight, whatever the others are.
                    k if k == "keep_ratio" else f"{self._prefix}{k}": v
                    for k, v in request.variables.items()
                }
            ),
        )
        # With the time of the trial, not of the writing: MLflow then drops a second copy, as
        # one left by a process that was killed before it closed the child run.
        self._log(self._parent_id, metrics=metrics_of(self._progress(record), ended, index))
        self._close(run_id, ENDED[result.outcome], ended)
        self._shown.add(index)
        return True

    def summarize(self, metrics: Mapping[str, float], artifacts: Iterable[Path]) -> None:
        """Put numbers, at the step of the last trial, and files on the parent run."""
        self._check_free()
        last = max(self._shown, default=0)
        now = milliseconds(time.time())
        self._log(self._parent_id, metrics=metrics_of(metrics, now, last))
        for path in artifacts:
            folder = "figures" if path.suffix == ".png" else ""
            try:
                self._client.log_artifact(self._parent_id, str(path), folder or None)
            except OSError as error:
                if not is_full(error) or self._artifacts is None:
                    raise
                # Half of a copy is worth nothing, and holds the room that the store itself needs.
                (self._artifacts / folder / path.name).unlink(missing_ok=True)
                log.warning("%s has no room beside the runs of MLflow (%s)", path, error)

    def present(self, shown: Presentation) -> None:
        """Put description and texts on the parent run, and saved views on the experiment."""
        self._check_free()
        if shown.note:
            note = cut(shown.note, TAG_LENGTH)
            self._client.set_tag(self._parent_id, "mlflow.note.content", note, synchronous=True)
        if shown.datasets:  # one that the run has already is not added again
            self._enter([input_of(one) for one in shown.datasets])
        for name, value in shown.views.items():
            self._client.set_experiment_tag(self._experiment_id, name, value)

    def register(self, checkpoint: Checkpoint) -> bool:
        """Make a checkpoint a version of the study's registered model; return whether it was not.

        Raises:
            MlflowException: If there is no run of its trial.
        """
        from mlflow.exceptions import MlflowException

        self._check_free()
        runs = self._search(with_tags(study_id=self._study_id, trial=str(checkpoint.trial)))
        if not runs:
            raise MlflowException(f"it has no run of trial {checkpoint.trial}")
        return mlflow_registry.register(
            self._client,
            self._study_name,
            self._study_id,
            checkpoint,
            runs[0].info.run_id,
            is_local=self._database is not None,
        )

    def finish(self, status: str) -> None:
        """Close the parent run."""
        self._check_free()
        ended = max(self._parent_started, milliseconds(time.time()))  # whatever the clock says
        self._close(self._parent_id, status, ended)

    def _tags(self, role: str) -> dict[str, str]:
        """Return what every run of the study is found and told apart by."""
        return {
            "lrbo.study": self._study_name,
            "lrbo.study_id": self._study_id,
            "lrbo.role": role,
            "mlflow.source.name": "lrbo",
            "mlflow.source.type": "LOCAL",
        }

    def _progress(self, record: TrialRecord) -> dict[str, float]:
        """Return what the parent shows over the trials; the best is of those up to this one."""
        index, metrics = record.request.trial_index, record.metrics
        progress = {name: metrics[name] for name in ("nll", "keep_ratio") if name in metrics}
        if "nll" in metrics:
            self._values[index] = _values(metrics)
            so_far = (values for other, values in self._values.items() if other <= index)
            progress["best_nll"] = min(so_far)[1]
        return progress

    def _enter(self, inputs: list[Any]) -> None:
        """Enter texts on the parent run; mlflow looks first whether another study has the same."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.log_inputs(self._parent_id, inputs)
        except MlflowException as error:
            if "UNIQUE constraint" not in str(error):
                raise
            self._client.log_inputs(self._parent_id, inputs)  # which entered it in between

    def _log(self, run_id: str, **values: Any) -> None:
        """Write numbers or params now, whatever the environment wishes for other programs.

        What is written later may fail unseen, and would end after the run is closed.
        """
        self._client.log_batch(run_id, synchronous=True, **values)

    def _close(self, run_id: str, status: str, ended: int) -> None:
        """Set the last status of a run."""
        with redirect_stdout(io.StringIO()):  # a server's client prints two lines for every run
            self._client.set_terminated(run_id, status=status, end_time=ended)

    def _find_experiment(self, name: str, location: str | None) -> str:
        """Return the id of the experiment, which is made if there is none."""
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                made: str = self._client.create_experiment(
                    name, artifact_location=location, tags=_EXPERIMENT_TAGS
                )
                return made
            except MlflowException:
                found = self._client.get_experiment_by_name(name)
                if found is None:  # it was not that another process was quicker
                    raise
        identity: str = found.experiment_id
        return identity

    def _search(self, condition: str) -> list[Any]:
        """Return all runs of the experiment that meet a condition."""
        runs: list[Any] = []
        token: str | None = None
        while True:
            page = self._client.search_runs(
                [self._experiment_id], condition, max_results=PAGE, page_token=token
            )
            runs += page
            token = page.token
            if not token:
                return runs

    def _check_free(self) -> None:
        """Raise soon if an SQLite file cannot be written now, or is not the one that was opened.

        Without this, mlflow would try to open a file that it cannot read ten times, for 100 s; and
        would write on, without an error, into a file that was deleted.
        """
        if self._database is None:
            return
        if _identity(self._database) != self._file:
            raise FileNotFoundError(f"{self._database} was replaced by another file")
        # mode=rw: by default SQLite makes a file that is not there.
        connection = sqlite3.connect(
            f"{self._database.absolute().as_uri()}?mode=rw",
            timeout=BUSY_SECONDS,
            isolation_level=None,
            uri=True,
        )
        with closing(connection):
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")


def _client_class() -> Any:
    """Import mlflow's client, with the store of SQLite files, which takes a second of its own."""
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
    from mlflow import MlflowClient

    # It shows a traceback of everything that it raises; the import has set a level of its own.
    logging.getLogger("mlflow").setLevel(logging.CRITICAL)
    return MlflowClient


def _client(uri: str) -> Any:
    """Open a store for runs and registered models, whatever else the environment names for them.

    What it says on how to reach a server (user, password, token, certificates, proxies) counts, and
    so does patience of the user's own. Without any, a server that does not answer is asked twice;
    mlflow would try for minutes, or for as long as the server says.
    """
    if _sqlite_file(uri) is None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER", "false")
    return _client_class()(tracking_uri=uri, registry_uri=uri)


def pages_of_runs(uri: str) -> dict[str, str]:
    """Return the ends of the UI's addresses that show runs, by what they show, newest study first.

    Raises:
        TrackingError: If the store cannot be read; the UI could not read it either.
    """
    try:
        experiments = _client(uri).search_experiments()
    except store_errors() as error:
        where = first_line(uri)
        if is_other_version(error):
            raise TrackingError(other_version(where)) from error
        reason = first_line(f"{type(error).__name__}: {error}")
        raise TrackingError(
            f"the MLflow store at {where} cannot be read ({reason}). What lrbo put there is in the "
            "journals; move a damaged file away and make it again with: lrbo report 'study=*' "
            "sync=true"
        ) from error
    pages = {}
    for found in experiments:
        if found.name == "Default":  # mlflow's own, which is always there and empty
            continue
        pages[f"runs of {found.name}"] = mlflow_ui.address(found.experiment_id)
        for key, name in mlflow_ui.saved_views(found.tags).items():
            pages[f"{name} ({found.name})"] = mlflow_ui.address(found.experiment_id, key)
    return pages


def is_other_version(error: Exception) -> bool:
    """Return whether a store failed because another version of mlflow made its tables."""
    from alembic.util import CommandError

    return isinstance(error, CommandError) or "database schema" in str(error)


def is_busy(error: Exception) -> bool:
    """Tell a file that other processes are writing from one that is lost."""
    return isinstance(error, Timeout) or "database is locked" in str(error)


def other_version(uri: str) -> str:
    """Return what to do with a store of another version."""
    from mlflow import __version__

    return (
        f"the MLflow store at {uri} was made by another version of mlflow than {__version__}. If "
        f"by an older one, upgrade it with: mlflow db upgrade {uri}. Or move it away and make it "
        "again from the journals, which have everything that lrbo put there: lrbo report "
        "'study=*' sync=true"
    )


def store_errors() -> tuple[type[Exception], ...]:
    """Return what a store raises when it fails; those of requests and filelock are OSErrors."""
    from alembic.util import CommandError  # tables that another version of mlflow made
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    # ImportError: mlflow beside a SQLAlchemy that it does not know.
    return (MlflowException, SQLAlchemyError, CommandError, sqlite3.Error, OSError, ImportError)


def _values(metrics: Mapping[str, float]) -> tuple[float, float]:
    """Return what the best trial has lowest, and its nll."""
    return metrics.get("objective", metrics["nll"]), metrics["nll"]


def absolute_uri(uri: str) -> str:
    """Return a SQLite address that does not depend on the working folder."""
    if not uri.startswith(SQLITE) or uri == SQLITE:
        return uri
    return f"{SQLITE}{Path(uri.removeprefix(SQLITE)).absolute()}"


def _sqlite_file(uri: str) -> Path | None:
    """Return the file of an SQLite store, ``None`` for any other."""
    path = uri.removeprefix(SQLITE)
    return None if path in (uri, "", ":memory:") else Path(path)


def _make_store(database: Path) -> None:
    """Make an SQLite store beside its place and rename it.

    A process that is killed while mlflow makes its tables leaves a file that mlflow can never
    open again. The name is a new one each time, because mlflow keeps what it knows of an address,
    and would make no tables there once more after the store was deleted.
    """
    with replacing(database) as beside:
        _client(f"{SQLITE}{beside}")


def _identity(file: Path) -> tuple[int, int]:
    """Return what tells a file from another one that took its place.

    Raises:
        FileNotFoundError: If there is none.
    """
    found = file.stat()
    return found.st_dev, found.st_ino


def _prepare_engine(client: Any) -> None:
    """Drop connections to a file that was here before, and shorten the wait for a locked one.

    mlflow keeps one engine per address for the whole process, and sets 20 s in each session, with
    no option for it; here it is :data:`BUSY_SECONDS`. The engine is not public: where another
    version keeps it elsewhere, a lock that comes up in the middle of a call costs 20 s, and a
    store that was deleted comes back with the next process only.
    """
    from sqlalchemy import event

    store = getattr(getattr(client, "_tracking_client", None), "store", None)
    engine = getattr(store, "engine", None)
    if engine is None:
        return
    engine.dispose()
    name = "before_cursor_execute"
    if not event.contains(engine, name, _set_busy_timeout):
        event.listen(engine, name, _set_busy_timeout, retval=True)


def _set_busy_timeout(
    connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool
) -> tuple[str, Any]:
    """Replace the time in mlflow's statement; a hook of SQLAlchemy."""
    del connection, cursor, context, many
    if statement.startswith("PRAGMA busy_timeout"):
        statement = f"PRAGMA busy_timeout = {round(1000 * BUSY_SECONDS)}"
    return statement, parameters
