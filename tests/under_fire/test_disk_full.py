"""A disk that is full loses nothing and says what to do; with room the same command goes on."""

import errno
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from experiments.bench_kill import kills
from lrbo.files.atomic import is_full
from lrbo.models.blockwise import Scratch
from lrbo.study.journal import Study
from lrbo.tracking.tracker import MlflowTracker
from tests.support.commands import TINY, Ran, lrbo_command, project, searched
from tests.support.disks import SmallDisk, disk

__all__ = ["disk", "project", "searched"]  # fixtures

# KiB that are left for an attempt: for nothing, for some of the statistics, for all but the dense
# model's distributions (1,000 at once).
ROOM = (0, 100, 900)


@pytest.mark.slow
def test_a_search_on_a_disk_that_is_full_again_and_again_ends_as_if_it_never_was(
    searched: tuple[Path, Ran], disk: SmallDisk, monkeypatch: pytest.MonkeyPatch, pages: None
) -> None:
    monkeypatch.setenv("LRBO_CACHE", str(disk.folder / "cache"))
    monkeypatch.chdir(disk.folder)

    def refused() -> None:
        before = kills.content(disk.folder)
        ran = lrbo_command("search", *TINY)
        assert ran.status == 2, ran.err
        assert "Traceback" not in ran.err
        for part in ("error: a disk is full", "No space left", "type the same command again"):
            assert part in ran.err
        after = kills.content(disk.folder)
        assert after.startswith(before)
        assert after[-1:] in (b"", b"\n")  # no half line
        beside = {path.name for path in disk.folder.rglob(".*")}
        assert all(name.startswith(".mlflow.db.") for name in beside), beside

    for kib in ROOM:
        disk.leave(kib)
        refused()
    assert kills.content(disk.folder) == b""
    disk.make_room()

    original = Study.record

    def filling(self: Study, event: str, **fields: Any) -> None:
        original(self, event, **fields)
        if event == "ended":
            disk.leave(0)

    with monkeypatch.context() as patch:
        patch.setattr(Study, "record", filling)
        refused()
    trials = sum(event["event"] == "ended" for event in kills.events(disk.folder))
    assert 1 <= trials < 5
    refused()  # nothing has changed yet
    disk.make_room()
    ran = lrbo_command("search", *TINY)
    assert ran.status == 0, ran.err
    assert "full" not in ran.err
    assert kills.judge(disk.folder, searched[0]).problems == []
    expected = {path.name for path in (searched[0] / "studies" / "tiny").rglob("*")}
    assert {path.name for path in Path("studies/tiny").rglob("*")} == expected


def test_a_checkpoint_that_does_not_fit_leaves_nothing(project: Path, disk: SmallDisk) -> None:
    out = disk.folder / "best"
    for kib in (0, 16, 64):
        disk.leave(kib)
        ran = lrbo_command("compress", "study=tiny", f"out={out}", "refit.enabled=false")
        assert ran.status == 2
        assert "error: a disk is full" in ran.err
        assert [path.name for path in disk.folder.iterdir()] == ["ballast"]
    disk.make_room()
    ran = lrbo_command("compress", "study=tiny", f"out={out}", "refit.enabled=false")
    assert ran.status == 0, ran.err
    assert (out / "config.json").is_file()


def test_a_file_that_does_not_fit_leaves_the_run_whole(
    disk: SmallDisk, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    large, small = tmp_path / "report.html", tmp_path / "front.json"
    large.write_bytes(bytes(2**21))
    small.write_text("[]", encoding="utf-8")
    uri = f"sqlite:///{disk.folder / 'mlflow.db'}"
    tracker = MlflowTracker(uri=uri, experiment="lrbo", study_id="id", study_name="mine")
    tracker.start({})
    disk.leave(1024)
    tracker.summary({"best_nll": 2.0}, [large, small])
    tracker.finish(completed=True)
    assert "report.html has no room beside the runs" in caplog.text
    client = MlflowClient(tracking_uri=uri)
    (experiment,) = client.search_experiments(filter_string="name = 'lrbo'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["best_nll"] == 2.0
    assert [artifact.path for artifact in client.list_artifacts(run.info.run_id)] == ["front.json"]


def test_figures_that_cannot_be_written_do_not_stop_a_search(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("lrbo.reports.mlflow_view.draw_figures", full)
        ran = lrbo_command("search", *TINY)
    assert ran.status == 0
    assert "draw them with: lrbo report study=tiny" in ran.err
    assert kills.judge(project, project).problems == []  # the parent run is closed


def test_a_temporary_file_without_room_is_an_error_and_not_the_end_of_the_process(
    disk: SmallDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(disk.folder))
    disk.leave(64)
    with pytest.raises(OSError, match="No space left") as caught:
        Scratch(0).empty(1 << 20, dtype=torch.float32).fill_(1.0)
    assert is_full(caught.value)
    assert Scratch(0).empty(4, 1024, dtype=torch.float32).fill_(1.0).sum() == 4096
    assert [path.name for path in disk.folder.iterdir()] == ["ballast"]
