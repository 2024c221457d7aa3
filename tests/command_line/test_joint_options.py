"""Fewer neurons and skipped parts in a search, from the command line to an opened checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import lrbo
from lrbo.errors import ConfigError
from lrbo.models.loading import tiny_model
from lrbo.models.model_map import map_model
from lrbo.pipeline.in_memory import factorize
from lrbo.study.journal import Study
from tests.checkpoints.test_nemotron_nas import Reader
from tests.support import reference
from tests.support.commands import SMALL_SEARCH, Ran, in_folder, lrbo_command, searched_in
from tests.support.tiny import token_ids

SMALL = [*SMALL_SEARCH, "space=weights", "search.trials=3", "search.initial=3"]
SMALL += ["space.rank_multiple=1", "sensitivity.layers_per_kind=0"]
STRUCTURED = ["study=structured", "budget.keep_ratio=0.5", "space.forms=[structured]"]
SAME = 1e-5  # nats: sums of float32 in another order
JOINT = ("neurons", "skip")


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ran]:
    """Run one search; tests may add to its folder."""
    return searched_in(tmp_path_factory.mktemp("structured"), *SMALL, *STRUCTURED)


def test_parts_are_compressed_together_within_the_budget(searched: tuple[Path, Ran]) -> None:
    study = Study(searched[0] / "studies/structured")
    units = map_model(tiny_model()).by_name
    dense = sum(unit.parameters for unit in units.values() if unit.block is not None)
    uniform, *others = [record.request.allocation for record in study.state.completed]
    assert {option.form for option in uniform.options.values()} == {"pivoted"}
    forms = set()
    for allocation in others:
        assert allocation.cost.parameters <= dense // 2
        for name, option in allocation.options.items():
            if option.form in JOINT:
                together = [n for n, unit in units.items() if unit.closing == units[name].closing]
                assert {allocation.options[each] for each in together} == {option}
                forms.add(option.form)
    assert forms
    variables = set(study.about.fields["variables"])
    own = {name for name in variables if name.startswith("form.")}
    assert own == {"form.low_rank", "form.neurons", "form.skip"}


def test_what_is_written_holds_and_scores_what_was_searched(
    searched: tuple[Path, Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(searched[0])
    study = Study(Path("studies/structured"))
    record = study.state.trials[1]
    written = lrbo_command("compress", "study=structured", "point=1", "out=model",
                           "refit.enabled=false", "output=json")  # fmt: skip
    assert written.status == 0, written.err
    opened = AutoModelForCausalLM.from_pretrained("model")
    assert reference.count_parameters(opened) == record.metrics["model_parameters"]
    config = json.loads(Path("model/config.json").read_text("utf-8"))["quantization_config"]
    options = record.request.allocation.compressed
    assert config["units"] == {name: str(option) for name, option in options.items()}
    card = Path("model/README.md").read_text("utf-8")
    for form, words in zip(JOINT, ("have fewer neurons", "are not run"), strict=True):
        assert (words in card) == (form in {option.form for option in options.values()})
    scored = lrbo_command("evaluate", "checkpoint=model", "data=generated", "data.window=64",
                          "data.test.tokens=512", "output=json")  # fmt: skip
    losses = {name: test["metrics"]["nll"] for name, test in study.state.tests.items()}
    assert scored.json["nll"] == pytest.approx(losses["analytic"], abs=SAME)
    refitted = lrbo_command("compress", "study=structured", "point=1", "out=refitted")
    assert refitted.status == 0, refitted.err
    refused = lrbo_command(
        "compress", "study=structured", "point=1", "out=code", "format=remote_code"
    )
    assert refused.status == 2
    assert "its modelling file has no" in refused.err


def test_blocks_that_differ_are_written_for_other_readers(
    searched: tuple[Path, Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(searched[0])
    line = ["compress", "study=structured", "point=1", "refit.enabled=false", "output=json"]
    ran = lrbo_command(*line, "out=nas", "format=nemotron_nas")
    assert ran.status == 0, ran.err
    assert "zeros up to multiples of 256" in ran.err
    if not Path("model").exists():
        assert lrbo_command(*line, "out=model").status == 0
    reader, ids = Reader(Path("nas")), token_ids(2, 9)
    with torch.inference_mode():
        expected = lrbo.load("model")(ids).logits
    error = (reader.logits(ids) - expected).abs().max()
    assert float(error) < 1e-5 * float(expected.abs().max())
    assert ran.json["parameters_in_file"] == sum(t.numel() for t in reader.tensors.values())
    assert ran.json["forms"] == []
    card = Path("nas/README.md").read_text(encoding="utf-8")
    assert "in the layout of Nemotron-NAS: MLPs of" in card
    assert "`vllm serve nas --trust-remote-code`" in card
    assert "from_pretrained" not in card


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["space.forms=[neurons,skip]"], "expected a form of single layers too, such as pivoted"),
        (
            ["space=per_kind", "space.forms=[pivoted,skip]"],
            "only space=weights decides about options of several layers together (skip)",
        ),
        (["space.forms=[structured]", "sensitivity.enabled=false"], "multiplies loss curves"),
    ],
)
def test_what_cannot_be_together_is_refused_before_anything_is_loaded(
    changes: list[str], message: str, tmp_path: Path
) -> None:
    ran = in_folder(tmp_path, lambda: lrbo_command("search", *SMALL, "study=other", *changes))
    assert ran.status == 2
    assert message in ran.err
    assert not (tmp_path / "studies").exists()


def test_joint_forms_alone_are_refused_in_memory() -> None:
    with pytest.raises(ConfigError, match="expected a form of single layers too"):
        factorize(tiny_model(), None, "svd", forms=["skip"], progress=False)
