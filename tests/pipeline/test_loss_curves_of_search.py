"""Losses are measured once per study, and a search begins where they are least."""

import json
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from lrbo.config.saved import to_yaml
from lrbo.pipeline import build_worker, planning
from lrbo.reports.mlflow_view import make_tracker
from lrbo.study.journal import Study
from lrbo.study.study_record import follows
from tests.support.commands import TINY, lrbo_command
from tests.support.fakes import make_about, make_layers
from tests.support.mlflow_runs import record
from tests.support.small_search import RecordingReporter, small_config


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache of its own, and an empty folder to work in."""
    monkeypatch.setenv("LRBO_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def informed(name: str, *overrides: str) -> tuple[Any, RecordingReporter]:
    """Return the space of a study with what is known of losses."""
    study, reporter = Study(Path("studies") / name), RecordingReporter()
    with study.locked():
        plan = planning.plan_search(small_config(f"study={name}", *overrides), study, [])
        worker = build_worker.build_worker(plan, study, reporter)
        model, factors = worker.model, worker.prepared
        return build_worker.informed_space(plan, study, model, factors, reporter), reporter


@pytest.mark.parametrize("method", ["bolaco", "loss_aware"])
def test_losses_are_measured_once_per_study(method: str) -> None:
    first, reporter = informed("one", f"method={method}", "space=weights")
    assert any(line.startswith("Loss of layers: ") for line in reporter.lines)
    file = Path("studies/one/sensitivity.json")
    written = file.read_bytes()
    second, reporter = informed("one", f"method={method}", "space=weights")
    assert not any(line.startswith("Loss of layers: ") for line in reporter.lines)
    assert file.read_bytes() == written
    for name, menu in first.problem.menus.items():
        assert (menu.losses == second.problem.menus[name].losses).all()
        assert menu.losses.max() > 0
    assert second.starts("analytic") == first.starts("analytic")


@pytest.mark.parametrize("method", ["bolaco", "loss_aware"])
def test_without_sensitivity_there_is_no_analytic_trial(method: str) -> None:
    """Also where the method itself gathers gradients, which would be enough to predict losses."""
    space, reporter = informed("one", f"method={method}", "sensitivity.enabled=false")
    assert space.starts("analytic") == []
    assert not Path("studies/one/sensitivity.json").exists()
    assert not any(line.startswith("Loss of layers: ") for line in reporter.lines)


@pytest.mark.filterwarnings("default::lrbo.calibration.collect.CalibrationWarning")
def test_weights_are_searched_around_the_least_predicted_loss() -> None:
    weights = ["method=loss_aware", "space=weights", "data.calibration.tokens=128"]
    ran = lrbo_command("search", *TINY, *weights, "search.initial=3")
    assert ran.status == 0, ran.err
    records = Path("studies/tiny/journal.jsonl").read_text(encoding="utf-8").splitlines()
    suggested = [e for e in map(json.loads, records) if e["event"] == "suggested"]
    origins = [event["origin"] for event in suggested]
    assert origins == ["uniform", "analytic", "sobol", "model", "model"]
    assert set(suggested[1]["variables"].values()) == {0.0}
    assert "Share of the parameters kept" in ran.out
    assert "rank correlation" in ran.out
    # A warning is one line without a path, however long: it may end in the log of a batch system.
    (line,) = [line for line in ran.err.splitlines() if line.startswith("WARNING")]
    assert "64 tokens with gradients for outputs of up to 64 features" in line
    assert line.endswith("or a larger calibration.gradient_share.")
    assert ".py" not in ran.err
    assert "CalibrationWarning" not in ran.err


@pytest.mark.parametrize(("space", "prefix"), [("weights", "log_weight."), ("per_kind", "")])
def test_mlflow_calls_the_logarithms_of_weights_so(space: str, prefix: str, tmp_path: Path) -> None:
    study, trial = Study(tmp_path / "study"), record(0)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    values = small_config(f"space={space}", "tracking.enabled=true", f"tracking.uri={uri}")
    layers = make_layers()
    study.begin(make_about(layers, **follows(values, layers, "float32")), to_yaml(values))
    tracker = make_tracker(values, study, strict=True)
    tracker.start({})
    tracker.trial(trial)
    client = MlflowClient(uri)
    experiments = [e.experiment_id for e in client.search_experiments()]
    (child,) = client.search_runs(experiments, "tags.`lrbo.trial` = '0'")
    assert child.data.params.keys() == {f"{prefix}{name}" for name in trial.request.variables}
