"""Factors in integers: what is stored, and that their curves are those of the stored module."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lrbo.calibration.statistics import Statistic
from lrbo.errors import StatisticsError
from lrbo.factorization.base import factor_layer
from lrbo.factorization.base_plan import BasePlan
from lrbo.factorization.factors import LowRankFactors
from lrbo.factorization.options import BaseOptions
from lrbo.factorization.prediction import squared_errors
from lrbo.factorization.prepare_unit import prepared_unit
from lrbo.factorization.prepared import UnitFactors, prepared_of
from lrbo.factorization.quantized_factors import FIRST, _solved, round_factors
from lrbo.factorization.registry import method_named
from lrbo.layers.based import Factors
from lrbo.layers.options import Option
from tests.support import reference

TOKENS, OUTPUTS, INPUTS = 96, 24, 16
FORMS = ("factored_int4", "factored_int8", "int4")
TOLERANCE = {
    "curve": 1e-4,  # relative: modules and stored factors are in float32
    "zero": 1e-12,
}


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(*, bias: bool) -> nn.Linear:
    module = nn.Linear(INPUTS, OUTPUTS, bias)
    with torch.no_grad():
        module.weight.copy_(drawn(OUTPUTS, INPUTS, seed=1))
        if bias:
            module.bias.copy_(drawn(OUTPUTS, seed=2))
    return module.requires_grad_(False)


def inputs_and_slopes() -> tuple[Tensor, Tensor]:
    """Draw correlated inputs with a mean, and correlated gradients of outputs."""
    rows = drawn(TOKENS, INPUTS, seed=3) @ drawn(INPUTS, INPUTS, seed=4) + drawn(INPUTS, seed=5)
    return rows, drawn(TOKENS, OUTPUTS, seed=6) @ drawn(OUTPUTS, OUTPUTS, seed=7)


def statistics_of(rows: Tensor, slopes: Tensor) -> dict[Statistic, Tensor]:
    covariance = torch.cov(rows.T, correction=0)
    return {
        Statistic.INPUT_MEAN: rows.mean(0),
        Statistic.INPUT_COVARIANCE: covariance,
        # Of groups with means of their own: another matrix.
        Statistic.POOLED_INPUT_COVARIANCE: covariance + torch.eye(INPUTS),
        Statistic.OUTPUT_GRADIENT: slopes.T @ slopes / TOKENS,
    }


def prepared(method: str, *, bias: bool) -> UnitFactors:
    plan = BasePlan(FORMS, BaseOptions(group_sizes=(16,)))
    given = statistics_of(*inputs_and_slopes())
    unit = prepared_unit(
        layer(bias=bias), method_named(method), given, None, bases=plan, errors=True
    )
    assert isinstance(unit, UnitFactors)
    return unit


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("method", ["svd", "bolaco", "loss_aware"])
def test_the_error_is_what_the_stored_layer_does_to_its_own_inputs(method: str, bias: bool) -> None:
    """Over the norm of its outputs, biases included, of every family at every rank."""
    rows, _ = inputs_and_slopes()
    unit, dense = prepared(method, bias=bias), layer(bias=bias).double()
    families = [Option("factored"), *unit.based]
    assert [family.form for family in families[1:]] == [*FORMS[:2], "int4"]
    for family in families:
        own, least = unit.part(family), np.inf
        assert own.error is not None
        assert len(own.error) == own.max_rank + 1
        for rank in range(1 if family not in unit.based else 0, own.max_rank + 1):
            stored = unit.stored("unit", family.at(rank), torch.float32)
            weight, added = (torch.from_numpy(each) for each in reference.affine_of(stored, INPUTS))
            change = rows @ weight.T + added - dense(rows)
            error = float(change.norm() / dense(rows).norm())
            least = min(least, error)
            expected = pytest.approx(least, rel=TOLERANCE["curve"], abs=1e-6)
            assert float(own.error[rank]) == expected, (family, rank)


def test_errors_of_kronecker_sums_never_rise_though_terms_are_fitted_to_the_loss() -> None:
    plan = BasePlan(("kronecker",), BaseOptions(blocks=((4, 4),)))
    rows, slopes = inputs_and_slopes()
    slopes = slopes * torch.logspace(-2, 2, OUTPUTS).to(slopes)  # some outputs weigh far more
    unit = prepared_unit(
        layer(bias=False), method_named("loss_aware"), statistics_of(rows, slopes), None,
        bases=plan, errors=True,
    )  # fmt: skip
    assert isinstance(unit, UnitFactors)
    (terms,) = unit.based.values()
    error = terms.rest.error
    assert error is not None
    assert float(error[0]) == pytest.approx(1.0)
    assert bool((error.diff() <= 0).all())


@pytest.mark.parametrize("method", ["svd", "bolaco", "loss_aware"])
def test_the_loss_of_rounded_factors_is_that_of_the_stored_layer(method: str) -> None:
    unit, given = prepared(method, bias=False), statistics_of(*inputs_and_slopes())
    gradient = torch.from_numpy(reference.shrunk(given[Statistic.OUTPUT_GRADIENT].numpy(), 0.01))
    for form in FORMS[:2]:
        own, least = unit.part(Option(form)), np.inf
        mean = given[Statistic.INPUT_MEAN]
        moment = given[Statistic.INPUT_COVARIANCE]
        moment = moment + (mean.outer(mean) if own.center is None else 0)
        assert own.loss is not None
        for rank in range(own.max_rank + 1):
            stored = unit.stored("unit", Option(form, (rank,)), torch.float32)
            change = layer(bias=False).weight.double() - stored.dense_weight()
            least = min(least, float((gradient @ change @ moment * change).sum() / 2))
            assert float(own.loss[rank]) == pytest.approx(least, rel=TOLERANCE["curve"]), rank


def test_a_trial_has_the_integers_of_the_checkpoint_in_4_bits() -> None:
    unit = prepared("loss_aware", bias=True)
    codes = unit.based[Option("factored_int4")].codes
    assert codes is not None
    most = OUTPUTS * INPUTS // (OUTPUTS + INPUTS)
    sides = [reference.unpacked(each.numpy(), 4).astype(int) - 8 for each in (codes[0], codes[2])]
    assert [side.shape for side in sides] == [(most, OUTPUTS), (most, INPUTS)]
    for rank in (1, 3, most):
        option = Option("factored_int4", (rank,))
        modules = [
            unit.trial_module("unit", option, 10**6, {}),
            unit.stored("unit", option, torch.float32),
        ]
        expected = (sides[0][:rank].T * codes.scale[:rank].double().numpy()) @ sides[1][:rank]
        for module in modules:
            held = module.state_dict()
            assert held["left"].shape == (rank, OUTPUTS // 2)
            assert held["right"].shape == (rank, INPUTS // 2)
            assert np.abs(module.dense_weight().numpy() - expected).max() < TOLERANCE["zero"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_integers_are_read_back_moved_and_cut(dtype: torch.dtype) -> None:
    unit = prepared("bolaco", bias=False)
    tensors = {name: tensor.clone() for name, tensor in unit.tensors().items()}
    again = prepared_of(tensors)
    family = Option("factored_int4")
    part = again.only({family: 3}, dtype, torch.device("cpu"))
    assert isinstance(part, UnitFactors)
    assert part.low_rank is None  # integers need no factors beside them
    assert part.based[family].rest.max_rank == 3
    modules = [
        unit.stored("unit", family.at(3), dtype),
        part.trial_module("unit", family.at(3), 0, {}),
        part.stored("unit", family.at(3), dtype),
    ]
    held = [module.state_dict() for module in modules]
    assert {"left", "right", "factor_scale", "bias"} == held[0].keys() - {"weight"}
    for other in held[1:]:
        assert all(torch.equal(other[name], held[0][name]) for name in held[0])
    left = part.based[family].codes
    assert left is not None
    assert left.left.untyped_storage().nbytes() == 3 * OUTPUTS // 2
    curves = [unit.part(family).error, part.part(family).error]
    assert all(curve is not None for curve in curves)
    assert curves[1].tolist() == curves[0].tolist()[:4]


@pytest.mark.parametrize("part", ["codes_left", "codes_scale", "codes_right"])
def test_integers_that_are_damaged_are_refused(part: str) -> None:
    tensors = dict(prepared("svd", bias=False).tensors())
    name = f"factored_int4.{part}"
    tensors[name] = tensors[name][:2]
    with pytest.raises(ValueError, match=rf"{name} is missing or not of shape"):
        prepared_of(tensors)
    del tensors[name]
    with pytest.raises(ValueError, match=rf"{name} is missing"):
        prepared_of(tensors)


def moment(size: int, seed: int) -> Tensor:
    """Draw a moment whose energy falls by a factor of hundreds."""
    axes = torch.linalg.qr(drawn(size, size, seed=seed)).Q
    return (axes * torch.arange(1, size + 1, dtype=torch.float64) ** -1.5) @ axes.T


class Large:
    """A weight of which there are several runs, with both moments."""

    def __init__(self) -> None:
        self.weight, self.inputs, self.outputs = (
            drawn(96, 160, seed=1),
            moment(160, 2),
            moment(96, 3),
        )
        given = {
            Statistic.INPUT_MEAN: torch.zeros(160, dtype=torch.float64),
            Statistic.INPUT_COVARIANCE: self.inputs,
            Statistic.OUTPUT_GRADIENT: self.outputs,
        }
        method = method_named("loss_aware")
        self.full = factor_layer(method, self.weight, None, given).leading(60)
        self.remainder = method.remainders(None, given)

    def curve(self, left: Tensor, right: Tensor) -> Tensor:
        return squared_errors(self.weight, left, right, self.inputs, self.outputs)

    def rounded(self, *, with_inputs: bool = True, with_outputs: bool = True) -> Factors:
        return round_factors(
            self.full,
            self.remainder,
            self.weight,
            self.inputs if with_inputs else None,
            self.outputs if with_outputs else None,
            dtype=torch.float64,
            damping=0.01,
        )


def test_rounding_in_both_metrics_loses_less_than_rounding_to_the_nearest() -> None:
    """At every rank, and least with the gradients of the outputs."""
    large = Large()
    exact = large.curve(large.full.left, large.full.right)
    codes = [
        large.rounded(),
        large.rounded(with_outputs=False),
        large.rounded(with_inputs=False, with_outputs=False),
    ]
    both, inputs, neither = ((large.curve(*each.wide(torch.float64)) - exact)[4:] for each in codes)
    assert bool((both < 0.75 * inputs).all())
    assert bool((inputs < neither)[FIRST:].all())


def test_a_run_mends_what_those_before_it_lost_in_rounding() -> None:
    """Far better than all directions of the exact factors, each rounded by itself."""
    large = Large()
    exact = large.curve(large.full.left, large.full.right)
    left, right = large.rounded().wide(torch.float64)
    sides = [
        (each / each.abs().amax(dim, keepdim=True) * 7).round()
        * each.abs().amax(dim, keepdim=True)
        / 7
        for each, dim in ((large.full.left, 0), (large.full.right, 1))
    ]
    alone = large.curve(sides[0], sides[1]) - exact
    mended = large.curve(left, right) - exact
    assert bool((mended[FIRST + 8 :] < 0.3 * alone[FIRST + 8 :]).all())
    # The first run has nothing to mend, and stays what it is.
    again = large.full.leading(FIRST)
    first = round_factors(
        again, large.remainder, large.weight, large.inputs, large.outputs,
        dtype=torch.float64, damping=0.01,
    ).wide(torch.float64)  # fmt: skip
    assert torch.equal(first[0], left[:, :FIRST])
    assert torch.equal(first[1], right[:FIRST])


@pytest.mark.parametrize("alike", [False, True])
def test_a_side_is_solved_for_the_other_also_where_directions_are_alike(alike: bool) -> None:
    """The residual of least squares, by a library that decomposes nothing."""
    right, target, inputs = drawn(6, 40, seed=1), drawn(9, 40, seed=2), moment(40, 3)
    if alike:
        right[4] = right[1] - 2 * right[3]
        right[5] = 0
    left = _solved(right.float(), inputs.float(), target.float()).double().T
    root = np.linalg.cholesky(inputs.numpy())
    best = np.linalg.lstsq(root.T @ right.numpy().T, root.T @ target.numpy().T, rcond=1e-6)[0].T
    errors = [
        float(np.square((target.numpy() - side @ right.numpy()) @ root).sum())
        for side in (left.numpy(), best)
    ]
    assert errors[0] == pytest.approx(errors[1], rel=1e-6)
    assert float(left.abs().max()) < 10 * float(np.abs(best).max())  # no copies that cancel


def test_directions_of_nothing_are_rounded_to_nothing() -> None:
    nothing, eye = torch.zeros(40, 40, dtype=torch.float64), torch.eye(40, dtype=torch.float64)
    full = LowRankFactors(nothing, nothing, torch.zeros(41)).leading(20)

    def remainder(rest: Tensor, rank: int) -> LowRankFactors:
        assert not bool(rest.any())
        return full.leading(rank)

    codes = round_factors(full, remainder, nothing, eye, eye, dtype=torch.float32, damping=0.01)
    assert isinstance(codes, Factors)
    assert not any(bool(side.any()) for side in codes.wide(torch.float64))


def test_a_metric_that_is_none_is_refused_with_the_damping_that_works() -> None:
    given = statistics_of(*inputs_and_slopes())
    given[Statistic.INPUT_COVARIANCE] = given[Statistic.INPUT_COVARIANCE] - 3 * torch.eye(INPUTS)
    plan = BasePlan(("factored_int4",), BaseOptions())
    full = factor_layer(method_named("svd"), layer(bias=False).weight.double(), None, given)
    full = replace(full, loss=None).leading(4)
    weight = layer(bias=False).weight.double()
    form = plan.make(weight, given, torch.float32)[0].form
    remainder = method_named("svd").remainders(None, given)
    with pytest.raises(StatisticsError, match="input second moment is not positive definite"):
        plan.factors(form, full, remainder, weight, given, torch.float32)


def test_errors_without_their_statistics_are_refused_by_name() -> None:
    given = {Statistic.INPUT_MEAN: torch.zeros(INPUTS)}
    with pytest.raises(StatisticsError, match="need the statistics covariance"):
        prepared_unit(layer(bias=False), method_named("svd"), given, None, bases=None, errors=True)
