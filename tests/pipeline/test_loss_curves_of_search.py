"""Losses are measured once per study, and a search begins where they are least."""

import json
from pathlib import Path
from typing import Any

import pytest

from lrbo import builders
from lrbo.commands.view import make_tracker
from lrbo.config import to_yaml
from lrbo.optimization.study import Study, follows
from lrbo.tracking import MlflowTracker
from tests.commands import TINY, lrbo_command
from tests.fakes import make_about, make_layers
from tests.test_builders import Said, chosen


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache of its own, and an empty folder to work in."""
    monkeypatch.setenv("LRBO_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def informed(name: str, *overrides: str) -> tuple[Any, Said]:
    """Return the space of a study with what is known of losses."""
    study, said = Study(Path("studies") / name), Said()
    with study.locked():
        plan = builders.plan_search(chosen(f"study={name}", *overrides), study, [])
        worker = builders.build_worker(plan, study, said)
        return builders.informed_space(plan, study, worker, said), said


@pytest.mark.parametrize("method", ["bolaco", "loss_aware"])
def test_losses_are_measured_once_per_study(method: str) -> None:
    first, said = informed("one", f"method={method}", "space=weights")
    assert any(line.startswith("Loss of layers: ") for line in said.lines)
    file = Path("studies/one/sensitivity.json")
    written = file.read_bytes()
    again, said = informed("one", f"method={method}", "space=weights")
    assert not any(line.startswith("Loss of layers: ") for line in said.lines)
    assert file.read_bytes() == written
    for name, curve in first.curves.items():
        assert (curve == again.curves[name]).all()
    assert again.analytic() == first.analytic()


@pytest.mark.parametrize("method", ["bolaco", "loss_aware"])
def test_without_sensitivity_there_is_no_analytic_trial(method: str) -> None:
    """Also where the method itself gathers gradients, which would be enough to predict losses."""
    space, said = informed("one", f"method={method}", "sensitivity.enabled=false")
    assert space.analytic() is None
    assert not Path("studies/one/sensitivity.json").exists()
    assert not any(line.startswith("Loss of layers: ") for line in said.lines)


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


def test_the_tracker_is_told_that_weights_are_logarithms(tmp_path: Path) -> None:
    for space, prefix in (("weights", "log_weight."), ("per_kind", "")):
        study = Study(tmp_path / space)
        values = chosen(f"space={space}", "tracking.enabled=true")
        layers = make_layers()
        study.begin(make_about(layers, **follows(values, layers)), to_yaml(values))
        tracker = make_tracker(values, study)
        assert isinstance(tracker, MlflowTracker)
        assert tracker._prefix == prefix
