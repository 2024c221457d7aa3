"""Made once, used again; made anew as soon as anything that matters is different."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from lrbo.commands import compress, search
from lrbo.config.choices import ROLES
from lrbo.config.saved import differences, to_yaml
from lrbo.config.schema import CompressConfig
from lrbo.errors import ConfigError, ModelError, StudyError
from lrbo.factorization.methods import LossAware
from lrbo.factorization.options import BaseOptions
from lrbo.factorization.registry import METHODS
from lrbo.layers.modules import PRODUCTS
from lrbo.layers.options import DENSE, MEASURES, Budget, Cost, Measure, Option, cost_of
from lrbo.models import loading
from lrbo.models.devices import dtype_name
from lrbo.models.model_map import map_model
from lrbo.models.parameters import fingerprint
from lrbo.models.specs import LayerSpec
from lrbo.models.tiny import byte_tokenizer
from lrbo.pipeline import build_worker, planning
from lrbo.pipeline.planning import model_source
from lrbo.pipeline.search_space import build_search_space, largest_ranks, menus_of
from lrbo.reports import mlflow_view
from lrbo.study.about import about_of
from lrbo.study.events import FORMAT
from lrbo.study.journal import Study
from lrbo.study.state import StudyState
from lrbo.study.study_record import follows
from lrbo.tasks.causal_lm import CausalLM
from lrbo.tracking import mlflow_store
from lrbo.tracking.tracker import MlflowTracker, NullTracker
from tests.support.fakes import make_about, make_layers
from tests.support.small_search import SMALL, RecordingReporter, small_config
from tests.support.tiny import build_on_meta


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of its own, and an empty folder to work in."""
    monkeypatch.setenv("LRBO_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


@pytest.fixture
def other_weights(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Let the tiny model come out with one number of its weights changed, from then on."""

    def change() -> None:
        original = loading.tiny_model

        def changed(seed: int = 0) -> PreTrainedModel:
            model = original(seed)
            with torch.no_grad():
                model.model.layers[0].self_attn.q_proj.weight[0, 0] += 0.5
            return model

        monkeypatch.setattr(loading, "tiny_model", changed)

    return change


def make_worker(name: str, *overrides: str) -> tuple[Any, RecordingReporter]:
    """Build the worker of a study, which is begun if it is new."""
    study, reporter = Study(Path("studies") / name), RecordingReporter()
    with study.locked():
        plan = planning.plan_search(small_config(f"study={name}", *overrides), study, [])
        return build_worker.build_worker(plan, study, reporter), reporter


def made(cache: Path) -> dict[str, int]:
    """Return how many results of each sort the cache holds."""
    return {
        folder: len(list((cache / folder).iterdir())) if (cache / folder).is_dir() else 0
        for folder in ("calibration", "factors")
    }


# --- cache -------------------------------------------------------------------------------------


def test_statistics_and_factors_are_made_once(cache: Path) -> None:
    first, reporter = make_worker("one")
    assert reporter.steps == ["Calibration", "Factorization"]
    assert made(cache) == {"calibration": 1, "factors": 1}
    # Another study of the same model and text: budget, space and trials are none of their business.
    second, reporter = make_worker(
        "two",
        "budget.keep_ratio=0.7",
        "space=per_layer",
        "search.trials=3",
        "space.rank_multiple=2",
    )
    assert reporter.steps == []
    assert made(cache) == {"calibration": 1, "factors": 1}
    assert set(second.prepared) == set(first.prepared) != set()
    for name, factors in first.prepared.items():
        assert torch.equal(factors.left, second.prepared[name].left)
        assert torch.equal(factors.right, second.prepared[name].right)


BOTH = ["Calibration", "Factorization"]
INTEGERS = ["space.forms=[pivoted,int4]", "bases.group_sizes=[16]"]


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        (["method=svd", "sensitivity.enabled=false"], ["Factorization"]),  # needs no statistics
        (["calibration.gradient_share=1"], BOTH),
        pytest.param(["data.calibration.tokens=256"], BOTH, marks=pytest.mark.slow),
        pytest.param(["data.window=32"], BOTH, marks=pytest.mark.slow),
        pytest.param(["seed=1"], BOTH, marks=pytest.mark.slow),  # it chooses the windows
        pytest.param(["model.dtype=bfloat16"], BOTH, marks=pytest.mark.slow),
        # GPTQ reads second moments, which the method of the experiment does not.
        ([*INTEGERS], BOTH),
        ([*INTEGERS, "bases.method=nearest"], ["Factorization"]),
        (["calibration.batch_windows=1"], []),  # another order of the same sums
        pytest.param(["bases.damping=0.1"], [], marks=pytest.mark.slow),  # of no integers
        pytest.param(["data.test.tokens=256"], [], marks=pytest.mark.slow),
        pytest.param(["evaluation.batch_windows=2"], [], marks=pytest.mark.slow),
    ],
)
def test_only_what_matters_is_made_again(
    cache: Path, overrides: list[str], steps: list[str]
) -> None:
    make_worker("one")
    _, reporter = make_worker("two", *overrides)
    assert reporter.steps == steps
    assert made(cache) == {
        "calibration": 1 + ("Calibration" in steps),
        "factors": 1 + ("Factorization" in steps),
    }


def test_integers_are_made_again_with_sweeps_and_lose_less(cache: Path) -> None:
    losses = []
    for name, sweeps in (("one", 0), ("two", 1)):
        line = [*INTEGERS, "budget.measure=bytes", f"bases.sweeps={sweeps}"]
        worker, reporter = make_worker(name, *line)
        assert reporter.steps == (["Factorization"] if sweeps else BOTH)
        units = [each.based[Option("int4", (16,))] for each in worker.prepared.values()]
        losses.append(sum(float(unit.rest.loss[0]) for unit in units))
    assert losses[1] < losses[0]
    assert made(cache) == {"calibration": 1, "factors": 2}
    problems = differences(Study(Path("studies/one")).config, small_config("study=one", *line))
    assert problems == ["bases.sweeps: the study has 0, the command has 1"]


def test_other_weights_get_factors_of_their_own(
    cache: Path, other_weights: Callable[[], None]
) -> None:
    first, _ = make_worker("one")
    other_weights()
    second, reporter = make_worker("two")
    assert reporter.steps == BOTH
    name = "model.layers.0.self_attn.q_proj"
    assert not torch.equal(first.prepared[name].right, second.prepared[name].right)


def test_factors_that_were_deleted_come_from_the_statistics_that_are_left(cache: Path) -> None:
    first, _ = make_worker("one")
    shutil.rmtree(cache / "factors")
    second, reporter = make_worker("one")
    assert reporter.steps == ["Factorization"]
    for name, factors in first.prepared.items():
        assert torch.equal(factors.left, second.prepared[name].left)


def test_a_continued_study_keeps_its_dense_scores(cache: Path) -> None:
    make_worker("one")
    journal = Path("studies/one/journal.jsonl").read_bytes()
    _, reporter = make_worker("one")
    assert not any("Dense" in line for line in reporter.lines)
    assert Path("studies/one/journal.jsonl").read_bytes() == journal


def test_a_study_keeps_its_windows_when_its_text_is_gone(cache: Path) -> None:
    roles = ("calibration", "validation", "test")
    for role in roles:
        Path(f"{role}.txt").write_text(f"the {role} cat sat on the mat. " * 90, encoding="utf-8")
    texts = [f"data.{role}.path={role}.txt" for role in roles]
    first, _ = make_worker("one", "data=files", "data.window=64", *texts)
    for role in roles:
        Path(f"{role}.txt").unlink()
    second, _ = make_worker("one", "data=files", "data.window=64", *texts)
    assert torch.equal(first.windows, second.windows)


def test_a_beginning_that_was_cut_off_leaves_no_text_to_the_next(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Study, "begin", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make_worker("one", "data.window=64")
    assert Path("studies/one/tokens.safetensors").is_file()
    worker, _ = make_worker("one", "data.window=32")
    other, _ = make_worker("two", "data.window=32")
    assert torch.equal(worker.windows, other.windows)


# --- the same model, or none -------------------------------------------------------------------


def fingerprints(change: Callable[[], None]) -> Iterator[str]:
    """Yield the fingerprint of the tiny model before and after its change."""
    yield fingerprint(loading.tiny_model())
    change()
    yield fingerprint(loading.tiny_model())


def test_a_study_begun_with_other_weights_is_refused_with_both_fingerprints(
    cache: Path, other_weights: Callable[[], None]
) -> None:
    config = small_config("study=mine")
    search.run(config, SMALL, RecordingReporter())
    folder = Path("studies/mine")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "lock"}
    old, new = fingerprints(other_weights)
    assert old != new
    wanted = rf"mine was begun with .* {old}, .* {new}.*study=NAME"
    config.search.trials = 2
    with pytest.raises(StudyError, match=wanted):
        search.run(config, SMALL, RecordingReporter())
    target = CompressConfig(study="mine", out="new")
    with pytest.raises(StudyError, match=wanted):
        compress.run(target, RecordingReporter())
    assert not Path("new").exists()
    assert {p: p.read_bytes() for p in before} == before


def test_the_model_of_a_study_is_compared_in_the_dtype_of_the_study(cache: Path) -> None:
    make_worker("half", "model.dtype=bfloat16")
    study = Study(Path("studies/half"))
    model = loading.tiny_model()  # float32: the same weights, not yet rounded
    assert fingerprint(model) != study.about.model_fingerprint
    build_worker.require_same_model(study, model)
    with torch.no_grad():
        model.lm_head.weight[-1, -1] += 1.0
    with pytest.raises(StudyError, match=r"its weights or config\.json changed"):
        build_worker.require_same_model(study, model)


# --- plan --------------------------------------------------------------------------------------


def test_a_plan_lists_every_problem_of_model_budget_and_text_at_once(cache: Path) -> None:
    config = small_config("budget.keep_ratio=0.05", "data.test.tokens=9000000")
    with pytest.raises(ConfigError) as caught:
        planning.plan_search(config, Study(Path("studies/none")), [])
    budget, text = caught.value.problems
    assert "smallest feasible budget.keep_ratio" in budget
    assert "data.test" in text


def test_where_values_are_wrong_the_model_is_not_looked_at(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CausalLM, "skeleton", lambda *_: pytest.fail("model looked at"))
    config = small_config("model.device=cuda:99")
    with pytest.raises(ConfigError) as caught:
        planning.plan_search(config, Study(Path("studies/none")), ["found before"])
    first, device = caught.value.problems
    assert first == "found before"
    assert "model.device='cuda:99' cannot be used here" in device


def test_a_model_that_cannot_be_read_is_named_once(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object) -> None:
        raise ModelError("cannot load model 'gone'")

    # Skeleton and tokenizer come from the same place and fail with the same words.
    monkeypatch.setattr(CausalLM, "skeleton", missing)
    monkeypatch.setattr(planning, "load_tokenizer", missing)
    with pytest.raises(ConfigError) as caught:
        planning.plan_search(small_config(), Study(Path("studies/none")), [])
    assert caught.value.problems == ["cannot load model 'gone'"]


def test_a_study_says_what_it_was_begun_with(cache: Path) -> None:
    make_worker("one", "method=svd")
    about = Study(Path("studies/one")).about.fields
    assert about["model_fingerprint"] == fingerprint(loading.tiny_model())
    assert about["model_parameters"] == sum(p.numel() for p in loading.tiny_model().parameters())
    assert (about["dtype"], about["device"]) == ("float32", "cpu")
    assert (about["forms"], about["added_biases"]) == (["pivoted"], [])
    assert about["budget"]["measure"] == "parameters"
    assert {role: data["windows"] for role, data in about["data"].items()} == {
        "calibration": 512 // 64,
        "validation": 512 // 64,
        "test": 512 // 64,
    }
    assert about["versions"]["torch"] == torch.__version__
    make_worker("two", "method=bolaco", "space.forms=[factored,pivoted]", "budget.measure=bytes")
    other = Study(Path("studies/two")).about.fields
    units = map_model(loading.tiny_model()).compressible
    assert other["forms"] == ["factored", "pivoted"]
    assert other["added_biases"] == [unit.name for unit in units]
    dense = sum(unit.parameters for unit in units)
    assert other["budget"] == {"measure": "bytes", "limit": 4 * dense * 8 // 10}
    assert about["budget"] == {"measure": "parameters", "limit": dense * 8 // 10}
    assert other["study_id"] != about["study_id"]


def test_bytes_are_counted_in_the_dtype_of_the_files(cache: Path) -> None:
    loading.tiny_model().bfloat16().save_pretrained("half")
    byte_tokenizer().save_pretrained("half")
    dense = sum(unit.parameters for unit in map_model(loading.tiny_model()).compressible)
    other = ["model=hf", "model.path=half", "model.device=cpu", "data=generated", "data.window=64"]
    for overrides, runs_in, stored in (
        (["model.dtype=bfloat16"], torch.bfloat16, torch.float32),
        ([*other, "model.dtype=float32"], torch.float32, torch.bfloat16),
    ):
        for keep, share in (("budget.keep_ratio=0.5", 0.5), ("budget.bits_per_parameter=8", None)):
            config = small_config("budget.measure=bytes", keep, *overrides)
            plan = planning.plan_search(config, Study(Path("studies/none")), [])
            assert (plan.dtype, plan.stored_dtype) == (runs_in, stored)
            size = stored.itemsize * share if share else 1
            assert plan.space.problem.budget == Budget("bytes", int(size * dense))


@pytest.mark.parametrize("measure", MEASURES)
def test_a_family_is_moved_up_to_its_largest_rank_that_is_cheaper_than_dense(
    measure: Measure,
) -> None:
    units = map_model(loading.tiny_model()).compressible
    forms, options = ["pivoted", "int4", "int8", "factored"], BaseOptions(group_sizes=(16, 32, 256))
    menus = menus_of(units, forms, METHODS["bolaco"], torch.bfloat16, options=options)
    expected: dict[str, dict[Option, int]] = {}
    for name, menu in menus.items():
        expected[name] = {}
        for option in map(menu.option, range(len(menu) - 1)):
            cost = cost_of(menu.unit, option, bias=True, itemsize=2)
            if cost.of(measure) < menu.dense.of(measure):
                most = max(expected[name].get(option.family, 0), option.level[-1])
                expected[name][option.family] = most
    actual = largest_ranks(menus, measure)
    assert actual == expected
    integers = {family for own in actual.values() for family in own if family.level}
    assert bool(integers) == (measure == "bytes")


def of_module(spec: LayerSpec, option: Option, bias: bool, dtype: torch.dtype) -> Cost:
    """Count the tensors of a module that is made."""
    if option == DENSE:
        module: torch.nn.Module = torch.nn.Linear(
            spec.in_features, spec.out_features, spec.has_bias
        )
    else:
        kind = PRODUCTS[option.form]
        module = kind.empty(spec.name, spec.out_features, spec.in_features, option.level, bias=bias)
    module = module.to(dtype)
    tensors = list(module.state_dict().values())
    return Cost(
        sum(t.numel() for t in tensors if t.is_floating_point()),
        sum(t.numel() * t.element_size() for t in tensors),
        sum(t.numel() for t in tensors if t.is_floating_point() and t.dim() == 2),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("measure", MEASURES)
def test_a_study_counts_an_option_as_the_module_that_runs_it(
    measure: Measure, dtype: torch.dtype
) -> None:
    """Qwen2 has a bias in its first layers and none in the others."""
    config = small_config(
        "space.forms=[pivoted,factored]", f"budget.measure={measure}", "space=weights"
    )
    for case in ("qwen2", "llama_tied", "llama_biased"):
        layers = map_model(build_on_meta(case))
        for method in (*METHODS.values(), LossAware(centred=True)):
            space = build_search_space(config, layers.compressible, method, dtype)
            source = model_source(config.model)
            # The dtype that it runs in is not counted.
            dtypes = torch.float32, dtype
            plan = planning.Plan(config, source, layers, method, CausalLM(), *dtypes, space, {})
            about = build_worker._about(plan, "a digest", torch.device("cpu"))
            assert about["budget"] == asdict(space.problem.budget)
            assert (about["dtype"], about["stored_dtype"]) == tuple(map(dtype_name, dtypes))
            texts = {role: {"text": "any", "windows": 1, "digest": "any"} for role in ROLES}
            whole = {"format": FORMAT, "study": "s", **about, "config": [""], "data": texts}
            fixed = about_of(json.loads(json.dumps(whole)), "study.json")
            for spec in layers.compressible:
                menu = space.problem.menus[spec.name]
                offered = {str(menu.option(i)): menu.cost(i) for i in range(len(menu))}
                ranks = (1, 3, min(spec.out_features, spec.in_features))
                options = [Option(form, (rank,)) for form in PRODUCTS for rank in ranks]
                bias = spec.has_bias or spec.name in about["added_biases"]
                for option in (DENSE, *options):
                    expected = of_module(spec, option, bias, dtype)
                    assert offered[str(option)] == expected, (case, method.name, spec.name)
                    entry = (str(option), astuple(expected))
                    problem = StudyState(about=fixed)._problem_of_unit(spec.name, entry)
                    dear = option != DENSE and expected.of(measure) >= menu.dense.of(measure)
                    assert ("expected less than dense does" in (problem or "")) == dear


# --- tracking ----------------------------------------------------------------------------------


def begun() -> Study:
    study = Study(Path("studies/mine"))
    config, layers = small_config("study=mine"), make_layers()
    study.begin(make_about(layers, **follows(config, layers, "float32")), to_yaml(config))
    return study


def test_tracking_can_be_switched_off(cache: Path) -> None:
    config = small_config("study=mine")
    assert isinstance(mlflow_view.make_tracker(config, begun()), NullTracker)
    search.run(small_config("study=other"), SMALL, RecordingReporter())
    assert not Path("studies/mlflow.db").exists()
    config.tracking.enabled = True
    assert isinstance(mlflow_view.make_tracker(config, begun()), MlflowTracker)


def test_a_relative_store_stays_where_it_is_when_the_folder_changes(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = mlflow_store.absolute_uri("sqlite:///below/this/mlflow.db")
    assert uri == f"sqlite:///{cache.parent}/below/this/mlflow.db"
    assert not (cache.parent / "below").exists()  # only who writes there makes it
    monkeypatch.chdir("/")
    assert mlflow_store.absolute_uri(uri) == uri


@pytest.mark.parametrize("uri", ["http://127.0.0.1:5000", "sqlite:///", "postgresql://u@h/db"])
def test_other_addresses_are_left_as_they_are(cache: Path, uri: str) -> None:
    assert mlflow_store.absolute_uri(uri) == uri
