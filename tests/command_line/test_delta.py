"""What a model adds to its base: from a search to checkpoints that score as its trials."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lrbo.config.schema import SearchConfig
from lrbo.layers.forms import is_delta
from lrbo.models.loading import tiny_model
from lrbo.models.sources import PACKAGED
from lrbo.pipeline import checks
from lrbo.study.journal import Study
from tests.support import tiny
from tests.support.commands import SMALL_SEARCH, Ran, lrbo_command, searched_in
from tests.support.pairs import tuned, write, written_pair
from tests.support.small_search import small_config

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

SMALL = [*SMALL_SEARCH, "model=hf", "model.path=tuned", "space=weights", "search.trials=3"]
SMALL += ["search.initial=3", "space.rank_multiple=1", "budget.measure=bytes", "study=delta"]
SMALL += ["model.dtype=float32", "model.device=cpu", "budget.keep_ratio=0.1"]
SMALL += ["bases.bands=[[2,4],[0,0]]", "method=loss_aware"]
DELTAS = ["model.base=base", "space.forms=[deltas]"]
SAME = 1e-5  # nats: sums of float32 in another order
TEST = ["data=generated", "data.window=64", "data.test.tokens=512", "output=json"]


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ran]:
    """Run one search over a pair; tests may add to its folder."""
    folder = tmp_path_factory.mktemp("pair")
    written_pair(folder)
    return searched_in(folder, *SMALL, *DELTAS)


@pytest.fixture
def study(searched: tuple[Path, Ran], monkeypatch: pytest.MonkeyPatch) -> Study:
    monkeypatch.chdir(searched[0])
    return Study(Path("studies/delta"))


def test_the_budget_counts_what_is_added_alone(study: Study) -> None:
    about, layers = study.about, study.about.units.values()
    dense = 4 * sum(spec.parameters for spec in layers)
    norms = 2 * 32  # of the two blocks, the only others that were trained
    assert about.model_parameters == dense // 4 + norms
    assert len(study.state.completed) == 3
    for record in study.state.completed:
        cost, forms = record.request.allocation.cost, record.request.allocation.options.values()
        assert cost.bytes <= dense // 10
        assert record.metrics["model_bytes"] == cost.bytes + 4 * norms
        assert all(is_delta(option.form) for option in forms)
    uniform = study.state.trials[0].request.allocation.options.values()
    assert {" ".join(str(o).split(" ")[:3]) for o in uniform} == {"delta_bands 2 4"}


def test_the_report_says_what_the_base_is(study: Study) -> None:
    out = lrbo_command("report", "study=delta", "figures=false").out
    line = f"Base\tbase (fingerprint {study.about.base_fingerprint}), shared and not counted"
    assert line in out
    assert "of what the model adds to its base" in out


@pytest.mark.parametrize("form", ["lrbo", "adapter", "merged"])
def test_every_format_scores_as_the_trial(form: str, study: Study) -> None:
    ran = lrbo_command(
        "compress", "study=delta", "point=1", f"out={form}", f"format={form}", "output=json"
    )
    assert ran.status == 0, ran.err
    assert "64 more parameters changed and are stored as they are: model.layers.0" in ran.err
    record = study.state.trials[1]
    if form == "lrbo":
        size = sum(each.nbytes for each in load_file("lrbo/model.safetensors").values())
        assert size == record.metrics["model_bytes"]
        assert ran.json["parameters_in_file"] == record.metrics["model_parameters"]
    if form == "adapter":
        size = sum(each.nbytes for each in load_file("adapter/adapter_model.safetensors").values())
        assert ran.json["adapter_bytes"] == size
        card = Path("adapter/README.md").read_text(encoding="utf-8")
        assert f"{size:,}\nbytes of tensors" in card
        names: dict[str, object] = {}
        exec(card.split("```python\n")[1].split("```")[0], names)
        assert "model" in names
    if form != "merged":
        card = Path(form, "README.md").read_text(encoding="utf-8")
        assert f"have the fingerprint `{study.about.base_fingerprint}`" in card
    scored = lrbo_command("evaluate", f"checkpoint={form}", "allow_seen=true", *TEST)
    assert scored.status == 0, scored.err
    assert scored.json["dtype"] == "float32"
    expected = study.state.tests["analytic"]["metrics"]["nll"]
    assert scored.json["nll"] == pytest.approx(expected, abs=SAME)


def test_vllm_and_a_modelling_file_are_refused(study: Study) -> None:
    ran = lrbo_command("compress", "study=delta", "out=v", "format=adapter", "vllm=true")
    assert "vllm=True: a change of a base has no integers to pack" in ran.err
    ran = lrbo_command("compress", "study=delta", "out=v", "format=remote_code")
    assert "its modelling file has no delta_" in ran.err
    assert not Path("v").exists()


def test_a_search_goes_on_with_the_base_that_it_was_begun_with(
    searched: tuple[Path, Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(searched[0], tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    assert lrbo_command("search", "study=delta", "search.trials=4").status == 0
    assert len(Study(Path("studies/delta")).state.completed) == 4
    write(Path("base"), tuned(tiny_model(), "up_proj"))
    for typed in (["search", "search.trials=5"], ["compress", "out=d", "refit.enabled=false"]):
        ran = lrbo_command(*typed, "study=delta")
        assert ran.status != 0
        assert "and the delta is of one with" in " ".join(ran.err.split())


@pytest.fixture
def others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write models of which some are no base of the tuned one."""
    monkeypatch.chdir(tmp_path)
    written_pair(tmp_path)
    write(tmp_path / "gpt2", tiny.build("gpt2"))
    write(tmp_path / "small", tiny.build("llama_tied"))
    write(tmp_path / "same", tiny_model())
    Path("empty").mkdir()


BAD = {
    "no base": (["space.forms=[delta]"], ["space.forms=['delta']: delta need the model that"]),
    "no delta": (
        ["model.base=base", "space.forms=[pivoted,int4]"],
        ["model.base='base': pivoted, int4 in space.forms need no base; expected only forms of"],
    ),
    "several": (
        [*DELTAS, "budget.include=[blocks,embedding]", "bases.bands=[[1]]"],
        ["2 problems", "budget.include=['blocks', 'embedding']: expected [blocks] with model.base",
         "bases.bands=[[1]]: expected one or several [directions of 8 bits, directions of 3 bits]"],
    ),
    "multiply-adds": ([*DELTAS, "budget.measure=macs"], ["a delta adds to all that the base runs"]),
    "rotated": (
        [*DELTAS, "model=smollm2_135m_rotated", "model.path=smollm2_135m_rotated"],
        ["model=smollm2_135m_rotated is in a random basis, and a base is not"],
    ),
    "itself": (["model.base=./tuned", DELTAS[1]], ["it is the model itself"]),
    "missing": (["model.base=./none", DELTAS[1]], ["model.base='./none': no such folder"]),
    "not whole": (["model.base=empty", DELTAS[1]], ["model.base='empty': no config.json in it"]),
    "another type": (["model.base=gpt2", DELTAS[1]], ["it is of type 'gpt2', the model of type"]),
    "other shapes": (
        ["model.base=small", DELTAS[1]],
        ["its vocabulary has 64 tokens, that of the model 258",
         "q_proj.weight is [16, 16], that of the model [32, 32]"],
    ),
    "the same weights": (
        ["model.path=base", "model.base=same", DELTAS[1]],
        ["model.base='same': its weights are those of the model, and there is no change"],
    ),
}  # fmt: skip


@pytest.mark.usefixtures("others")
@pytest.mark.parametrize("case", BAD)
def test_what_is_no_pair_is_refused_before_anything_is_worked_out(case: str) -> None:
    overrides, messages = BAD[case]
    ran = lrbo_command("search", *SMALL, *overrides)
    assert ran.status != 0
    output = " ".join(ran.err.split())
    assert all(message in output for message in messages), ran.err
    assert "Calibration" not in ran.err
    assert not list(Path().glob("studies/*/study.json"))


def test_an_evaluation_takes_no_base() -> None:
    ran = lrbo_command("evaluate", "model=tiny", "model.base=base", "data=generated")
    assert "model.base='base': expected null" in ran.err


def test_names_of_bases_that_are_no_folder_are_those_of_sources() -> None:
    names = ["tiny", *PACKAGED]
    assert all(map(checks.is_source, names))
    config = small_config("space=weights", "space.forms=[delta]", "model=hf", "model.path=x")
    assert isinstance(config, SearchConfig)
    config.model.base = "tiny"
    assert not any(problem.startswith("model.base") for problem in checks.check(config))
