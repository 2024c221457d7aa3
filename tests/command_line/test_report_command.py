"""`lrbo report` judges all studies before it shows or writes anything of one."""

import logging
from pathlib import Path

import pytest

from lrbo.config.compose import composed
from lrbo.config.schema import SearchConfig
from lrbo.reports import mlflow_view
from lrbo.tracking.tracker import NullTracker
from tests.support.commands import lrbo_command
from tests.support.journal import Journal


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Return how runs were closed in MLflow, finished or not, in place of doing so."""
    completions: list[bool] = []

    class Closed(NullTracker):
        def finish(self, *, completed: bool) -> None:
            completions.append(completed)

    monkeypatch.setattr("lrbo.reports.mlflow_view.make_tracker", lambda *_, **__: Closed())
    return completions


@pytest.mark.parametrize(("origins", "finished"), [("sobol between", False), ("sobol sobol", True)])
def test_a_trial_between_two_of_a_front_does_not_finish_a_search(
    tmp_path: Path, closed: list[bool], origins: str, finished: bool
) -> None:
    journal = Journal(tmp_path / "mine", "search.trials=2")
    for index, origin in enumerate(origins.split()):
        journal.complete(index, 2.0, origin)
    ran = lrbo_command("report", f"study={tmp_path}/mine", "sync=true", "figures=false")
    assert ran.status == 0, ran.err
    assert closed == [finished]


def test_every_study_that_is_missing_or_damaged_is_named_before_one_is_synced(
    tmp_path: Path, closed: list[bool]
) -> None:
    Journal(tmp_path / "good")
    damaged = Journal(tmp_path / "damaged").study
    damaged.journal.write_text("[]\n", encoding="utf-8")
    options = [f"studies={tmp_path}", "sync=true", "figures=false"]
    ran = lrbo_command("report", "study=[good,none,damaged]", *options)
    assert ran.status == 2
    assert ran.err.startswith("error: 2 problems:\n")
    assert f"there is no study at {tmp_path}/none" in ran.err
    assert "damaged/journal.jsonl, line 1 is damaged: it is []" in ran.err
    assert closed == []
    assert ran.out == ""


def test_a_checkpoint_that_the_journal_does_not_take_is_there_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(tmp_path / "mine")
    journal.complete(0, 2.0)
    config = composed("search", ["experiment=tiny", "tracking.enabled=false"])
    assert isinstance(config, SearchConfig)
    written = journal.study.journal.read_bytes()
    with caplog.at_level(logging.WARNING):
        mlflow_view.enter_checkpoint(
            config, journal.study, tmp_path / "out", 0, "link", {"dtype": "f"}
        )
    assert "does not say that" in caplog.text
    assert "the field tags.keep_ratio is missing" in caplog.text
    assert journal.study.journal.read_bytes() == written
