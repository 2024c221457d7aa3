"""Sweeps over integers: no row is worse, and in the end no single integer could be better."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lrbo.calibration.statistics import Statistic
from lrbo.errors import StatisticsError
from lrbo.factorization.base_plan import BasePlan
from lrbo.factorization.bases import Base
from lrbo.factorization.options import BaseOptions
from lrbo.factorization.rounding import InputMetric, round_gptq
from lrbo.factorization.sweeps import swept
from lrbo.layers.forms import Quantized
from lrbo.layers.packing import unpack
from tests.factorization.test_bases import correlated, drawn

DAMPING = 0.01
GRIDS = [
    (Quantized(8), 32),
    (Quantized(4, symmetric=True), 64),
    (Quantized(3), 16),
    (Quantized(2), 32),
    (Quantized(2, symmetric=True), 128),
]
each_grid = pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g[0].name}-{g[1]}")


def rounded(
    weight: Tensor,
    moment: Tensor,
    grids: Sequence[tuple[Quantized, int]],
    sweeps: int,
    dtype: torch.dtype = torch.bfloat16,
) -> list[Base]:
    bases = round_gptq(weight, moment, grids, dtype=dtype, damping=DAMPING)
    return swept(weight, bases, InputMetric(moment, DAMPING), sweeps)


def damped(moment: Tensor) -> Tensor:
    return moment + DAMPING * moment.diagonal().mean() * torch.eye(len(moment)).to(moment)


def errors_of(weight: Tensor, base: Base, moment: Tensor) -> Tensor:
    """Work out ``diag(E H E^T)``, for the weight that a layer runs."""
    rest = weight - base.weight(torch.float64)
    return torch.einsum("oi,ij,oj->o", rest, damped(moment), rest)


def test_no_row_is_worse_after_a_sweep_and_all_gain() -> None:
    weight, moment = drawn(24, 256), correlated(256)
    results = [rounded(weight, moment, GRIDS, sweeps) for sweeps in (0, 1, 2, 5)]
    for of_grid in zip(*results, strict=True):
        errors = [errors_of(weight, base, moment) for base in of_grid]
        for before, after in pairwise(errors):
            assert (after <= before * (1 + 1e-12)).all()
        share = float(errors[2].sum() / errors[0].sum())
        assert share < (0.99 if of_grid[0].form.base_name == "int8" else 0.96)


def parts(base: Base) -> tuple[Tensor, Tensor, Tensor]:
    """Return integers, scale and zero point of every entry, float64."""
    form, scale = base.form, base.tensors["scale"].double()
    assert isinstance(form, Quantized)
    zero = torch.full_like(scale, 2.0 ** (form.bits - 1))
    zero = zero if form.symmetric else base.tensors["zero"].double()
    codes = unpack(base.tensors["packed"], form.bits).double()
    return codes, *(each.repeat_interleave(base.level[0], 1) for each in (scale, zero))


def best_gain(weight: Tensor, base: Base, moment: Tensor) -> float:
    """Try every integer for every entry; return the most that one lowers the error of its row."""
    metric, (codes, scale, zero) = damped(moment), parts(base)
    slope = (weight - (codes - zero) * scale) @ metric
    form, gains = base.form, []
    assert isinstance(form, Quantized)
    for other in range(2**form.bits):
        step = (other - codes) * scale
        # Of E_j - d, all else alike: d^2 H_jj - 2 d (E H)_j more.
        gains.append(float((2 * step * slope - step.square() * metric.diagonal()).max()))
    return max(gains) / float(errors_of(weight, base, moment).mean())


@each_grid
def test_in_the_end_no_integer_and_no_scale_could_be_better(grid: tuple[Quantized, int]) -> None:
    weight, moment = drawn(3, 128, seed=5), correlated(128, seed=6)
    first, last, again = (rounded(weight, moment, [grid], n, torch.float64)[0] for n in (0, 60, 61))
    assert torch.equal(last.tensors["packed"], again.tensors["packed"])
    assert best_gain(weight, first, moment) > 1e-3
    assert best_gain(weight, last, moment) < 1e-5  # ties, in float32
    (codes, scale, zero), before = parts(last), errors_of(weight, last, moment)
    for share in (1e-3, -1e-3):
        for group in range(128 // grid[1]):
            moved = scale.clone()
            moved[:, group * grid[1] : (group + 1) * grid[1]] *= 1 + share
            rest = weight - (codes - zero) * moved
            after = torch.einsum("oi,ij,oj->o", rest, damped(moment), rest)
            assert (after >= before * (1 - 1e-9)).all()


@each_grid
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_it_is_stored_as_before(grid: tuple[Quantized, int], dtype: torch.dtype) -> None:
    weight, moment = drawn(8, 128, seed=7), correlated(128, seed=8)
    (before,), (after,) = (rounded(weight, moment, [grid], sweeps, dtype) for sweeps in (0, 2))
    assert after.family == before.family
    assert after.dtype == before.dtype == dtype
    assert after.tensors.keys() == before.tensors.keys()
    for name, tensor in after.tensors.items():
        assert (tensor.shape, tensor.dtype) == (
            before.tensors[name].shape,
            before.tensors[name].dtype,
        )
    assert (after.tensors["scale"] > 0).all()
    assert not torch.equal(after.tensors["packed"], before.tensors["packed"])
    if not grid[0].symmetric:
        assert torch.equal(after.tensors["zero"], before.tensors["zero"])


@each_grid
def test_zeros_stay_zeros(grid: tuple[Quantized, int]) -> None:
    weight, moment = drawn(4, 128, seed=9), correlated(128, seed=10)
    weight[1] = 0
    weight[2, : grid[1]] = 0  # a group of its own, in a row that has others
    (base,) = rounded(weight, moment, [grid], 3)
    assert not base.weight(torch.float64)[1].any()
    assert (base.tensors["scale"] > 0).all()
    assert (
        errors_of(weight, base, moment)
        <= errors_of(weight, rounded(weight, moment, [grid], 0)[0], moment)
    ).all()


def test_several_grids_at_once_are_those_one_by_one() -> None:
    weight, moment = drawn(7, 128), correlated(128)
    for grid, base in zip(GRIDS, rounded(weight, moment, GRIDS, 2), strict=True):
        (alone,) = rounded(weight, moment, [grid], 2)
        for name, tensor in base.tensors.items():
            assert torch.equal(tensor, alone.tensors[name])


def test_a_plan_sweeps_its_integers_and_nothing_else() -> None:
    weight, mean = drawn(6, 64), drawn(64, seed=2)
    given = {Statistic.INPUT_MEAN: mean, Statistic.INPUT_COVARIANCE: correlated(64)}
    forms = ("int3", "lut3", "int2_sym", "sparse_2_4")
    plain, more = (
        BasePlan(forms, BaseOptions(group_sizes=(16,), sweeps=sweeps)) for sweeps in (0, 2)
    )
    moment = correlated(64) + mean.outer(mean)
    pairs = zip(
        plain.make(weight, given, torch.float32),
        more.make(weight, given, torch.float32),
        strict=True,
    )
    for before, after in pairs:
        assert before.family == after.family
        if isinstance(before.form, Quantized):
            own = errors_of(weight, after, moment).sum()
            assert own < errors_of(weight, before, moment).sum()
        else:
            assert all(torch.equal(t, after.tensors[n]) for n, t in before.tensors.items())


def test_what_is_no_metric_is_refused_as_by_gptq() -> None:
    weight, moment = drawn(2, 32), torch.eye(32, dtype=torch.float64)
    bases = round_gptq(weight, moment, [(Quantized(4), 16)], dtype=torch.float32)
    moment[0, 1] = moment[1, 0] = 1.005
    with pytest.raises(StatisticsError, match=r"raise bases\.damping to 0\.01"):
        swept(weight, bases, InputMetric(moment, 0.001), 1)


def test_there_are_none_over_nearest() -> None:
    with pytest.raises(ValueError, match=r"sweeps=1: expected 0 with bases\.method=nearest"):
        BaseOptions(method="nearest", sweeps=1)
    with pytest.raises(ValueError, match="sweeps=-1: expected at least 0"):
        BaseOptions(sweeps=-1)
