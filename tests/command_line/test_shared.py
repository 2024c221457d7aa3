"""Layers that share a factor in a search, from the command line to an opened checkpoint."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import lrbo
from lrbo.errors import ConfigError
from lrbo.models.loading import tiny_model
from lrbo.models.model_map import map_model
from lrbo.models.specs import sharing
from lrbo.pipeline.in_memory import factorize
from lrbo.study.journal import Study
from tests.support import reference
from tests.support.commands import SMALL_SEARCH, Ran, in_folder, lrbo_command, searched_in
from tests.support.tiny import build

SMALL = [*SMALL_SEARCH, "space=weights", "search.trials=3", "search.initial=3"]
SMALL += ["space.rank_multiple=1", "sensitivity.layers_per_kind=1"]
SHARED = ["study=shared", "budget.keep_ratio=0.5", "space.forms=[factored,shared_factored]"]
SAME = 1e-5  # nats: sums of float32 in another order


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ran]:
    """Run one search; tests may add to its folder."""
    return searched_in(tmp_path_factory.mktemp("shared"), *SMALL, *SHARED)


def test_layers_share_a_factor_together_within_the_budget(searched: tuple[Path, Ran]) -> None:
    study = Study(searched[0] / "studies/shared")
    units = map_model(tiny_model()).compressible
    dense = sum(unit.parameters for unit in units)
    uniform, analytic, _ = [record.request.allocation for record in study.state.completed]
    assert {option.form for option in uniform.options.values()} == {"factored"}
    assert analytic.cost.parameters <= dense // 2
    taken = [n for n, option in analytic.options.items() if option.form == "shared_factored"]
    assert taken
    for group in sharing(units):
        options = {analytic.options[spec.name] for spec in group}
        if {spec.name for spec in group} & {*taken}:
            assert len(options) == 1
    variables = {n for n in study.about.fields["variables"] if n.startswith("form.")}
    assert variables == {"form.low_rank", "form.shared_factored"}


def test_what_is_written_holds_and_scores_what_was_searched(
    searched: tuple[Path, Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(searched[0])
    study = Study(Path("studies/shared"))
    record = study.state.trials[1]
    written = lrbo_command("compress", "study=shared", "point=1", "refit.enabled=false",
                           "out=model", "format=remote_code", "output=json")  # fmt: skip
    assert written.status == 0, written.err
    opened = lrbo.load("model")
    assert reference.count_parameters(opened) == record.metrics["model_parameters"]
    options = record.request.allocation.compressed
    config = json.loads(Path("model/config.json").read_text("utf-8"))["lrbo"]
    assert config["units"] == {name: str(option) for name, option in options.items()}
    assert "have one of them in common" in Path("model/README.md").read_text("utf-8")
    losses = {name: test["metrics"]["nll"] for name, test in study.state.tests.items()}
    scored = lrbo_command("evaluate", "checkpoint=model", "data=generated", "data.window=64",
                          "data.test.tokens=512", "output=json")  # fmt: skip
    assert scored.json["nll"] == pytest.approx(losses["analytic"], abs=SAME)
    refitted = lrbo_command("compress", "study=shared", "point=1", "out=refitted")
    assert refitted.status == 0, refitted.err
    again = AutoModelForCausalLM.from_pretrained("refitted")
    assert reference.count_parameters(again) == record.metrics["model_parameters"]
    reported = lrbo_command("report", "study=shared", "figures=false", "output=json")
    assert reported.status == 0, reported.err
    refused = lrbo_command("compress", "study=shared", "point=1", "out=other", "format=adapter")
    assert refused.status == 2
    assert "but not" in refused.err
    assert "shared_factored" in refused.err


def test_it_begins_another_search_and_is_transferred(
    searched: tuple[Path, Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the variables are others, by the shares that its layers keep."""
    monkeypatch.chdir(searched[0])
    small = [*SMALL, "search.trials=1", "budget.keep_ratio=0.6", "warm_start=[study:shared]"]
    ran = lrbo_command("search", *small, "study=plain", "space.forms=[pivoted]")
    assert ran.status == 0, ran.err
    (record,) = Study(Path("studies/plain")).state.completed
    assert record.request.origin == "transfer"
    taken = {option.form for option in record.request.allocation.options.values()}
    assert "shared_factored" not in taken


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["space.forms=[shared_factored]"], "expected a form of single layers too"),
        (
            ["space=per_kind", "space.forms=[pivoted,shared_factored]"],
            "only space=weights decides about options of several layers together (shared_factored)",
        ),
        (
            ["space=error_threshold", "space.forms=[factored_int4,shared_factored]"],
            "only space=weights decides about options of several layers together (shared_factored)",
        ),
        (
            ["model=hf", "model.path=gpt2", "space.forms=[pivoted,shared_factored]"],
            "shared_factored: no two layers of this model read the same input",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(
    changes: list[str], message: str, tmp_path: Path
) -> None:
    build("gpt2").save_pretrained(tmp_path / "gpt2")
    ran = in_folder(tmp_path, lambda: lrbo_command("search", *SMALL, "study=other", *changes))
    assert ran.status == 2
    assert message in " ".join(ran.err.split())
    assert not list(tmp_path.glob("studies/*/study.json"))


def test_a_model_whose_layers_share_no_input_is_refused_in_memory() -> None:
    with pytest.raises(ConfigError, match="no two layers of this model read the same input"):
        factorize(build("gpt2"), None, "svd", forms=["pivoted", "shared_factored"], progress=False)
