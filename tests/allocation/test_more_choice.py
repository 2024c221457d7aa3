"""More choice never hurts: what is predicted is what is stored, and a richer menu loses no more."""

from collections.abc import Mapping
from functools import cache

import pytest
import torch

import lrbo
from lrbo.allocation.allocate import dense_cost
from lrbo.calibration.collect import Calibration
from lrbo.calibration.statistics import Statistic
from lrbo.factorization.options import BaseOptions
from lrbo.factorization.prediction import PREDICTION_SHRINKAGE, shrunk
from lrbo.factorization.registry import method_named
from lrbo.layers.form import DENSE_FORM
from lrbo.layers.forms import FORMS, is_delta
from lrbo.layers.low_rank import FormModule
from lrbo.layers.options import Budget, Measure, Menu, Option
from lrbo.models.loading import tiny_model
from lrbo.models.model_map import linear_weight
from lrbo.optimization.space import Problem
from lrbo.pipeline.search_space import menus_of
from tests.support.tiny import token_ids

NAMES = [
    name
    for name, form in FORMS.items()
    if name != DENSE_FORM and form.in_blocks and not is_delta(name)
]
BASES = BaseOptions(group_sizes=(16,), percentages=(25, 50), blocks=((2, 1), (4, 4)))
STRUCTURED = ["kronecker", "sparse", "sparse_2_4", "sparse_rows"]
JOINT = ["shared_factored", "neurons", "skip"]
# Of predicted losses: the solver's proof is up to 1e-6 of the loss.
SAME = 1e-6


@cache
def factored() -> tuple[lrbo.Factorization, Calibration]:
    model = tiny_model()
    calibration = lrbo.calibrate(model, token_ids(8, 32), progress=False)
    return lrbo.factorize(model, calibration, forms=NAMES, bases=BASES, progress=False), calibration


def menus(forms: list[str], measure: Measure) -> Mapping[str, Menu]:
    factorization, _ = factored()
    units = factorization.layers.compressible
    method = method_named("loss_aware")
    return menus_of(units, forms, method, torch.float32, options=BASES, measure=measure)


@pytest.mark.parametrize("measure", ["parameters", "bytes", "macs"])
def test_a_richer_menu_never_predicts_a_larger_loss(measure: Measure) -> None:
    prepared = factored()[0].factors
    for keep_ratio in (0.5, 0.8):
        before = float("inf")
        richer = [*STRUCTURED, *JOINT]
        for count in range(len(richer) + 1):
            offered = menus(["pivoted", *richer[:count]], measure)
            budget = Budget.keeping(keep_ratio, dense_cost(offered), measure)
            problem = Problem(offered, budget).with_losses(prepared)
            allocation = problem.by_loss()
            total = 0.0
            for name, option in allocation.options.items():
                losses = problem.menus[name].losses
                assert losses is not None
                total += float(losses[problem.menus[name].index(option)])
            assert total <= before * (1 + SAME)
            before = total


@pytest.mark.parametrize("form", STRUCTURED)
def test_a_stored_layer_loses_what_is_predicted(form: str) -> None:
    factorization, calibration = factored()
    model = tiny_model()
    for spec in factorization.layers.compressible[:7]:
        statistics = calibration.of(spec)
        mean = statistics[Statistic.INPUT_MEAN].double()
        inputs = statistics[Statistic.INPUT_COVARIANCE].double() + mean.outer(mean)
        gradient = shrunk(statistics[Statistic.OUTPUT_GRADIENT].double(), PREDICTION_SHRINKAGE)
        weight = linear_weight(model.get_submodule(spec.name)).double()
        own = factorization.factors[spec.name]
        for section in menus([form], "parameters")[spec.name].sections[:-1]:
            losses = own.losses(section)
            assert losses is not None
            for at in {0, len(losses) // 2, len(losses) - 1}:
                option = Option(form, tuple(map(int, section.levels[at])))
                module = own.stored(spec.name, option, torch.float32)
                assert isinstance(module, FormModule)
                rest = weight - module.dense_weight()
                actual = float((gradient @ rest @ inputs * rest).sum()) / 2
                # Factors of 8 bits are predicted but for how their rounding adds up.
                assert float(losses[at]) == pytest.approx(actual, rel=0.02, abs=1e-4 * losses[0])
