"""Trials that ended, and an MLflow store that is looked at through MLflow's own client."""

import dataclasses
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from mlflow import MlflowClient
from mlflow.entities import Run, ViewType

from lrbo.allocation.allocate import Allocation
from lrbo.layers.options import DENSE, Budget, Cost, Option
from lrbo.tracking.tracker import MlflowTracker
from lrbo.trials.records import TrialRecord, TrialRequest, TrialResult

STARTED = 1_700_000_000.25
NLL = [3.5, 3.25, 3.75, 3.0]
BEST = [3.5, 3.25, 3.25, 3.0]


def record(index: int, nll: float | None = None, **changes: Any) -> TrialRecord:
    """Build a completed trial with names as a real one has them."""
    name = f"model.layers.{index}.self_attn.q_proj"
    options = {name: Option("pivoted", (8 + index,)), "lm_head": DENSE}
    costs = {name: Cost(600 + index, 2500, 600 + index), "lm_head": Cost(400, 1600, 400)}
    allocation = Allocation(options, costs, Budget("bytes", 5000))
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

    def tracker(self, study_name: str = "my-study", **options: Any) -> MlflowTracker:
        options = {"artifact_root": self.artifacts, **options}
        return MlflowTracker(self.uri, self.experiment, self.study_id, study_name, **options)

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
        runs = [run for run in self.runs() if run.data.tags["lrbo.role"] == "trial"]
        assert {run.data.tags["mlflow.parentRunId"] for run in runs} <= {self.parent.info.run_id}
        names = [run.info.run_name for run in runs]
        assert len(set(names)) == len(names)
        return {run.info.run_name: run for run in sorted(runs, key=lambda r: r.info.run_name)}

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
