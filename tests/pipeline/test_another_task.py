"""A task without blocks, tokens or text goes the whole way: the seam between task and lrbo."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lrbo
from lrbo.pipeline import planning
from lrbo.study.journal import Study
from lrbo.tasks import metrics, registry
from tests.support import regression
from tests.support.commands import lrbo_command
from tests.support.regression import INPUTS, Regression, RegressionConfig

SETTINGS = [
    "task=regression", "model=hf", "model.path=network", "model.dtype=float32", "data=generated",
    "space=weights", "space.knots=0", "space.rank_multiple=1", "budget.keep_ratio=0.5",
    "search.trials=5", "search.initial=3", "sensitivity.layers_per_kind=1", "study=net",
]  # fmt: skip


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Regression:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LRBO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(metrics.TASKS, "regression", regression.RECORD)
    monkeypatch.setitem(registry.TASKS, "regression", regression.RegressionTask)
    rows = regression.RowSource()
    source = planning.ExampleSource(rows.make, rows.save, rows.load)
    monkeypatch.setitem(planning.SOURCES, "regression", source)
    regression.register()
    torch.manual_seed(0)
    network = Regression(RegressionConfig())
    network.save_pretrained("network")
    return network.eval()


@pytest.mark.parametrize("method", ["loss_aware", "bolaco"])
def test_a_network_of_linear_layers_is_searched_written_and_opened(
    network: Regression, method: str
) -> None:
    forms = "space.forms=[factored,pivoted]"
    ran = lrbo_command("search", *SETTINGS, f"method={method}", forms, "budget.measure=bytes")
    assert ran.status == 0, ran.err
    study = Study(Path("studies/net"))
    assert study.task.name == "regression"
    trials = study.state.completed
    assert len(trials) == 5
    tokens = load_file("studies/net/tokens.safetensors")["validation"]
    inputs, targets = tokens[:, :INPUTS], tokens[:, INPUTS:]
    with torch.no_grad():
        dense = network(inputs)
    best = study.state.best()
    assert best is not None

    shown = lrbo_command("report", "study=net")
    assert shown.status == 0, shown.err
    for word in ("squared error", "rms", "distance from dense", "examples scored"):
        assert word in shown.out
    for word in ("perplexity", "nll", "token"):
        assert word not in shown.out

    trial = best.request.trial_index
    written = lrbo_command(
        "compress", "study=net", f"point={trial}", "out=small", "refit.enabled=false"
    )
    assert written.status == 0, written.err
    opened = lrbo.load("small")
    with torch.no_grad():
        outputs = opened(inputs)
    half = (outputs - targets).double().square().sum(1).mean() / 2
    assert best.metrics["squared_error"] == pytest.approx(float(half), rel=1e-4)
    far = (outputs - dense).double().square().sum(1).mean() / 2
    assert best.metrics["distance"] == pytest.approx(float(far), rel=1e-3)
    held = load_file("small/model.safetensors").values()
    assert sum(tensor.nbytes for tensor in held) == best.metrics["model_bytes"]
    about = json.loads(Path("small/config.json").read_text(encoding="utf-8"))
    assert about["quantization_config"]["auto_class"] == "AutoModel"
    card = Path("small/README.md").read_text(encoding="utf-8")
    assert "AutoModel.from_pretrained" in card
    assert "okenizer" not in card


def test_a_search_of_another_task_goes_on(network: Regression) -> None:
    assert lrbo_command("search", *SETTINGS, "search.trials=3").status == 0
    ran = lrbo_command("search", *SETTINGS, "search.trials=4")
    assert ran.status == 0, ran.err
    assert len(Study(Path("studies/net")).state.completed) == 4


def test_an_unknown_task_is_refused_with_those_there_are(network: Regression) -> None:
    ran = lrbo_command("search", *SETTINGS[1:], "task=regresion")
    assert ran.status == 2
    assert "task='regresion': expected causal_lm or regression" in ran.err


def test_what_is_no_language_model_has_no_prefill_to_time(network: Regression) -> None:
    ran = lrbo_command("search", *SETTINGS, "latency.enabled=true")
    assert ran.status != 0
    assert "latency.enabled=true" in ran.err
    assert "task=regression has neither" in ran.err
    assert not Path("studies/net").exists()
