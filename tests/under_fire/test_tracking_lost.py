"""A store that is locked, lost or broken costs a search nothing but a warning."""

import http.server
import logging
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from mlflow import MlflowClient

from lrbo.errors import LrboError, TrackingError
from lrbo.tracking import mlflow_runs, mlflow_store
from lrbo.tracking.tracker import LAST_WAITS, MlflowTracker
from tests.support.mlflow_runs import BEST, Store, record

# Seconds. The first is the promise for a store that is lost, with room for a busy machine; the
# second replaces BUSY_SECONDS where a test waits for a lock.
SOON = 8.0
BUSY = 0.2


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait a moment for a lock, and try again with every trial."""
    monkeypatch.setattr(mlflow_store, "BUSY_SECONDS", BUSY)
    monkeypatch.setattr("lrbo.tracking.tracker.RETRY_SECONDS", 0.0)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        entry.getMessage()
        for entry in caplog.records
        if entry.name == "lrbo.tracking.tracker" and entry.levelno >= logging.WARNING
    ]


@pytest.mark.usefixtures("impatient")
def test_a_locked_store_loses_nothing(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    records = [record(index) for index in range(4)]
    tracker = store.tracker()
    tracker.start({})
    tracker.trial(records[0])
    with store.locked():
        for each in records[1:3]:
            begun = time.monotonic()
            tracker.trial(each)
            assert time.monotonic() - begun < SOON
    (warning,) = warnings_of(caplog)
    for part in ("locked", "No trial is lost", "lrbo report study=my-study sync=true"):
        assert part in warning
    assert list(store.children) == ["trial-000"]
    tracker.trial(records[3])  # brings the others with it
    assert list(store.children) == ["trial-000", "trial-001", "trial-002", "trial-003"]
    assert store.history("best_nll") == dict(enumerate(BEST))
    assert len(warnings_of(caplog)) == 1


@pytest.mark.usefixtures("impatient")
def test_a_store_locked_at_the_start_is_used_later(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = store.tracker()
    with store.locked():
        tracker.start({"seed": 0})
        assert tracker.sync([record(0)]) == 0
    tracker.trial(record(1))
    assert len(warnings_of(caplog)) == 1
    assert store.parent.data.params == {"seed": "0"}
    assert list(store.children) == ["trial-000", "trial-001"]


@pytest.mark.usefixtures("impatient")
def test_a_lock_in_the_middle_of_a_trial_is_no_long_wait(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = store.tracker()
    tracker.start({})
    with store.locked(), monkeypatch.context() as patch:
        patch.setattr(mlflow_runs.StudyRuns, "_check_free", lambda self: None)
        begun = time.monotonic()
        tracker.trial(record(0))
        assert time.monotonic() - begun < SOON
    assert len(warnings_of(caplog)) == 1
    tracker.trial(record(1))
    assert list(store.children) == ["trial-000", "trial-001"]


def test_a_lost_store_is_asked_again_once_a_minute(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mlflow_store, "BUSY_SECONDS", BUSY)
    tracker = store.tracker()
    tracker.start({})
    with store.locked():
        tracker.trial(record(0))
        attempts = 0
        original = MlflowTracker._connected

        def counting(self: MlflowTracker) -> Any:
            nonlocal attempts
            attempts += 1
            return original(self)

        monkeypatch.setattr(MlflowTracker, "_connected", counting)
        tracker.trial(record(1))
        assert tracker.sync([record(2)]) == 0
        tracker.summary({"improvement": 0.5}, [])
        tracker.finish(completed=False)
        assert attempts == 0  # all of them returned at once
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 61)
        tracker.trial(record(3))
        assert attempts == 1
        tracker.trial(record(4))
        assert attempts == 1
    assert len(warnings_of(caplog)) == 1
    monkeypatch.setattr(time, "monotonic", lambda: now + 122)
    tracker.trial(record(5))
    assert list(store.children) == [f"trial-{index:03d}" for index in range(6)]


@pytest.fixture
def dead_server() -> str:
    """Return an address on this machine where nothing listens."""
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://somebody:secret@127.0.0.1:{listener.getsockname()[1]}"


def test_a_server_that_is_down_stops_nothing(
    dead_server: str, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = MlflowTracker(dead_server, "lrbo", uuid.uuid4().hex, "my-study")
    begun = time.monotonic()
    tracker.start({"seed": 0})
    tracker.trial(record(0))
    assert tracker.sync([record(0), record(1)]) == 0
    tracker.summary({"best": 1.0}, [])
    tracker.finish(completed=True)
    assert time.monotonic() - begun < SOON
    (warning,) = warnings_of(caplog)
    assert "127.0.0.1" in warning
    assert "lrbo report study=my-study sync=true" in warning
    assert "secret" not in warning


def test_a_file_that_is_no_store_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "mlflow.db").write_text("not a database " * 100, encoding="utf-8")
    for path in ("mlflow.db", "mlflow.db/below/a/file.db"):
        caplog.clear()
        tracker = MlflowTracker(f"sqlite:///{tmp_path / path}", "lrbo", "0", "my-study")
        begun = time.monotonic()
        tracker.start({})
        assert time.monotonic() - begun < SOON
        assert len(warnings_of(caplog)) == 1


def test_a_defect_is_not_taken_for_a_lost_store(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def defective(self: MlflowClient, *args: Any, **kwargs: Any) -> None:
        raise TypeError("a defect")

    tracker = store.tracker()
    tracker.start({})
    monkeypatch.setattr(MlflowClient, "log_batch", defective)
    with pytest.raises(TypeError, match="a defect"):
        tracker.trial(record(0))


@pytest.mark.usefixtures("impatient")
def test_strict_mode_says_what_failed_and_what_to_do(store: Store, dead_server: str) -> None:
    tracker = store.tracker(strict=True)
    tracker.start({})
    command = r"lrbo report study=my-study sync=true"
    with store.locked():
        with pytest.raises(TrackingError, match=rf"locked.*{command}"):
            tracker.sync([record(0)])
        with pytest.raises(TrackingError, match=command):
            tracker.summary({"improvement": 0.5}, [])
        with pytest.raises(TrackingError, match=command):
            tracker.finish(completed=True)
        with pytest.raises(TrackingError, match=command):
            store.tracker(strict=True).start({})
    assert tracker.sync([record(0)]) == 1
    down = MlflowTracker(dead_server, "lrbo", store.study_id, "my-study", strict=True)
    with pytest.raises(TrackingError, match=r"127\.0\.0\.1") as caught:
        down.start({})
    assert "secret" not in str(caught.value)
    assert isinstance(caught.value, LrboError)


def test_a_process_killed_while_the_tables_are_made_leaves_no_broken_store(
    tmp_path: Path, make_store: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """mlflow can never open a file again in which its migrations were cut off."""
    database = tmp_path / "mlflow.db"
    code = f"""
import os, threading, time
from pathlib import Path
from lrbo.tracking.tracker import MlflowTracker

def kill_when_some_tables_are_there():
    folder = Path({str(tmp_path)!r})
    while not any(file.stat().st_size > 20_000 for file in folder.glob(".lrbo-*.new/mlflow.db")):
        time.sleep(0.001)
    os.kill(os.getpid(), 9)

threading.Thread(target=kill_when_some_tables_are_there, daemon=True).start()
MlflowTracker("sqlite:///{database}", "lrbo", "0", "my-study", strict=True).start({{}})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not database.exists()
    assert len(list(tmp_path.glob(".lrbo-*.new"))) == 1
    monkeypatch.setattr(mlflow_store, "make_store", make_store)
    tracker = MlflowTracker(f"sqlite:///{database}", "lrbo", "0", "my-study", strict=True)
    tracker.start({})
    assert tracker.sync([record(0)]) == 1
    assert not list(tmp_path.glob(".lrbo-*.new"))


def test_a_store_of_another_version_says_what_to_do(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(tmp_path)
    with closing(sqlite3.connect(store.file)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '000000000000'")
        connection.commit()
    other = MlflowTracker(f"sqlite:///{tmp_path}/./mlflow.db", "lrbo", "0", "my-study")
    other.start({})
    (warning,) = warnings_of(caplog)
    for part in ("another version of mlflow", "mlflow db upgrade", "'study=*' sync=true"):
        assert part in warning
    with pytest.raises(TrackingError, match="another version of mlflow"):
        mlflow_store.pages_of_studies(f"sqlite:///{tmp_path}/./mlflow.db")


class Answers(http.server.BaseHTTPRequestHandler):
    """Answers every request with the status that its server has."""

    def answer(self) -> None:
        self.send_response(self.server.status)  # type: ignore[attr-defined]
        self.send_header("Retry-After", "600")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST = answer  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def impatient_with_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give up an answer after a second, as a user can say it."""
    for name in ("MAX_RETRIES", "TIMEOUT"):
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{name}", "1")
    monkeypatch.delenv("MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER", raising=False)


def assert_it_costs_seconds(uri: str, caplog: pytest.LogCaptureFixture) -> None:
    """Show a whole search on a server that is of no use."""
    tracker = MlflowTracker(uri, "lrbo", uuid.uuid4().hex, "my-study")
    begun = time.monotonic()
    tracker.start({"seed": 0})
    for index in range(3):
        tracker.trial(record(index))
    tracker.summary({"best": 1.0}, [])
    tracker.finish(completed=True)
    assert time.monotonic() - begun < 2 * SOON
    assert len(warnings_of(caplog)) == 1


@pytest.mark.usefixtures("impatient_with_servers")
@pytest.mark.parametrize("status", [401, 403, 404, 429, 500, 503])
def test_a_server_that_answers_with_errors_costs_seconds(
    status: int, caplog: pytest.LogCaptureFixture
) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        server.status = status  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            assert_it_costs_seconds(f"http://127.0.0.1:{server.server_port}", caplog)
        finally:
            server.shutdown()


@pytest.mark.usefixtures("impatient_with_servers")
def test_a_server_that_never_answers_costs_seconds(caplog: pytest.LogCaptureFixture) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        assert_it_costs_seconds(f"http://127.0.0.1:{silent.getsockname()[1]}", caplog)


def test_a_name_that_does_not_resolve_costs_seconds(caplog: pytest.LogCaptureFixture) -> None:
    assert_it_costs_seconds("http://no-such-host.invalid:5000", caplog)


def test_patience_with_a_server_is_seconds_unless_the_user_says_otherwise(
    dead_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"MLFLOW_HTTP_{name}" for name in ("REQUEST_MAX_RETRIES", "REQUEST_TIMEOUT")]
    for name in [*names, "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(names[1], "45")
    MlflowTracker(dead_server, "lrbo", "0", "my-study").start({})
    assert [os.environ[name] for name in names] == ["1", "45"]
    assert os.environ["MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER"] == "false"
    for name in [*names, "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER"]:
        monkeypatch.delenv(name)


def test_the_end_of_a_search_shows_what_a_busy_store_missed(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mlflow_store, "BUSY_SECONDS", BUSY)
    tracker = store.tracker()
    with store.locked():
        tracker.start({"seed": 0})
        tracker.trial(record(0))
        tracker.summary({"improvement": 0.5}, [])
    free = threading.Event()

    def busy_for_a_while(seconds: float) -> None:
        if seconds == LAST_WAITS[2]:
            free.set()

    monkeypatch.setattr("lrbo.tracking.tracker.time.sleep", busy_for_a_while)
    original = mlflow_runs.StudyRuns._check_free

    def check(self: mlflow_runs.StudyRuns) -> None:
        if not free.is_set():
            raise sqlite3.OperationalError("database is locked")
        original(self)

    monkeypatch.setattr(mlflow_runs.StudyRuns, "_check_free", check)
    tracker.finish(completed=True)
    assert free.is_set()
    assert store.parent.info.status == "FINISHED"
    assert store.parent.data.metrics["improvement"] == 0.5
    assert list(store.children) == ["trial-000"]
    assert len(warnings_of(caplog)) == 1


def test_a_store_that_is_there_is_opened_without_the_lock_of_its_making(store: Store) -> None:
    with FileLock(f"{store.file}.lock"):
        tracker = store.tracker(strict=True)
        tracker.start({})
    assert store.parent.info.status == "RUNNING"
