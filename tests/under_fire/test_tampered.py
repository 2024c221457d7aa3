"""A search whose view, clock or journal is tampered with; its trials stay what they were."""

import shutil
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from experiments.bench_kill import kills
from lrbo.study.journal import Study
from lrbo.tracking import mlflow_store, tracker
from lrbo.tracking.tracker import MlflowTracker
from lrbo.trials.records import TrialRecord
from tests.support.commands import TINY, Ran, lrbo_command, searched
from tests.support.disks import SmallDisk, disk

__all__ = ["disk", "searched"]  # fixtures

DAY = 86_400.0


@pytest.fixture
def workspace(searched: tuple[Path, Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished study, alone in a folder to work in, without an MLflow store."""
    shutil.copytree(searched[0] / "studies" / "tiny", tmp_path / "studies" / "tiny")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mlflow_store, "BUSY_SECONDS", 0.2)
    monkeypatch.setattr(tracker, "LAST_WAITS", (0.0, 0.1))
    return tmp_path


def cut_after(folder: Path, trials: int) -> None:
    """Take a study back to where so many trials had ended."""
    journal = kills.journal_of(folder)
    lines = journal.read_bytes().splitlines(keepends=True)
    last = [i for i, line in enumerate(lines) if b'"event": "logged"' in line][trials - 1]
    journal.write_bytes(b"".join(lines[: last + 1]))


def test_a_store_that_was_deleted_is_made_again(
    workspace: Path, searched: tuple[Path, Ran]
) -> None:
    assert lrbo_command("report", "study=tiny", "sync=true").status == 0
    assert kills.judge(workspace, searched[0]).problems == []
    for path in (workspace / "studies").glob("mlflow*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    ran = lrbo_command("search", *TINY)
    assert ran.status == 0
    assert "failed" not in ran.err
    assert kills.judge(workspace, searched[0]).problems == []


def test_a_store_that_is_deleted_during_a_search_comes_back_whole(
    workspace: Path, searched: tuple[Path, Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker, "RETRY_SECONDS", 0.0)
    cut_after(workspace, 2)
    original = MlflowTracker.trial

    def deleting(self: MlflowTracker, record: TrialRecord) -> None:
        if record.request.trial_index == 3:
            (workspace / "studies" / "mlflow.db").unlink()
        original(self, record)

    monkeypatch.setattr(MlflowTracker, "trial", deleting)
    ran = lrbo_command("search", *TINY)
    assert ran.status == 0
    assert ran.err.count("No trial is lost and the search goes on") == 1
    assert kills.judge(workspace, searched[0]).problems == []


def test_a_store_that_is_locked_all_the_time_is_made_up_for_by_the_next_run(
    workspace: Path, searched: tuple[Path, Ran]
) -> None:
    cut_after(workspace, 2)
    assert lrbo_command("report", "study=tiny", "sync=true").status == 0
    store = workspace / "studies" / "mlflow.db"
    with closing(sqlite3.connect(store, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        ran = lrbo_command("search", *TINY)
    assert ran.status == 0
    assert "database is locked" in ran.err
    assert ran.json["trials_completed"] == 5
    assert lrbo_command("search", *TINY).status == 0
    assert kills.judge(workspace, searched[0]).problems == []


def test_a_store_that_may_only_be_read_is_made_up_for_by_the_next_run(
    workspace: Path, searched: tuple[Path, Ran], disk: SmallDisk
) -> None:
    command = [*TINY, f"tracking.uri=sqlite:///{disk.folder}/mlflow.db"]
    with disk.read_only():
        for _ in range(2):  # while there is none, and after it
            ran = lrbo_command("search", *command)
            assert ran.status == 0
            assert "No trial is lost and the search goes on" in ran.err
    assert lrbo_command("search", *command).status == 0
    (workspace / "studies" / "mlflow.db").symlink_to(disk.folder / "mlflow.db")
    assert kills.judge(workspace, searched[0]).problems == []


@pytest.mark.slow
@pytest.mark.parametrize("days", [-1.0, 400.0])
def test_a_clock_that_jumps_confuses_nothing(
    workspace: Path, searched: tuple[Path, Ran], monkeypatch: pytest.MonkeyPatch, days: float
) -> None:
    """Between two runs, and again and again during the second one, in the middle of trials too."""
    cut_after(workspace, 2)
    assert lrbo_command("report", "study=tiny", "sync=true").status == 0
    original, now = Study.record, time.time
    offset = days * DAY

    def jumping(self: Study, event: str, **fields: object) -> None:
        nonlocal offset
        original(self, event, **fields)
        offset += {"started": days, "ended": -2 * days}.get(event, 0.0) * DAY

    monkeypatch.setattr(time, "time", lambda: now() + offset)
    monkeypatch.setattr(Study, "record", jumping)
    ran = lrbo_command("search", *TINY)
    monkeypatch.undo()
    monkeypatch.chdir(workspace)
    assert ran.status == 0, ran.err
    assert kills.judge(workspace, searched[0]).problems == []
    times = [event["time"] for event in kills.events(workspace)]
    assert sorted(times) != times  # the clock did jump
    study = Study(workspace / "studies" / "tiny")
    assert all(least >= 0 for record in study.state.records for least in record.seconds.values())
    report = lrbo_command("report", "study=tiny", "output=json")
    assert report.status == 0, report.err
    assert all(seconds >= 0 for seconds in report.json["seconds"].values())


def test_junk_in_a_journal_is_named_by_its_line_and_left_alone(workspace: Path) -> None:
    journal = kills.journal_of(workspace)
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:7], b"\xff\x00 junk\n", *lines[7:]]))
    before = journal.read_bytes()
    for command in (["search", *TINY], ["report", "study=tiny"]):
        ran = lrbo_command(*command)
        assert ran.status == 2
        assert f"{Path('studies/tiny/journal.jsonl')}, line 8 is damaged" in ran.err
        assert "Restore the file" in ran.err
    assert journal.read_bytes() == before


def test_a_journal_cut_in_its_last_line_goes_on(
    workspace: Path, searched: tuple[Path, Ran]
) -> None:
    cut_after(workspace, 4)
    journal = kills.journal_of(workspace)
    journal.write_bytes(journal.read_bytes()[:-20])
    ran = lrbo_command("search", *TINY)
    assert ran.status == 0
    assert kills.judge(workspace, searched[0]).problems == []
