"""Forms and measures from the command line: a form per layer, a budget that says what counts."""

import json
from pathlib import Path
from typing import Any

import pytest

import lrbo
from lrbo.layers.options import DENSE, MEASURES, Option
from lrbo.models.loading import tiny_model
from lrbo.models.model_map import map_model
from lrbo.study.about import READ
from lrbo.study.journal import Study
from tests.support.commands import SMALL_SEARCH, Ran, in_folder, lrbo_command, searched_in

SMALL = [*SMALL_SEARCH, "space=weights", "search.trials=3", "search.initial=2"]
MIXED = ["study=mixed", "budget.keep_ratio=0.5", "budget.measure=bytes"]
MIXED += ["space.forms=[factored,pivoted]", "space.rank_multiple=1"]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ran]:
    """Run one search over two forms; tests may add to its folder."""
    return searched_in(tmp_path_factory.mktemp("mixed"), *SMALL, *MIXED)


def stored_bytes(folder: str, names: list[str]) -> int:
    """Count the tensors of some layers of a checkpoint."""
    model = lrbo.load(folder)
    return sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in model.state_dict().items()
        if any(name.startswith(f"{layer}.") for layer in names)
    )


def test_a_byte_budget_over_two_forms_gives_one_checkpoint_with_both(
    mixed: tuple[Path, Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, searched = mixed
    monkeypatch.chdir(folder)
    record = Study(Path("studies/mixed")).state.trials[1]
    assert record.request.origin == "analytic"
    options = record.request.allocation.options
    assert {option.form for option in options.values()} >= {"factored", "pivoted"}
    dense = 4 * sum(spec.parameters for spec in map_model(tiny_model()).compressible)
    ran = lrbo_command(
        "compress", "study=mixed", "point=1", "out=both", "refit.enabled=false", "output=json"
    )
    assert ran.status == 0, ran.err
    assert ran.json["forms"] == ["factored", "pivoted"]
    held = stored_bytes("both", list(options))
    assert held == record.request.allocation.cost.bytes <= dense // 2
    assert ran.json["keep_ratio"] == held / dense
    written = json.loads(Path("both/config.json").read_text(encoding="utf-8"))
    card = Path("both/README.md").read_text(encoding="utf-8")
    assert "of the bytes that its budget covers" in card
    assert "parameters kept" not in card
    units = written["quantization_config"]["units"]
    compressed = {name: option for name, option in options.items() if option != DENSE}
    assert {name: Option.parse(text) for name, text in units.items()} == compressed
    scored = lrbo_command(
        "evaluate", "checkpoint=both", "data=generated", "data.window=64", "data.test.tokens=512",
        "output=json",
    )  # fmt: skip
    assert scored.status == 0, scored.err
    tested = searched.json["test"]["analytic"]
    assert scored.json["text"] == tested["text"]
    assert scored.json["nll"] == pytest.approx(tested["nll"], abs=1e-5)


def test_the_report_says_what_was_counted_and_the_table_which_form(
    mixed: tuple[Path, Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, searched = mixed
    monkeypatch.chdir(folder)
    ran = lrbo_command("report", "study=mixed", "figures=false", "output=json")
    assert ran.status == 0, ran.err
    for words in ("0.5 of the compressible ones", "Share of the bytes kept in the best trial"):
        assert words in ran.out
    assert "Share of the parameters" not in ran.out
    for before in ("uniform", "analytic", "best"):
        assert ran.json[before] == searched.json[before]
        assert ran.json[before]["keep_ratio"] <= 0.5
    table = lrbo.open_study("mixed").options(1)
    assert set(table["form"]) >= {"factored", "pivoted"}
    first = lrbo.open_study("mixed").options(0)
    assert set(first["form"]) <= {"factored", "dense"}  # nothing compares forms of a baseline


@pytest.mark.parametrize("measure", MEASURES)
def test_a_search_keeps_to_the_budget_in_its_measure(
    measure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mixed: tuple[Path, Ran]
) -> None:
    if measure == "bytes":
        folder, name = mixed[0], "mixed"
    else:
        folder, name = tmp_path, "other"
        typed = ["study=other", "budget.keep_ratio=0.5", f"budget.measure={measure}"]
        ran = in_folder(folder, lambda: lrbo_command("search", *SMALL, *typed))
        assert ran.status == 0, ran.err
    monkeypatch.chdir(folder)
    layers = map_model(tiny_model()).compressible
    parameters = sum(spec.parameters for spec in layers)
    macs = sum(spec.out_features * spec.in_features for spec in layers)
    dense = {"parameters": parameters, "bytes": 4 * parameters, "macs": macs}[measure]
    records = Study(Path("studies") / name).state.completed
    assert len(records) == 3
    for record in records:
        spent = record.request.allocation.cost.of(measure)  # type: ignore[arg-type]
        assert spent <= dense // 2
        assert record.metrics["keep_ratio"] == spent / dense


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        (
            ["space.forms=[banded]"],
            [
                "space.forms=['banded']: expected some of dense, factored, pivoted, ",
                "each once, and one beside dense",
            ],
        ),
        (["space.forms=[dense]"], ["space.forms=['dense']: ", "one beside dense"]),
        (["space.forms=[]"], ["space.forms=[]: ", "one beside dense"]),
        (["space.forms=[pivoted,pivoted]"], ["['pivoted', 'pivoted']: ", "each once"]),
        (
            ["budget.measure=flops", "space.forms=[banded]", "seed=-1"],
            ["budget.measure='flops': expected parameters or bytes or macs", "'banded'", "seed=-1"],
        ),
        *(
            (
                [f"budget.measure={measure}", "budget.keep_ratio=0.001"],
                ["cannot be met", "smallest feasible budget.keep_ratio", words],
            )
            for measure, words in (
                ("parameters", "parameters (keep_ratio"),
                ("bytes", "bytes (keep_ratio"),
                ("macs", "multiply-adds (keep_ratio"),
            )
        ),
        (["budget.storage=pivoted"], ["budget.storage is no key"]),
    ],
)
def test_what_no_search_can_offer_is_refused_before_a_model_is_loaded(
    overrides: list[str], messages: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "lrbo.tasks.causal_lm.CausalLM.load", lambda *_, **__: pytest.fail("model loaded")
    )
    typed = ["study=doomed", "space.minimum_rank=4", *overrides]
    ran = lrbo_command("search", *SMALL, *typed)
    assert ran.status == 2
    output = " ".join(ran.err.split())
    for message in messages:
        assert message in output
    assert not (tmp_path / "studies" / "doomed").exists()


def test_a_study_of_an_earlier_format_is_refused_by_version(
    mixed: tuple[Path, Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "studies" / "old"
    old.mkdir(parents=True)
    source = mixed[0] / "studies" / "mixed"
    about: dict[str, Any] = json.loads((source / "study.json").read_text(encoding="utf-8"))
    del about["budget"], about["forms"], about["added_biases"]
    about |= {"format": 2, "budget_parameters": 1000, "storage": "pivoted", "adds_bias": False}
    (old / "study.json").write_text(json.dumps(about), encoding="utf-8")
    for name in ("journal.jsonl", "config.yaml"):
        (old / name).write_bytes((source / name).read_bytes())
    before = {path.name: path.read_bytes() for path in old.iterdir()}
    monkeypatch.chdir(tmp_path)
    for command in (["search", *SMALL], ["report"], ["compress", "out=new"]):
        ran = lrbo_command(*command, "study=old")
        assert ran.status == 2
        output = " ".join(ran.err.split())
        refusal = f"this lrbo reads {READ}; an older lrbo began it: go on with that version"
        assert refusal in output
    assert {name: (old / name).read_bytes() for name in before} == before
