"""MLflow shows what the journal says, whatever happens to either of them."""

import dataclasses
import logging
import math
import os
import socket
import sqlite3
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run, ViewType

from lrbo import tracking
from lrbo.allocation import Allocation, Budget
from lrbo.errors import LrboError, TrackingError
from lrbo.tracking import MlflowTracker, NullTracker
from lrbo.trial import TrialRecord, TrialRequest, TrialResult

# Seconds. The first is the promise for a store that is lost, with room for a busy machine; the
# second replaces BUSY_SECONDS where a test waits for a lock.
SOON = 8.0
BUSY = 0.2

STARTED = 1_700_000_000.25
NLL = [3.5, 3.25, 3.75, 3.0]
BEST = [3.5, 3.25, 3.25, 3.0]


def record(index: int, nll: float | None = None, **changes: Any) -> TrialRecord:
    """Build a completed trial with names as a real one has them."""
    name = f"model.layers.{index}.self_attn.q_proj"
    allocation = Allocation({name: 8 + index, "lm_head": None}, 1000 + index, Budget(2000))
    variables = {name: 0.25 + index / 64, "group:attention": 1 / 3}
    request = TrialRequest(index, "sobol", variables, allocation, seed=index)
    value = NLL[index % len(NLL)] if nll is None else nll
    metrics = {"nll": value, "keep_ratio": 0.5 + index / 100, "objective": value}
    return dataclasses.replace(
        TrialRecord(
            request,
            TrialResult(index, "completed", metrics, 2.0),
            started=STARTED + 10 * index,
            ended=STARTED + 10 * index + 2,
            attempts=1,
            seconds={"suggestion": 0.5, "scoring": 2.0},
        ),
        **changes,
    )


def failed(index: int, outcome: str, error: str) -> TrialRecord:
    return record(index, result=TrialResult(index, outcome, {}, 1.0, error))  # type: ignore[arg-type]


class Store:
    """One SQLite store for the whole file (its tables take seconds), and a study of its own."""

    experiment = "with space & more"

    def __init__(self, folder: Path) -> None:
        self.file = folder / "mlflow.db"
        self.uri = f"sqlite:///{self.file}"
        self.artifacts = folder / "all artifacts"
        self.study_id = uuid.uuid4().hex
        self.client = MlflowClient(tracking_uri=self.uri)

    def tracker(self, **options: Any) -> MlflowTracker:
        options = {"artifact_root": self.artifacts, **options}
        return MlflowTracker(self.uri, self.experiment, self.study_id, "my-study", **options)

    def runs(self, view: int = ViewType.ACTIVE_ONLY) -> list[Run]:
        experiment = self.client.get_experiment_by_name(self.experiment)
        if experiment is None:
            return []
        condition = f"tags.`lrbo.study_id` = '{self.study_id}'"
        return list(self.client.search_runs([experiment.experiment_id], condition, view))

    @property
    def parent(self) -> Run:
        (parent,) = [run for run in self.runs() if run.data.tags["lrbo.role"] == "study"]
        return parent

    @property
    def children(self) -> dict[str, Run]:
        found = [run for run in self.runs() if run.data.tags["lrbo.role"] == "trial"]
        assert {run.data.tags["mlflow.parentRunId"] for run in found} <= {self.parent.info.run_id}
        names = [run.info.run_name for run in found]
        assert len(set(names)) == len(names)
        return {run.info.run_name: run for run in sorted(found, key=lambda r: r.info.run_name)}

    def history(self, name: str) -> dict[int, float]:
        points = self.client.get_metric_history(self.parent.info.run_id, name)
        assert len({point.step for point in points}) == len(points)
        return {point.step: point.value for point in points}

    def artifact(self, run: Run, name: str) -> Path:
        return Path(unquote(urlsplit(run.info.artifact_uri).path)) / name

    @contextmanager
    def locked(self) -> Iterator[None]:
        with closing(sqlite3.connect(self.file, isolation_level=None)) as connection:
            connection.execute("BEGIN EXCLUSIVE")
            yield
            connection.execute("ROLLBACK")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mlflow store")


@pytest.fixture
def store(folder: Path) -> Store:
    return Store(folder)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait a moment for a lock, and try again with every trial."""
    monkeypatch.setattr(tracking, "BUSY_SECONDS", BUSY)
    monkeypatch.setattr(tracking, "RETRY_SECONDS", 0.0)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        entry.getMessage()
        for entry in caplog.records
        if entry.name == "lrbo.tracking" and entry.levelno >= logging.WARNING
    ]


# What is shown.


def test_a_study_becomes_a_parent_and_its_trials_children(store: Store) -> None:
    tracker = store.tracker()
    records = [record(index) for index in range(4)]
    tracker.start({"budget.keep_ratio": 0.5, "study": "my-study", "empty": "", "none": None})
    for each in records:
        tracker.trial(each)
    assert store.parent.info.status == "RUNNING"
    tracker.finish(completed=True)

    parent = store.parent
    assert parent.info.status == "FINISHED"
    assert parent.info.run_name == "my-study"
    assert parent.data.params == {
        "budget.keep_ratio": "0.5",
        "study": "my-study",
        "empty": "",
        "none": "None",
    }
    assert store.history("nll") == dict(enumerate(NLL))
    assert store.history("best_nll") == dict(enumerate(BEST))
    assert store.history("keep_ratio") == {
        each.request.trial_index: each.metrics["keep_ratio"] for each in records
    }
    assert list(store.children) == ["trial-000", "trial-001", "trial-002", "trial-003"]
    for each, child in zip(records, store.children.values(), strict=True):
        index = each.request.trial_index
        assert child.info.status == "FINISHED"
        assert child.info.start_time == round(1000 * (STARTED + 10 * index))
        assert child.info.end_time - child.info.start_time == 2000
        assert {
            name: child.data.tags[f"lrbo.{name}"] for name in ("trial", "origin", "outcome")
        } == {"trial": str(index), "origin": "sobol", "outcome": "completed"}
        assert "lrbo.error" not in child.data.tags
        assert {k: float(v) for k, v in child.data.params.items()} == each.request.variables
        assert child.data.metrics == {
            **each.metrics,
            "seconds.suggestion": 0.5,
            "seconds.scoring": 2.0,
        }
        text = store.artifact(child, "allocation.json").read_text(encoding="utf-8")
        assert text == each.request.allocation.to_json()
        assert Allocation.from_json(text) == each.request.allocation


def test_a_trial_without_a_value_is_shown_as_failed_with_its_error(store: Store) -> None:
    tracker = store.tracker(strict=True)
    tracker.start({})
    tracker.trial(failed(0, "failed", "out of memory"))
    tracker.trial(failed(1, "abandoned", "no rank fits " * 1000))
    tracker.trial(record(2, result=None))  # has not ended: nothing to show
    assert [child.info.status for child in store.children.values()] == ["FAILED", "FAILED"]
    first, second = store.children.values()
    assert first.data.tags["lrbo.outcome"] == "failed"
    assert first.data.tags["lrbo.error"] == "out of memory"
    assert second.data.tags["lrbo.outcome"] == "abandoned"
    assert second.data.tags["lrbo.error"].startswith("no rank fits no rank")
    assert first.data.metrics == {"seconds.suggestion": 0.5, "seconds.scoring": 2.0}
    assert store.parent.data.metrics == {}


def test_many_long_and_odd_names_and_values_are_taken(store: Store) -> None:
    ratios = {f"model.layers.{i}.mlp.up_proj": i / 250 for i in range(250)}
    odd = {"acc,none": 0.5, "perplexity": math.inf, "x" * 300: 1.0}
    one = record(0)
    one = dataclasses.replace(
        one,
        request=dataclasses.replace(one.request, variables=ratios),
        result=TrialResult(0, "completed", odd),
    )
    tracker = store.tracker(strict=True)
    tracker.start({"long": "y" * 10_000, **{f"key.{i}": i for i in range(250)}})
    tracker.trial(one)
    assert len(store.parent.data.params) == 251
    assert store.parent.data.params["long"] == "y" * 5997 + "..."
    (child,) = store.children.values()
    assert {k: float(v) for k, v in child.data.params.items()} == ratios
    assert child.data.metrics["acc_none"] == 0.5
    assert child.data.metrics["x" * 250] == 1.0


def test_numbers_figures_and_tables_go_on_the_parent(store: Store, tmp_path: Path) -> None:
    (tmp_path / "front.png").write_bytes(b"\x89PNG")
    (tmp_path / "front.csv").write_text("parameters,nll\n", encoding="utf-8")
    tracker = store.tracker(strict=True)
    tracker.start({})
    tracker.sync([record(0), record(1)])
    for improvement in (0.25, 0.5):
        tracker.summary(
            {"improvement": improvement}, [tmp_path / "front.png", tmp_path / "front.csv"]
        )
    tracker.finish(completed=False)
    parent = store.parent
    assert parent.info.status == "KILLED"
    assert parent.data.metrics["improvement"] == 0.5
    assert {p.step for p in store.client.get_metric_history(parent.info.run_id, "improvement")} == {
        1
    }
    assert store.artifact(parent, "figures/front.png").read_bytes() == b"\x89PNG"
    assert store.artifact(parent, "front.csv").read_text(encoding="utf-8") == "parameters,nll\n"
    assert store.artifacts in store.artifact(parent, "front.csv").parents


def test_the_same_trial_is_shown_once(store: Store) -> None:
    tracker = store.tracker(strict=True)
    tracker.start({})
    tracker.trial(record(0))
    tracker.trial(record(0))
    assert tracker.sync([record(0), record(1)]) == 1
    assert tracker.sync([record(0), record(1)]) == 0
    assert list(store.children) == ["trial-000", "trial-001"]


def test_the_best_is_that_of_the_trials_up_to_each(store: Store) -> None:
    tracker = store.tracker(strict=True)
    tracker.start({})
    for index in (1, 3, 0):  # parallel workers end out of order; 2 comes from the journal later
        tracker.trial(record(index))
    again = store.tracker(strict=True)
    again.start({})
    assert again.sync(record(index) for index in range(4)) == 1
    assert store.history("best_nll") == dict(enumerate(BEST))


# Interruptions of the search.


def test_a_resumed_search_continues_the_same_parent(store: Store) -> None:
    first = store.tracker()
    first.start({"search.trials": 4, "seed": 0})
    first.trial(record(0))
    first.finish(completed=False)
    before = store.parent
    assert before.info.status == "KILLED"

    second = store.tracker()
    second.start({"search.trials": 8, "seed": 0, "output": "text"})
    assert store.parent.info.status == "RUNNING"
    second.trial(record(1))
    second.finish(completed=True)
    parent = store.parent
    assert parent.info.run_id == before.info.run_id
    assert parent.info.status == "FINISHED"
    assert parent.data.params == {"search.trials": "4", "seed": "0", "output": "text"}
    assert list(store.children) == ["trial-000", "trial-001"]
    assert store.history("best_nll") == {0: BEST[0], 1: BEST[1]}


def test_studies_in_one_experiment_are_kept_apart(store: Store, folder: Path) -> None:
    other = Store(folder)
    for each in (store, other):
        tracker = each.tracker(strict=True)
        tracker.start({})
        tracker.trial(record(0))
    assert store.parent.info.run_id != other.parent.info.run_id
    assert list(store.children) == list(other.children) == ["trial-000"]


class Killed(BaseException):
    """Stands for the end of the process."""


CALLS = ["create_run", "log_text", "log_batch 1", "log_batch 2", "set_terminated"]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_search_killed_while_it_shows_a_trial_shows_it_once(
    store: Store, monkeypatch: pytest.MonkeyPatch, call: str, when: str
) -> None:
    records = [record(index) for index in range(3)]
    tracker = store.tracker()
    tracker.start({})
    tracker.trial(records[0])

    name, _, number = call.partition(" ")
    original, calls = getattr(MlflowClient, name), 0

    def killing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls < int(number or 1):
            return original(*args, **kwargs)
        if when == "after":
            original(*args, **kwargs)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, name, killing)
        with pytest.raises(Killed):
            tracker.trial(records[1])

    written = (call, when) == ("set_terminated", "after")
    again = store.tracker(strict=True)
    again.start({})
    assert again.sync(records) == (1 if written else 2)
    assert list(store.children) == ["trial-000", "trial-001", "trial-002"]
    assert {child.info.status for child in store.children.values()} == {"FINISHED"}
    assert store.history("nll") == dict(enumerate(NLL[:3]))  # no point twice
    assert store.history("best_nll") == dict(enumerate(BEST[:3]))
    half_written = not written and (call, when) != ("create_run", "before")
    assert len(store.runs(ViewType.DELETED_ONLY)) == half_written


def test_a_search_killed_between_journal_and_tracker_is_made_up_for(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "PAGE", 2)  # existing runs come in several pages
    records = [record(index) for index in range(7)]
    tracker = store.tracker()
    tracker.start({})
    for each in records[:5]:
        tracker.trial(each)
    again = store.tracker(strict=True)
    again.start({})
    assert again.sync(records) == 2
    assert list(store.children) == [f"trial-{index:03d}" for index in range(7)]
    assert store.tracker(strict=True).sync(records) == 0


def test_a_deleted_view_is_made_again_from_the_journal(store: Store) -> None:
    records = [record(index) for index in range(3)]
    tracker = store.tracker(strict=True)
    tracker.start({"seed": 0})
    tracker.sync(records)
    for run in store.runs():
        store.client.delete_run(run.info.run_id)
    again = store.tracker(strict=True)
    again.start({"seed": 0})
    assert again.sync(records) == 3
    assert list(store.children) == ["trial-000", "trial-001", "trial-002"]
    assert store.parent.data.params == {"seed": "0"}


def test_another_process_may_make_the_experiment_first(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, answers = MlflowClient.get_experiment_by_name, 0

    def late(self: MlflowClient, name: str) -> Any:
        nonlocal answers
        answers += 1
        return None if answers == 1 else original(self, name)

    store.experiment = f"raced {store.study_id}"
    store.client.create_experiment(store.experiment)
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "get_experiment_by_name", late)
        store.tracker(strict=True).start({})
    assert answers == 2
    assert store.parent.info.status == "RUNNING"


# Losing the store.


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
        patch.setattr(tracking._View, "_check_free", lambda self: None)
        begun = time.monotonic()
        tracker.trial(record(0))
        assert time.monotonic() - begun < SOON
    assert len(warnings_of(caplog)) == 1
    tracker.trial(record(1))
    assert list(store.children) == ["trial-000", "trial-001"]


def test_a_lost_store_is_asked_again_once_a_minute(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracking, "BUSY_SECONDS", BUSY)
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
        tracker.finish(completed=True)
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
    for place in ("mlflow.db", "mlflow.db/below/a/file.db"):
        caplog.clear()
        tracker = MlflowTracker(f"sqlite:///{tmp_path / place}", "lrbo", "0", "my-study")
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


# Manners.


def test_nothing_is_imported_or_opened_before_the_first_use(store: Store, tmp_path: Path) -> None:
    before = dict(os.environ)
    MlflowTracker(f"sqlite:///{tmp_path}/new/mlflow.db", "lrbo", "0", "my-study")
    assert list(tmp_path.iterdir()) == []
    assert dict(os.environ) == before
    origins = {str(getattr(value, "__module__", "")) for value in vars(tracking).values()}
    assert "lrbo.tracking" in origins
    assert not any(origin.startswith("mlflow") for origin in origins)


def test_no_run_is_active_afterwards(store: Store) -> None:
    import mlflow

    uri = mlflow.get_tracking_uri()
    tracker = store.tracker(strict=True)
    tracker.start({})
    tracker.trial(record(0))
    assert mlflow.active_run() is None
    assert mlflow.get_tracking_uri() == uri != store.uri


def test_the_null_tracker_shows_nothing() -> None:
    assert NullTracker().sync([record(0)]) == 0
