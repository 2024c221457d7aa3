"""The MLflow store: how it is opened and searched, when it is busy, what its failures mean."""

from __future__ import annotations

import logging
import os
import re
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from filelock import FileLock

from lrbo.config.choices import SQLITE
from lrbo.errors import TrackingError, cut
from lrbo.files.atomic import replacing

# mlflow is imported where it is first used: it takes 1.5 to 2.5 s, which most commands do without.

BUSY_SECONDS = 3.0  # that an SQLite file may stay locked before it counts as lost
MIGRATION_SECONDS = 15.0  # that another process may take to make the tables of a new store
PAGE = 1000  # runs of one request
REBUILD = "lrbo report 'study=*' sync=true"
BY_OBJECTIVE = {
    "orderByKey": "metrics.`objective`", "orderByAsc": "true", "compareRunsMode": "CHART",
}  # fmt: skip


class Database:
    """An SQLite file that holds runs; made with its tables if it is not there."""

    def __init__(self, file: Path) -> None:
        """Make the file if need be; a Timeout if another process takes too long for that."""
        self.file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            _client_class()  # imported before, so that nobody waits for that
            with FileLock(f"{file}.lock", timeout=MIGRATION_SECONDS):
                if not file.exists():
                    make_store(file)
        self._status = file.stat()

    def check_free(self) -> None:
        """Raise soon if the file is locked, damaged, deleted or replaced.

        mlflow would try for 100 s to open what it cannot read, and write on into a deleted file.
        """
        if not os.path.samestat(self.file.stat(), self._status):
            raise FileNotFoundError(f"{self.file} was replaced by another file")
        # mode=rw: by default SQLite makes a file that is not there.
        uri = f"{self.file.absolute().as_uri()}?mode=rw"
        with closing(sqlite3.connect(uri, BUSY_SECONDS, isolation_level=None, uri=True)) as file:
            file.execute("BEGIN IMMEDIATE")
            file.execute("ROLLBACK")


def open_client(uri: str) -> Any:
    """Open a store for runs and registered models, whatever store the environment names.

    Unless it sets other limits, a server that does not answer is asked twice, not for minutes.
    """
    if sqlite_file(uri) is None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER", "false")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    return _client_class()(tracking_uri=uri, registry_uri=uri)


def _client_class() -> Any:
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
    from mlflow import MlflowClient

    # It logs a traceback of all that it raises; the import has set a level of its own.
    logging.getLogger("mlflow").setLevel(logging.CRITICAL)
    return MlflowClient


def absolute_uri(uri: str) -> str:
    """Return an SQLite address that does not depend on the working folder."""
    file = sqlite_file(uri)
    return uri if file is None else f"{SQLITE}{file.absolute()}"


def sqlite_file(uri: str) -> Path | None:
    """Return the file of an SQLite store, ``None`` for any other."""
    path = uri.removeprefix(SQLITE)
    return None if path in (uri, "", ":memory:") else Path(path)


def make_store(database: Path) -> None:
    """Make an SQLite store under a new name and rename it.

    mlflow can never open a store whose tables a killed process half made.
    """
    with replacing(database) as beside:
        open_client(f"{SQLITE}{beside}")


def prepare_engine(client: Any) -> None:
    """Drop connections to a file that was here before, and wait :data:`BUSY_SECONDS` for a lock.

    mlflow keeps one engine per address, and waits 20 s; where it is missing, mlflow's ways stay.
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
    _connection: Any, _cursor: Any, statement: str, parameters: Any, _context: Any, _many: bool
) -> tuple[str, Any]:
    """Replace the time in mlflow's statement; a hook of SQLAlchemy."""
    if statement.startswith("PRAGMA busy_timeout"):
        statement = f"PRAGMA busy_timeout = {round(1000 * BUSY_SECONDS)}"
    return statement, parameters


def search_runs(
    client: Any, experiment_id: str, condition: str, order_by: Sequence[str] = ()
) -> list[Any]:
    """Return all runs that meet a condition."""
    from mlflow.utils import get_results_from_paginated_fn

    def page(count: int, token: Any) -> Any:
        return client.search_runs(
            [experiment_id], condition, max_results=count, order_by=[*order_by], page_token=token
        )

    return list(get_results_from_paginated_fn(page, PAGE))


def pages_of_studies(uri: str) -> dict[str, str]:
    """Return the ends of the UI's addresses of studies, by what they show, newest first."""
    pages, condition = {}, with_tags(role="study")
    try:
        client = open_client(uri)
        for experiment in client.search_experiments():
            if experiment.name == "Default":  # mlflow's own, which is always there and empty
                continue
            identity = experiment.experiment_id
            pages[f"studies of {experiment.name}"] = _page(identity, condition)
            for run in search_runs(client, identity, condition, ["attributes.start_time DESC"]):
                name = f"{run.info.run_name} ({experiment.name})"
                pages[name] = f"#/experiments/{identity}/runs/{run.info.run_id}"
                trials = with_tags(study_id=run.data.tags["lrbo.study_id"], role="trial")
                pages[f"trials of {name}"] = _page(identity, trials, **BY_OBJECTIVE)
    except store_errors() as error:
        where, reason = first_line(uri), first_line(f"{type(error).__name__}: {error}")
        raise TrackingError(
            other_version(error, where)
            or f"the MLflow store at {where} cannot be read ({reason}). What lrbo put there is in "
            f"the journals; move a damaged file away and make it again with: {REBUILD}"
        ) from error
    return pages


def _page(experiment_id: str, condition: str, **options: str) -> str:
    # Without the type, the UI opens on traces of chat models.
    query = {"workflowType": "machine_learning", "searchFilter": condition, **options}
    return f"#/experiments/{experiment_id}/runs?{urlencode(query, quote_via=quote)}"


def other_version(error: Exception, uri: str) -> str:
    """Return advice on a store whose tables another version of mlflow made, ``""`` otherwise."""
    from alembic.util import CommandError
    from mlflow import __version__

    if not isinstance(error, CommandError) and "database schema" not in str(error):
        return ""
    return (
        f"the MLflow store at {uri} was made by another version of mlflow than {__version__}. If "
        f"by an older one, upgrade it with: mlflow db upgrade {uri}. Or move it away and make it "
        f"again from the journals, which have everything that lrbo put there: {REBUILD}"
    )


def store_errors() -> tuple[type[Exception], ...]:
    """The errors of a store that fails; those of requests and filelock are OSErrors."""
    from alembic.util import CommandError  # tables that another version of mlflow made
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    # ImportError: mlflow beside a SQLAlchemy that it does not know.
    return (MlflowException, SQLAlchemyError, CommandError, sqlite3.Error, OSError, ImportError)


def with_tags(**values: str) -> str:
    """Write the condition that runs or versions have these tags of ours.

    MLflow's conditions have no escape for quotes, so other values than lrbo makes are refused.
    """
    for name, value in values.items():
        if not re.fullmatch(r"[\w -]+", value):
            raise TrackingError(
                f"lrbo.{name}={value!r}: expected letters, digits and hyphens, as lrbo makes them; "
                "study.json or journal.jsonl of the study was changed"
            )
    return " and ".join(f"tags.`lrbo.{name}` = '{value}'" for name, value in values.items())


def first_line(text: object) -> str:
    """Return the first line of a message, without a password that an address may carry."""
    return cut(re.sub(r"//[^/@\s]+@", "//", str(text)).strip().partition("\n")[0], 300)
