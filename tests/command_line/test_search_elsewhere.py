"""A search whose trials run elsewhere: what it holds meanwhile, and what it refuses before."""

import contextlib
import socket
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lrbo.commands import search
from lrbo.config import saved
from lrbo.pipeline import build_worker, planning
from lrbo.study.journal import Study
from lrbo.trials.records import Evaluate, InlineExecutor, Job, TrialRequest
from lrbo.trials.worker import Worker
from tests.support.commands import lrbo_command
from tests.support.small_search import RecordingReporter, small_config

TINY = ["search", "experiment=tiny", "study=doomed", "executor=ray"]


class Elsewhere:
    """Evaluates with a worker of its own, and looks whether the search still has its model."""

    capacity = 1

    def __init__(self, study: Study, config: str, models: list[Any]) -> None:
        self.study, self.config, self.models = study, config, models
        self.worker: Worker | None = None
        self.held: list[bool] = []

    def submit(self, worker: Evaluate, request: TrialRequest) -> Job:
        self.held.append(any(model() is not None for model in self.models))
        with pytest.raises(AssertionError, match="beside the actors"):
            worker(request)
        if self.worker is None:
            working_folder = Path.cwd()
            folder = self.study.folder.absolute()
            self.worker = build_worker.study_worker(
                folder, self.config, working_folder, working_folder / "cache"
            )
        return InlineExecutor().submit(self.worker, request)


def test_while_trials_run_elsewhere_the_search_holds_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LRBO_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    models: list[Any] = []
    build = build_worker.build_worker
    made: list[Elsewhere] = []

    def watched(*arguments: Any) -> Worker:
        worker = build(*arguments)
        models.append(weakref.ref(worker.model))
        return worker

    @contextlib.contextmanager
    def executor(plan: planning.Plan, study: Study) -> Iterator[Elsewhere]:
        made.append(Elsewhere(study, saved.to_yaml(plan.config), models))
        # What the search builds from here on; the worker elsewhere is not among it.
        monkeypatch.setattr(build_worker, "build_worker", watched)
        monkeypatch.setattr(build_worker, "study_worker", original)
        yield made[0]

    def original(folder: Path, config: str, working_folder: Path, cache: Path) -> Worker:
        study = Study(folder)
        plan = planning.plan_search(saved.from_yaml(config, "it"), study, [])
        return build(plan, study, RecordingReporter())

    monkeypatch.setattr(search, "_executor", executor)
    monkeypatch.setattr(search, "find_problems", lambda _: [])
    given = small_config("study=far", "executor=ray", "search.trials=3")
    line = ["study=far", "executor=ray", "search.trials=3"]
    answer = search.run(given, line, RecordingReporter())
    assert answer["trials_completed"] == 3
    assert made[0].held == [False, False, False]
    assert set(answer["test"]) == {"dense", "uniform", "analytic", "best"}
    assert len(models) == 2  # loaded again for the test text
    search.run(given, line, RecordingReporter())
    assert len(models) == 3  # but not where nothing is left to score


def test_what_is_wrong_with_the_cluster_is_said_with_everything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "lrbo.tasks.causal_lm.CausalLM.load", lambda *_, **__: pytest.fail("model loaded")
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    wrong = ["budget.keep_ratio=0.05", "data.test.tokens=9000000"]
    for given, message in (
        ([f"executor.address={address}"], f"executor.address='{address}'"),
        (["executor.workers=999"], "executor.workers=999: there are"),
    ):
        ran = lrbo_command(*TINY, *wrong, *given)
        assert ran.status == 2
        for part in ("smallest feasible budget.keep_ratio", "data.test: text 'words'", message):
            assert part in ran.err
        ran = lrbo_command(*TINY, "seed=-1", *given)  # a value, which alone shows it
        assert ran.status == 2
        for part in ("seed=-1", message):
            assert part in ran.err
    assert not (tmp_path / "studies" / "doomed").exists()
