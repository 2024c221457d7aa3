"""The commands as functions: the same studies and errors, inside a program that goes on."""

import logging
import signal
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hydra.core.global_hydra import GlobalHydra
from matplotlib.figure import Figure

import lrbo
from lrbo.errors import ConfigError, DiskFullError, LrboError, StudyError
from lrbo.pipeline.overrides import values_of
from lrbo.trials.worker import Worker
from tests.support.commands import lrbo_command, same_logging

OVERRIDES = [
    "experiment=tiny",
    "search.trials=5",
    "search.initial=4",
    "sensitivity.layers_per_kind=0",
    "tracking.enabled=false",
]


def surroundings() -> dict[str, Any]:
    """Return what a program would miss if a search changed it."""
    return {
        "arguments": list(sys.argv),
        "handlers": list(logging.root.handlers),
        "level": logging.root.level,
        "own level": logging.getLogger("lrbo").level,
        "warnings": (warnings.showwarning, list(warnings.filters)),
        "hydra": GlobalHydra.instance().hydra,
        "signal": signal.getsignal(signal.SIGINT),
        "folder": Path.cwd(),
        "threads": {thread.name for thread in threading.enumerate() if not thread.daemon},
    }


def decisions(results: lrbo.StudyResults) -> list[list[str]]:
    return [list(results.options(trial)["option"]) for trial in results.trials["trial"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("python")


@pytest.fixture(scope="module")
def interrupted(folder: Path) -> tuple[lrbo.StudyResults, lrbo.StudyResults, dict, dict]:
    """Search, press Ctrl-C in the fourth trial, and go on: twice in one process."""
    before = surroundings()
    evaluate = Worker.__call__

    def press(worker: Worker, request: Any) -> Any:
        if request.trial_index == 3:
            raise KeyboardInterrupt
        return evaluate(worker, request)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        before["folder"] = folder
        patch.setattr(Worker, "__call__", press)
        with pytest.raises(KeyboardInterrupt):
            lrbo.search(*OVERRIDES)
        stopped = lrbo.open_study("tiny")
        patch.setattr(Worker, "__call__", evaluate)
        finished = lrbo.search("study=tiny")
        after = surroundings()
    return stopped, finished, before, after


@pytest.fixture
def project(interrupted: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in the folder of the study."""
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.slow
def test_an_interrupted_search_goes_on_to_what_the_command_finds(
    interrupted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped, finished, _, _ = interrupted
    assert len(stopped.trials) == 3
    monkeypatch.chdir(tmp_path)
    assert lrbo_command("search", *OVERRIDES).status == 0
    typed = lrbo.open_study("tiny")
    assert decisions(finished) == decisions(typed)
    assert list(finished.trials["nll"]) == list(typed.trials["nll"])


def test_an_interrupted_search_goes_on_and_leaves_the_program_as_it_was(interrupted: Any) -> None:
    stopped, finished, before, after = interrupted
    assert len(stopped.trials) == 3
    assert list(finished.trials["trial"]) == [0, 1, 2, 3, 4]
    assert after == before


def test_a_search_shows_progress_and_prints_nothing(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lrbo.search(*OVERRIDES)
    output = capsys.readouterr()
    assert output.out == ""
    assert "its 5 trials are done; search.trials=15 adds ten" in " ".join(output.err.split())


def test_a_study_compresses_loads_and_is_scored(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = lrbo.open_study("tiny").best
    assert best is not None
    written = lrbo.compress("study=tiny", "point=keep=0.8", "out=small", "refit.enabled=false")
    assert written["keep_ratio"] == best.metrics["keep_ratio"]
    model = lrbo.load(written["folder"])
    assert sum(p.numel() for p in model.parameters()) == written["parameters"]
    scores = lrbo.evaluate("checkpoint=small", "data=generated", "record=null")
    assert scores["perplexity"] > 1
    assert "perplexity" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("call", "messages"),
    [
        (lambda: lrbo.search("trials=3", "seed=-1"), ["did you mean search.trials?", "seed=-1"]),
        (lambda: lrbo.search("experiment=tiny", "seed=0,1"), ["seed=0,1"]),
        (lambda: lrbo.compress("study=tiny"), ["out is required"]),
        (lambda: lrbo.evaluate("checkpoint=a/b/c"), ["a/b/c"]),
        (lambda: lrbo.search("-m", "seed=0"), ["-m"]),
        (lambda: values_of("search", [["seed=0"]]), ["1 problem:", "an argument of its own"]),
        (lambda: lrbo.compress("study=a", "out=b (1)"), ["1 problem:", "\"out='b (1)'\""]),
    ],
)
def test_what_cannot_work_is_an_error_that_lists_everything(
    call: Any, messages: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        call()
    for message in messages:
        assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_message_is_that_of_the_command(project: Path) -> None:
    typed = ["experiment=tiny", "budget.keep_ratio=0.7", "tracking.enabled=false"]
    with pytest.raises(LrboError) as caught:
        lrbo.search(*typed)
    assert f"error: {caught.value}\n" == lrbo_command("search", *typed).err.replace("\r", "")


def test_a_full_disk_is_named(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lrbo.commands.search.search", full)
    with same_logging(), pytest.raises(DiskFullError, match="make room"):
        lrbo.search("experiment=tiny")


# --- studies to read -----------------------------------------------------------------------------


def test_a_study_reads_into_tables(interrupted: Any, project: Path) -> None:
    results = lrbo.open_study("tiny")
    assert results.best is not None
    assert (results.name, results.folder) == ("tiny", project / "studies" / "tiny")
    trials, front = results.trials, results.front
    assert len(trials) == 5
    best = trials.loc[trials["nll"].idxmin()]
    assert best["trial"] == results.best.request.trial_index
    assert front.empty  # all trials are of one size
    assert results.summary["best"]["trial"] == best["trial"]
    assert results.config["search"]["trials"] == 5
    assert list(results.options()["name"]) == list(results.best.request.allocation.options)
    assert results.options(0)["stored"].sum() == trials.loc[0, "parameters"]
    assert {"convergence", "ranks"} <= set(results.figures())
    assert all(isinstance(figure, Figure) for figure in results.figures().values())
    assert f"study tiny: 5 trials, best perplexity {best['perplexity']:.4g}" in repr(results)
    by_path = lrbo.open_study(str(Path("studies") / "tiny"))
    table = lrbo.compare(results, "tiny", results.folder)
    assert list(table["best"]) == [best["perplexity"]] * 3
    pd.testing.assert_frame_equal(by_path.trials, trials)


def test_a_study_reports_as_the_command_does(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lrbo.open_study("tiny").report()
    assert capsys.readouterr().out == lrbo_command("report", "study=tiny", "figures=false").out


def test_studies_and_trials_that_are_not_there_are_named(project: Path) -> None:
    with pytest.raises(StudyError, match=r"no study at studies.nothing; start one with"):
        lrbo.open_study("nothing")
    with pytest.raises(StudyError, match="no study to compare"):
        lrbo.compare()
    with pytest.raises(StudyError, match=r"no trial 9; it has the trials \[0, 1, 2, 3, 4\]"):
        lrbo.open_study("tiny").options(9)


def test_a_study_without_a_value_says_so(interrupted: Any, project: Path, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "journal.jsonl").touch()
    for name in ("study.json", "config.yaml"):
        (begun / name).write_bytes((project / "studies" / "tiny" / name).read_bytes())
    results = lrbo.open_study(str(begun))
    assert repr(results) == "<study begun: 0 trials, none with a value>"
    assert (results.best, len(results.trials), len(results.front)) == (None, 0, 0)
    assert results.figures() == {}
    with pytest.raises(StudyError, match="no trial with a value"):
        results.options()
