"""A search whose budget covers embedding and head: counted, reported, written, and refused."""

import json
from html import unescape
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lrbo.layers.options import dense_cost
from lrbo.models.loading import tiny_model
from lrbo.models.model_map import map_model
from lrbo.study.journal import Study
from tests.support.commands import SMALL_SEARCH, Ran, in_folder, lrbo_command, searched_in
from tests.support.tiny import build

SMALL = [*SMALL_SEARCH, "space=weights", "search.trials=3", "search.initial=3"]
SMALL += ["space.rank_multiple=1", "budget.measure=bytes"]
SMALL += ["bases.group_sizes=[16,32]", "budget.bits_per_parameter=8", "study=whole"]
SMALL += ["space.forms=[pivoted,int4,int3]", "method=loss_aware"]
WHOLE = "budget.include=[blocks,embedding,head]"
ENDS = ("model.embed_tokens", "lm_head")
SAME = 1e-5  # nats: sums of float32 in another order


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ran]:
    """Run one search over the whole model, and write its analytic trial; untied."""
    folder = tmp_path_factory.mktemp("whole")
    timed = ["latency.enabled=true", "latency.repeats=3"]  # which puts stored tables in
    _, ran = searched_in(folder, *SMALL, WHOLE, *timed)
    written = in_folder(
        folder,
        lambda: lrbo_command(
            "compress", "study=whole", "point=1", "out=one", "refit.enabled=false", "output=json"
        ),
    )
    assert written.status == 0, written.err
    return folder, ran


def test_every_trial_decides_embedding_and_head(whole: tuple[Path, Ran]) -> None:
    state = Study(whole[0] / "studies/whole").state
    layers = map_model(tiny_model()).covering(["blocks", "embedding", "head"])
    dense = dense_cost(layers.compressible, 4).bytes
    for record in state.completed:
        allocation = record.request.allocation
        assert set(ENDS) <= allocation.options.keys()
        assert allocation.cost.bytes <= dense // 4
        outside = 4 * layers.parameters - dense
        assert record.metrics["model_bytes"] == allocation.cost.bytes + outside
    assert {str(o) for o in state.trials[0].request.allocation.options.values()} == {"int4 16 0"}
    assert any(
        o.form.startswith("int") for o in state.trials[1].request.allocation.options.values()
    )
    assert {"kind.embed_tokens", "kind.lm_head"} <= state.trials[2].request.variables.keys()


def test_the_report_says_what_the_budget_covers(whole: tuple[Path, Ran], pages: None) -> None:
    layers = map_model(tiny_model()).covering(["blocks", "embedding", "head"])
    share = dense_cost(layers.compressible, 4).parameters / layers.parameters
    covered = whole[1].json["covered"]
    assert covered["include"] == ["blocks", "embedding", "head"]
    assert covered["parameters"] == covered["bytes"] == share
    assert 0.9 < covered["best_bytes"] < share
    text = f"blocks, embedding and head: {share:.1%} of the dense model's parameters and bytes"
    report = in_folder(whole[0], lambda: lrbo_command("report", "study=whole"))
    assert text in " ".join(report.out.split())
    assert text in (whole[0] / "one/README.md").read_text("utf-8")
    page = in_folder(whole[0], lambda: lrbo_command("report", "study=whole", "format=html"))
    assert page.status == 0, page.err
    html = (whole[0] / "studies/whole/report.html").read_text("utf-8")
    assert text in unescape(html)


def test_the_folder_holds_and_scores_what_its_trial_did(whole: tuple[Path, Ran]) -> None:
    folder = whole[0] / "one"
    config = json.loads((folder / "config.json").read_text("utf-8"))
    units = config["quantization_config"]["units"]
    record = Study(whole[0] / "studies/whole").state.trials[1]
    options = record.request.allocation.compressed
    assert {name: str(option) for name, option in options.items()} == units
    size = sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    assert size == record.metrics["model_bytes"]
    scored = in_folder(
        whole[0],
        lambda: lrbo_command(
            "evaluate", "checkpoint=one", "data=generated", "data.window=64",
            "data.test.tokens=512", "output=json",
        ),
    )  # fmt: skip
    assert scored.status == 0, scored.err
    loss = Study(whole[0] / "studies/whole").state.tests["analytic"]["metrics"]["nll"]
    assert scored.json["nll"] == pytest.approx(loss, abs=SAME)


def test_a_refit_solves_the_blocks_behind_the_compressed_embedding(whole: tuple[Path, Ran]) -> None:
    ran = in_folder(
        whole[0], lambda: lrbo_command("compress", "study=whole", "point=1", "out=refitted")
    )
    assert ran.status == 0, ran.err
    config = json.loads((whole[0] / "refitted/config.json").read_text("utf-8"))
    assert config["quantization_config"]["provenance"]["refit"]["trials"]


def test_remote_code_of_a_low_rank_embedding_is_refused(tmp_path: Path) -> None:
    forms = "space.forms=[pivoted,frequency_groups]"
    ranks = ["study=ranks", forms, "search.trials=1", "search.initial=2"]
    replaced = {each.partition("=")[0] for each in ranks}
    own = [each for each in SMALL if each.partition("=")[0] not in replaced]
    searched_in(tmp_path, *own, *ranks, WHOLE)
    ran = in_folder(
        tmp_path,
        lambda: lrbo_command("compress", "study=ranks", "point=0", "out=two", "format=remote_code"),
    )
    assert ran.status != 0
    assert "has no embedding that is not dense, which model.embed_tokens is" in " ".join(
        ran.err.split()
    )


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("budget.include=[blocks,norms]", "expected blocks, and beside it embedding or head or"),
        ("budget.include=[embedding]", "expected blocks, and beside it embedding or head or both"),
        ("budget.include=[blocks,blocks]", "expected blocks, and beside it embedding or head or"),
        (
            "space.forms=[pivoted,frequency_groups]",
            "frequency_groups is of embedding and head alone, and budget.include=['blocks'] has",
        ),
        ("space.forms=[frequency_groups]", "expected a form of layers in blocks too, such as"),
        ("bases.frequency_groups=[1]", "expected one or several whole numbers from 2 on"),
    ],
)
def test_parts_that_there_are_not_are_refused(
    override: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = lrbo_command("search", *SMALL, override)
    assert ran.status != 0
    assert expected in " ".join(ran.err.split())


def test_groups_that_leave_one_without_rows_are_refused_before_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    groups = ["space.forms=[pivoted,frequency_groups]", "bases.frequency_groups=[5000,300]"]
    ran = lrbo_command("search", *SMALL, WHOLE, *groups)
    assert ran.status != 0
    expected = "frequency_groups of model.embed_tokens: expected numbers of groups that all have"
    assert expected in " ".join(ran.err.split())
    assert "got [5000, 300]; change those of bases or leave the forms out" in ran.err


def test_a_tied_head_and_lookups_without_cost_are_refused_before_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    build("llama_tied").save_pretrained("tied")
    model = ["model=hf", "model.path=tied", "model.device=cpu"]
    ran = lrbo_command("search", *SMALL, *model, "budget.include=[blocks,head]")
    assert "lm_head, is tied to its embedding, model.embed_tokens; write embedding" in " ".join(
        ran.err.split()
    )
    macs = [each for each in SMALL if "bits_per" not in each and "measure" not in each]
    ran = lrbo_command("search", *macs, WHOLE, "budget.measure=macs")
    assert "model.embed_tokens only looks rows up, and costs no multiply-adds" in " ".join(
        ran.err.split()
    )
