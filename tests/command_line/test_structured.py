"""Sparse entries, kept outputs, Kronecker sums and ranks in one search, counted in parameters."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lrbo.layers.kronecker import KroneckerLinear
from lrbo.models.loading import tiny_model
from lrbo.models.model_map import map_model
from lrbo.study.journal import Study
from tests.support.commands import SMALL_SEARCH, Ran, lrbo_command, searched_in
from tests.support.tiny import token_ids

FORMS = ["pivoted", "sparse", "sparse_rows", "kronecker"]
SMALL = [*SMALL_SEARCH, "space=weights", "search.trials=3", "search.initial=3"]
SMALL += ["space.rank_multiple=1", "method=loss_aware"]
MIXED = [f"space.forms=[{','.join(FORMS)}]", "budget.keep_ratio=0.5", "bases.blocks=[[2,1],[4,4]]"]
MIXED += ["study=mixed", "bases.percentages=[25]"]
SAME = 1e-5  # nats: sums of float32 in another order


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ran]:
    return searched_in(tmp_path_factory.mktemp("mixed"), *SMALL, *MIXED)


def test_every_trial_keeps_half_of_the_parameters(mixed: tuple[Path, Ran]) -> None:
    state = Study(mixed[0] / "studies/mixed").state
    dense = sum(spec.parameters for spec in map_model(tiny_model()).compressible)
    assert len(state.completed) == 3
    for record in state.completed:
        assert record.request.allocation.cost.parameters <= dense // 2
    own = {name for name in state.trials[2].request.variables if name.startswith("form.")}
    names = ("low_rank", "sparse", "sparse_rows", "kronecker", "repair")
    assert own == {f"form.{name}" for name in names}


def test_the_checkpoint_holds_what_was_counted_and_scores_as_its_trial(
    mixed: tuple[Path, Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(mixed[0])
    ran = lrbo_command(
        "compress", "study=mixed", "point=1", "out=analytic", "refit.enabled=false", "output=json"
    )
    assert ran.status == 0, ran.err
    study, folder = Study(Path("studies/mixed")), Path("analytic")
    record = study.state.trials[1]
    tensors = load_file(folder / "model.safetensors")
    assert sum(tensor.nbytes for tensor in tensors.values()) == record.metrics["model_bytes"]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["parameters"] == record.metrics["model_parameters"]
    scored = lrbo_command(
        "evaluate", f"checkpoint={folder}", "data=generated", "data.window=64",
        "data.test.tokens=512", "output=json",
    )  # fmt: skip
    assert scored.status == 0, scored.err
    assert scored.json["nll"] == pytest.approx(
        study.state.tests["analytic"]["metrics"]["nll"], abs=SAME
    )
    reported = lrbo_command("report", "study=mixed", "output=json", "figures=false")
    assert reported.status == 0, reported.err


def test_the_configuration_of_kngpt2_halves_every_other_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    typed = ["experiment=kngpt2", "model=tiny", "data=generated", "data.window=64", *SMALL[3:7]]
    ran = lrbo_command("search", *typed, "study=one", "budget.keep_ratio=0.8")
    assert ran.status == 0, ran.err
    options = Study(Path("studies/one")).state.trials[1].request.allocation.options
    halved = {name for name, option in options.items() if option.form == "kronecker"}
    assert all(options[name].level[-1] == 1 for name in halved)
    assert {name.split(".")[2] for name in halved} == {"1"}
    assert {name.split(".")[-1] for name in options} - {name.split(".")[-1] for name in halved} <= {
        "o_proj",
        "v_proj",  # stays dense within this budget
    }
    ran = lrbo_command("compress", "study=one", "point=1", "out=model", "output=json")
    assert ran.status == 0, ran.err
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained("model")
        assert bool(torch.isfinite(model(token_ids(2, 16)).logits).all())
    own = {name for name, m in model.named_modules() if isinstance(m, KroneckerLinear)}
    assert own == halved


def test_blocks_that_divide_no_layer_are_refused_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = lrbo_command("search", *SMALL, "space.forms=[kronecker]", "bases.blocks=[[5,7]]")
    assert ran.status != 0
    output = " ".join(ran.err.split())
    assert "kronecker of model.layers.0.self_attn.q_proj: expected blocks of which one" in output
    assert "divides 32 x 32, got [[5, 7]]" in output
    typed = ["bases.blocks=[[1,1]]", "bases.row_percentages=[0]"]
    ran = lrbo_command("search", *SMALL, "space.forms=[kronecker]", *typed)
    assert ran.status != 0
    assert "bases.blocks=[[1, 1]]: expected one or several [rows, columns]" in ran.err
    assert "bases.row_percentages=[0]: expected one or several whole numbers" in ran.err
    assert not list(Path().glob("studies/*/study.json"))


def test_terms_that_save_no_multiply_adds_are_not_measured(tmp_path: Path) -> None:
    """Of blocks like these many terms have fewer parameters than dense, and few are as fast."""
    macs = ["study=macs", "budget.measure=macs", "space.forms=[pivoted,kronecker]"]
    macs += ["bases.blocks=[[4,4]]", "sensitivity.layers_per_kind=1", "budget.keep_ratio=0.7"]
    folder, _ = searched_in(tmp_path, *SMALL, *macs)
    content = json.loads((folder / "studies/macs/sensitivity.json").read_text("utf-8"))
    terms = [m["option"] for m in content["measurements"] if m["option"].startswith("kronecker")]
    assert terms
