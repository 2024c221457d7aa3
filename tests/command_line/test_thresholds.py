"""A threshold of output error: curves of two metrics in one figure, and a checkpoint in 4 bits."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lrbo.config.choices import THRESHOLD
from lrbo.study.journal import Study
from tests.support.commands import SMALL_SEARCH, lrbo_command, searched_in

SMALL = [*SMALL_SEARCH, "space=error_threshold", "space.rank_multiple=1", "bases.group_sizes=[32]"]
SMALL += ["budget.keep_ratio=0.17", "budget.lowest=0.06"]
SMALL += ["search.trials=8", "warm_start=[uniform,start]"]
SMALL += ["search.kl_weight=100"]  # of a random model only the divergence falls with its size
METHODS = ("svd", "loss_aware")
SAME = 1e-5  # nats: sums of float32 in another order


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run a search of baselines and thresholds that meet four budgets, for each method."""
    folder = tmp_path_factory.mktemp("thresholds")
    for method in METHODS:
        typed = [f"method={method}", f"study={method}", "sensitivity.enabled=false"]
        searched_in(folder, *SMALL, *typed)
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_thresholds_rise_as_sizes_fall(method: str, folder: Path) -> None:
    study = Study(folder / "studies" / method)
    records = [each for each in study.state.completed if each.request.origin == "start"]
    assert len(records) == 4
    rising = [record.request.variables[THRESHOLD] for record in records]
    sizes = [record.metrics["keep_ratio"] for record in records]
    assert sorted(set(rising)) == rising
    assert sorted(set(sizes), reverse=True) == sizes
    assert sizes[-1] > 0.05
    assert sizes[0] <= 0.17
    options = [o for record in records for o in record.request.allocation.options.values()]
    assert {option.form for option in options} == {"factored_int4", "int4"}
    assert study.about.fields["variables"] == {THRESHOLD: [0.01, 0.9]}


def test_both_curves_are_in_one_figure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    ran = lrbo_command("report", f"study=[{','.join(METHODS)}]")
    assert ran.status == 0, ran.err
    assert "studies/fronts.png" in ran.err
    assert Path("studies/fronts.png").read_bytes().startswith(b"\x89PNG")


def test_the_checkpoint_holds_what_was_counted_and_scores_as_its_trial(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    record = Study(Path("studies/svd")).state.completed[-1]
    assert record.request.origin == "start"
    options = record.request.allocation.options
    assert {option.form for option in options.values()} == {"factored_int4"}
    trial = record.request.trial_index
    ran = lrbo_command("compress", "study=svd", f"point={trial}", "out=small", "output=json")
    assert ran.status == 0, ran.err
    tensors = load_file(Path("small/model.safetensors"))
    assert sum(tensor.nbytes for tensor in tensors.values()) == record.metrics["model_bytes"]
    model = AutoModelForCausalLM.from_pretrained("small")
    layers = {name: part for name, part in model.named_modules() if name in options}
    for name, layer in layers.items():
        (rank,) = options[name].level
        assert layer.left.shape == (rank, layer.out_features // 2)
        assert layer.right.shape == (rank, layer.in_features // 2)
    written = json.loads(Path("small/config.json").read_text(encoding="utf-8"))
    scored = written["quantization_config"]["provenance"]["validation_as_written"]
    assert scored["nll"] == pytest.approx(record.metrics["nll"], abs=SAME)


def test_a_size_between_two_trials_gets_the_threshold_that_meets_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    before = Study(Path("studies/loss_aware")).state
    assert len(before.completed) == 8
    ran = lrbo_command("compress", "study=loss_aware", "point=keep=0.116", "out=between")
    assert ran.status == 0, ran.err
    record = Study(Path("studies/loss_aware")).state.completed[-1]
    assert record.request.origin == "between"
    assert 0.11 < record.metrics["keep_ratio"] <= 0.116
    steps = {
        each.metrics["keep_ratio"]: each.request.variables[THRESHOLD]
        for each in before.completed
        if each.request.origin == "start"
    }
    larger = min(size for size in steps if size > 0.116)
    smaller = max(size for size in steps if size < 0.116)
    assert steps[larger] < record.request.variables[THRESHOLD] < steps[smaller]


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        (
            [
                "budget.lowest=null",
                "space.bounds=[0,1]",
                "+space.variables.threshold=0.1",
                "space.tied=[[threshold,threshold]]",
            ],
            [
                "error: 4 problems:",
                "space.tied=[['threshold', 'threshold']]: expected nothing",
                "budget.lowest=None: expected the smallest keep ratio of the sizes",
                "space.bounds=[0.0, 1.0]: expected [low, high] with 0 < low",
                "space.variables={'threshold': 0.1}: expected nothing",
            ],
        ),
        (["budget.lowest=0.001"], ["cannot be met"]),
    ],
)
def test_what_makes_no_sense_is_refused_before_a_model_is_loaded(
    overrides: list[str],
    messages: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = lrbo_command("search", *SMALL, "method=svd", *overrides)
    assert ran.status != 0
    output = " ".join(ran.err.split())
    assert all(message in output for message in messages), ran.err
    assert not list(Path().glob("studies/*/study.json"))
