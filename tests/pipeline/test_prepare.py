"""Statistics and factors are made once, anew where anything that matters differs, and shared."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from lrbo.calibration.collect import Calibration, CalibrationSettings
from lrbo.calibration.statistics import Statistic
from lrbo.factorization.factors import PARTS, LowRankFactors
from lrbo.factorization.methods import Asvd, Bolaco, LossAware, Svd
from lrbo.factorization.registry import METHODS
from lrbo.models.loading import load_model
from lrbo.models.model_map import map_model
from lrbo.models.parameters import fingerprint
from lrbo.models.sources import ModelSource
from lrbo.pipeline import prepare
from lrbo.pipeline.prepare import Preparation, curve_needs
from lrbo.progress import Reporter
from lrbo.tasks.causal_lm import CausalLM
from tests.support.tiny import token_ids

CPU, FLOAT32 = torch.device("cpu"), torch.float32
SOURCE = ModelSource("tiny", "0")
SETTINGS = CalibrationSettings(gradient_share=1.0, groups=3)


class StepReporter(Reporter):
    """Notes which steps were done."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[str] = []

    def say(self, message: str) -> None:
        self.steps.append(message.partition(":")[0])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of its own."""
    monkeypatch.setenv("LRBO_CACHE", str(tmp_path))
    return tmp_path


def prepared(**changes: object) -> Preparation:
    model = load_model(SOURCE, dtype=FLOAT32, device=CPU)
    method = changes.get("method", LossAware())
    layers, windows = map_model(model), token_ids(7, 12)
    needs = curve_needs(method)
    base = Preparation(SOURCE, layers, method, needs, windows, SETTINGS, CausalLM())
    return replace(base, **changes)


def made(
    given: Preparation, dtype: torch.dtype = FLOAT32, model: PreTrainedModel | None = None
) -> tuple[dict[str, LowRankFactors], list[str]]:
    """Return the factors, and what had to be done for them."""
    model = model or load_model(SOURCE, dtype=dtype, device=CPU)
    reporter = StepReporter()
    return given.factors(fingerprint(model), dtype, CPU, reporter, model), reporter.steps


def count(cache: Path) -> dict[str, int]:
    return {folder.name: len(list(folder.iterdir())) for folder in cache.iterdir()}


def same_bits(one: dict[str, LowRankFactors], other: dict[str, LowRankFactors]) -> bool:
    assert one.keys() == other.keys()
    assert len(one) == 14
    for name, factors in one.items():
        for part in PARTS:
            a, b = getattr(factors, part), getattr(other[name], part)
            if (a is None) != (b is None) or (a is not None and not torch.equal(a, b)):
                return False
    return True


BOTH = ["Calibration", "Factorization"]


def test_what_was_made_once_is_read_from_then_on(cache: Path) -> None:
    first, steps = made(prepared())
    assert steps == BOTH
    assert all(factors.loss is not None for factors in first.values())
    second, steps = made(prepared())
    assert steps == []
    assert same_bits(first, second)
    assert count(cache) == {"calibration": 1, "factors": 1}


def test_the_model_is_loaded_only_where_something_must_be_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = load_model(SOURCE, dtype=FLOAT32, device=CPU)
    given, digest = prepared(), fingerprint(model)
    first = given.factors(digest, FLOAT32, CPU, StepReporter())
    assert same_bits(first, made(given)[0])
    monkeypatch.setattr("lrbo.tasks.causal_lm.CausalLM.load", lambda *a, **k: pytest.fail("loaded"))
    assert same_bits(first, given.factors(digest, FLOAT32, CPU, StepReporter()))


@pytest.mark.parametrize(
    ("change", "steps"),
    [
        (lambda p: replace(p, method=LossAware(output_power=0.5)), ["Factorization"]),
        (lambda p: replace(p, method=LossAware(one_sided=("q_proj",))), ["Factorization"]),
        (lambda p: replace(p, method=Asvd(), needs=p.needs | Asvd().needs), BOTH),
        (lambda p: replace(p, method=Svd(), needs=frozenset()), ["Factorization"]),
        (lambda p: replace(p, windows=token_ids(7, 12, seed=1)), BOTH),
        (lambda p: replace(p, settings=replace(SETTINGS, seed=1)), BOTH),
        (lambda p: replace(p, settings=replace(SETTINGS, groups=2)), []),  # nothing is pooled
        (lambda p: replace(p, settings=replace(SETTINGS, batch_windows=2)), []),
        (lambda p: replace(p, settings=replace(SETTINGS, memory_gib=0.0)), []),
    ],
)
def test_only_what_matters_is_made_again(
    cache: Path, change: Callable[[Preparation], Preparation], steps: list[str]
) -> None:
    made(prepared())
    _, done = made(change(prepared()))
    assert done == steps
    assert count(cache) == {
        "calibration": 1 + ("Calibration" in steps),
        "factors": 1 + ("Factorization" in steps),
    }


def test_other_weights_get_factors_of_their_own() -> None:
    first, _ = made(prepared())
    model = load_model(SOURCE, dtype=FLOAT32, device=CPU)
    model.get_submodule("model.layers.0.mlp.up_proj").weight[0, 0] += 0.5
    other, steps = made(prepared(), model=model)
    assert steps == BOTH
    assert not same_bits(first, other)


def test_factors_that_were_deleted_come_from_the_statistics_that_are_left(cache: Path) -> None:
    first, _ = made(prepared())
    first = {  # no longer in the file
        name: factors.to(dtype=factors.left.dtype, device=factors.left.device)
        for name, factors in first.items()
    }
    (folder,) = (cache / "factors").iterdir()
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    second, steps = made(prepared())
    assert steps == ["Factorization"]
    assert same_bits(first, second)


def test_without_needs_nothing_is_calibrated(cache: Path) -> None:
    given = prepared(method=Svd(), needs=frozenset())
    model = load_model(SOURCE, dtype=FLOAT32, device=CPU)
    assert given.statistics("digest", FLOAT32, StepReporter(), model) == Calibration()
    by_layer, steps = made(given)
    assert steps == ["Factorization"]
    assert count(cache) == {"factors": 1}
    assert all(factors.loss is None for factors in by_layer.values())


def test_a_model_that_runs_in_half_precision_is_factored_at_that_of_its_checkpoint() -> None:
    given = prepared(method=Svd(), needs=frozenset())
    full, _ = made(given)
    half, steps = made(given, torch.bfloat16)
    assert steps == ["Factorization"]  # of its own: the digest is that of the rounded weights
    assert same_bits(full, half)


@pytest.mark.parametrize("step", ["save_calibration", "save_factors"])
def test_a_search_that_finishes_second_takes_what_the_first_made(
    cache: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    save = getattr(prepare, step)
    done: list[str] = []

    def twice(folder: Path, parts: object, name: str) -> None:
        """Save, as another search does meanwhile, then go on and find it there."""
        parts = list(parts)
        save(folder, iter(parts), name)
        done.append(name)
        save(folder, iter(parts), name)
        pytest.fail("saved twice")

    expected, _ = made(prepared())
    monkeypatch.setenv("LRBO_CACHE", str(cache / "other"))
    monkeypatch.setattr(prepare, step, twice)
    actual, steps = made(prepared())
    assert steps == BOTH
    assert len(done) == 1
    assert same_bits(actual, expected)


def test_an_interrupted_preparation_is_begun_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Calibration, spec: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare.CalibrationFolder, "of", interrupted)
        with pytest.raises(KeyboardInterrupt):
            made(prepared())
    assert count(cache) == {"calibration": 1, "factors": 0}
    _, steps = made(prepared())
    assert steps == ["Factorization"]


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_loss_curves_need_gradients_and_one_covariance(method: object) -> None:
    needs = curve_needs(method)
    assert needs >= method.needs | {Statistic.INPUT_MEAN, Statistic.OUTPUT_GRADIENT}
    covariances = {Statistic.INPUT_COVARIANCE, Statistic.POOLED_INPUT_COVARIANCE}
    assert len(needs & covariances) == 1
    extra = needs - method.needs - {Statistic.INPUT_MEAN, Statistic.INPUT_COVARIANCE}
    assert extra <= {Statistic.OUTPUT_GRADIENT}
    assert (Statistic.POOLED_INPUT_COVARIANCE in needs) == (method == Bolaco())


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_method_is_prepared_with_its_losses(method: object) -> None:
    by_layer, steps = made(prepared(method=method))
    assert steps == BOTH
    for factors in by_layer.values():
        assert factors.loss is not None
        assert bool((factors.loss.diff() <= 0).all())
        assert float(factors.loss[0]) > 0
