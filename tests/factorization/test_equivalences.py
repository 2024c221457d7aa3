"""Identities between methods, and the optimality that their docstrings claim."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lrbo.calibration.statistics import Statistic
from lrbo.factorization.base import FactorizationMethod
from lrbo.factorization.factors import LowRankFactors
from lrbo.factorization.methods import (
    Asvd,
    Bolaco,
    Drone,
    FirstOrder,
    Fwsvd,
    LossAware,
    Svd,
    SvdLlm,
)
from lrbo.factorization.prediction import PREDICTION_SHRINKAGE, predicted_loss, shrunk
from tests.support import reference
from tests.support.methods import CASES, SHAPES, Layer, make_layer
from tests.support.reference import Affine

TOLERANCE = {
    "map": 1e-9,  # 1e-16 times the condition of the covariance (below 1e4), over the gaps
    "error": 1e-10,  # relative to the error at rank 0
}

ONE_GROUP = (80,)

cases = pytest.mark.parametrize("shape", SHAPES)
biases = pytest.mark.parametrize("bias", [False, True])


def draw(shape: str, *, bias: bool = True, seed: int = 1) -> Layer:
    return make_layer(shape, bias=bias, seed=seed, tokens=ONE_GROUP)


def factor(
    method: FactorizationMethod, layer: Layer, statistics: dict[Statistic, Tensor] | None = None
) -> LowRankFactors:
    """Factor with the layer's statistics, some of them replaced."""
    return method.factor(layer.weight, layer.bias, {**layer.statistics, **(statistics or {})})


def maps(factors: LowRankFactors) -> list[Affine]:
    """Return the layer of every rank."""
    width = factors.right.shape[1]
    return [reference.affine_of(factors.at_rank(r), width) for r in range(factors.max_rank + 1)]


def assert_same(one: LowRankFactors, other: LowRankFactors, error: float = 1.0) -> None:
    """Compare the maps of all ranks, and the errors, of which the other's are so many times."""
    for rank, (actual, expected) in enumerate(zip(maps(one), maps(other), strict=True)):
        for a, b in zip(actual, expected, strict=True):
            assert np.abs(a - b).max() <= TOLERANCE["map"], rank
    difference = float((one.tail * error - other.tail).abs().max())
    assert difference <= TOLERANCE["error"] * float(other.tail[0])


def white(layer: Layer) -> dict[Statistic, Tensor]:
    """Return statistics in which all features and outputs are alike."""
    rows, columns = layer.weight.shape
    identity = torch.eye(columns, dtype=torch.float64)
    gradients = torch.zeros_like(layer.weight)
    gradients[:, 0] = 1 / layer.weight[:, 0].abs()  # one weight of each row matters, and as much
    return {
        Statistic.INPUT_MEAN: torch.zeros(columns, dtype=torch.float64),
        Statistic.INPUT_COVARIANCE: identity,
        Statistic.POOLED_INPUT_COVARIANCE: identity,
        Statistic.INPUT_MAGNITUDE: torch.ones(columns, dtype=torch.float64),
        Statistic.INPUT_IMPORTANCE: torch.full((columns,), 1.0, dtype=torch.float64),
        Statistic.OUTPUT_GRADIENT: torch.eye(rows, dtype=torch.float64),
        Statistic.WEIGHT_GRADIENT: gradients,
    }


# --- between methods -----------------------------------------------------------------------------


@cases
@pytest.mark.parametrize("name", [name for name in CASES if name != "svd"])
def test_where_nothing_weighs_more_every_method_is_plain_svd(shape: str, name: str) -> None:
    layer = draw(shape)
    nats = 0.5 if CASES[name].method.name == "loss_aware" else 1.0
    plain = factor(Svd(), layer)
    assert_same(factor(CASES[name].method, layer, white(layer)), plain, 1 / nats)


@cases
@biases
def test_drone_is_svd_llm_where_the_second_moment_has_full_rank(shape: str, bias: bool) -> None:
    layer = draw(shape, bias=bias)
    assert_same(factor(Drone(), layer), factor(SvdLlm(), layer))


@cases
def test_asvd_without_strength_is_plain_svd(shape: str) -> None:
    layer = draw(shape)
    assert_same(factor(Asvd(alpha=0.0), layer), factor(Svd(), layer))


@cases
@pytest.mark.parametrize("importance", [1e-8, 0.3, 1e5])
def test_fwsvd_with_equal_importances_is_plain_svd(shape: str, importance: float) -> None:
    layer = draw(shape)
    equal = torch.full((layer.weight.shape[1],), importance, dtype=torch.float64)
    actual = factor(Fwsvd(), layer, {Statistic.INPUT_IMPORTANCE: equal})
    assert_same(actual, factor(Svd(), layer), 1 / importance)


@cases
@pytest.mark.parametrize("kept", [0.02, 0.25, 1.0])
def test_first_order_of_gradients_a_hundred_times_as_large_is_the_same(
    shape: str, kept: float
) -> None:
    layer, method = draw(shape), FirstOrder(kept=kept)
    larger = {Statistic.WEIGHT_GRADIENT: 100 * layer.statistics[Statistic.WEIGHT_GRADIENT]}
    assert_same(factor(method, layer, larger), factor(method, layer), 1 / 100)


@cases
def test_first_order_looks_at_the_kept_weights_alone(shape: str) -> None:
    """Gradients of weights that pruning removes change nothing, as long as it removes them."""
    layer = draw(shape)
    gradients = layer.statistics[Statistic.WEIGHT_GRADIENT].clone()
    importance = layer.weight.abs() * gradients
    least = importance.flatten().sort().values[importance.numel() // 2]
    lower = torch.where(importance < least, gradients / 10, gradients)
    lower[~(importance >= least).any(1)] = gradients[~(importance >= least).any(1)]
    moved = factor(FirstOrder(kept=0.5), layer, {Statistic.WEIGHT_GRADIENT: lower})
    assert_same(moved, factor(FirstOrder(kept=0.5), layer))
    assert not torch.equal(lower, gradients)


@cases
def test_methods_with_diagonal_weights_are_drone_with_a_diagonal_second_moment(shape: str) -> None:
    layer = draw(shape)
    for method, statistic, power in (
        (Fwsvd(), Statistic.INPUT_IMPORTANCE, 1.0),
        (Asvd(alpha=0.5), Statistic.INPUT_MAGNITUDE, 1.0),
        (Asvd(alpha=1.0), Statistic.INPUT_MAGNITUDE, 2.0),
    ):
        moment = torch.diag(layer.statistics[statistic] ** power)
        mean = torch.zeros(len(moment), dtype=torch.float64)
        given = {Statistic.INPUT_MEAN: mean, Statistic.INPUT_COVARIANCE: moment}
        assert_same(factor(method, layer), factor(Drone(), layer, given))


@cases
@biases
@pytest.mark.parametrize("shrinkage", [1.0, 0.01])
def test_loss_aware_without_directions_of_gradients_is_drone_in_nats(
    shape: str, bias: bool, shrinkage: float
) -> None:
    layer = draw(shape, bias=bias)
    gradient = layer.statistics[Statistic.OUTPUT_GRADIENT]
    strength = float(gradient.diagonal().mean())
    if shrinkage < 1:  # then gradients must be alike in all directions by themselves
        gradient = strength * torch.eye(len(gradient), dtype=torch.float64)
    given = {Statistic.OUTPUT_GRADIENT: gradient}
    actual = factor(LossAware(output_shrinkage=shrinkage), layer, given)
    assert_same(actual, factor(Drone(), layer), 2 / strength)


@cases
def test_loss_aware_with_the_power_0_is_drone(shape: str) -> None:
    """Only the part of the gradients that outputs can reach gives the size of the error."""
    layer = draw(shape)
    gradient = shrunk(layer.statistics[Statistic.OUTPUT_GRADIENT], 0.01).numpy()
    reached = reference.flattened(gradient, layer.dense[0], 0.0)
    strength = float(np.trace(reached)) / min(layer.weight.shape)
    actual = factor(LossAware(output_power=0.0), layer)
    assert_same(actual, factor(Drone(), layer), 2 / strength)


@cases
@biases
def test_centred_loss_aware_without_directions_is_bolaco_with_one_group(
    shape: str, bias: bool
) -> None:
    layer = draw(shape, bias=bias)
    strength = float(layer.statistics[Statistic.OUTPUT_GRADIENT].diagonal().mean())
    actual = factor(LossAware(centred=True, output_shrinkage=1.0), layer)
    assert_same(actual, factor(Bolaco(), layer), 2 / strength)


@cases
@biases
def test_bolaco_with_one_group_is_svd_llm_with_centred_inputs(shape: str, bias: bool) -> None:
    layer = draw(shape, bias=bias)
    centred = {Statistic.INPUT_MEAN: torch.zeros(layer.weight.shape[1], dtype=torch.float64)}
    actual, whitened = factor(Bolaco(), layer), factor(SvdLlm(), layer, centred)
    mean = layer.number(Statistic.INPUT_MEAN)
    restored = replace(
        whitened,
        offset=torch.from_numpy(layer.dense[0] @ mean + layer.dense[1]),
        center=torch.from_numpy(mean),
    )
    assert_same(actual, restored)


@cases
def test_svd_keeps_the_bias_and_splits_evenly(shape: str) -> None:
    layer = draw(shape)
    factors = factor(Svd(), layer)
    assert all(np.abs(bias - layer.dense[1]).max() == 0.0 for _, bias in maps(factors))
    spread = factors.left.norm(dim=0) / factors.right.norm(dim=1)
    torch.testing.assert_close(spread, torch.ones_like(spread))


# --- predicted loss ------------------------------------------------------------------------------


def by_the_formula(factors: LowRankFactors, layer: Layer, rank: int, moment: str) -> float:
    """``1/2 tr(G D C D^T)`` with ``D`` what the rank leaves out of the directions at hand."""
    change = (factors.left[:, rank:] @ factors.right[rank:]).numpy()
    rows = layer.rows
    inputs = {"covariance": reference.covariance, "second": reference.second_moment}[moment](rows)
    gradient = reference.shrunk(layer.number(Statistic.OUTPUT_GRADIENT), 0.01)
    return float(np.trace(gradient @ change @ inputs @ change.T)) / 2


@cases
@pytest.mark.parametrize("name", CASES)
def test_predicted_loss_is_the_quadratic_form_of_what_is_left_out(shape: str, name: str) -> None:
    """Whatever metric chose the directions; where the form rises with rank, it is held up."""
    layer = draw(shape)
    factors = factor(CASES[name].method, layer)
    moment = "second" if factors.center is None else "covariance"
    plain = [by_the_formula(factors, layer, r, moment) for r in range(factors.max_rank + 1)]
    expected = [max(plain[rank:]) for rank in range(len(plain))]
    actual = predicted_loss(factors, layer.statistics)
    assert actual.dtype == torch.float64
    assert np.abs(actual.numpy() - expected).max() <= TOLERANCE["error"] * max(expected)
    assert float(actual[-1]) == 0.0


@given(st.sampled_from(list(SHAPES)), st.integers(0, 7), st.integers(0, 2**31))
def test_predicted_loss_holds_for_any_factors(shape: str, count: int, seed: int) -> None:
    """Directions that cancel each other: a smaller rank may look better than a larger one."""
    layer = draw(shape)
    rows, columns = layer.weight.shape
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, count, generator=generator, dtype=torch.float64)
    right = torch.randn(count, columns, generator=generator, dtype=torch.float64)
    if count > 1:
        left[:, 1], right[1] = -left[:, 0], 0.9 * right[0]
    factors = LowRankFactors(left, right, torch.zeros(count + 1, dtype=torch.float64))
    plain = [by_the_formula(factors, layer, rank, "second") for rank in range(count + 1)]
    actual = predicted_loss(factors, layer.statistics).numpy()
    assert bool((np.diff(actual) <= 0).all())
    expected = [max(plain[rank:]) for rank in range(count + 1)]
    assert np.abs(actual - expected).max() <= TOLERANCE["error"] * max(*expected, 1.0)


@cases
@pytest.mark.parametrize("centred", [False, True])
def test_without_flattening_the_error_of_loss_aware_is_its_predicted_loss(
    shape: str, centred: bool
) -> None:
    layer = draw(shape)
    method = LossAware(output_shrinkage=PREDICTION_SHRINKAGE, output_power=1.0, centred=centred)
    factors = factor(method, layer)
    actual = predicted_loss(factors, layer.statistics)
    difference = float((actual - factors.tail).abs().max())
    assert difference <= TOLERANCE["error"] * float(factors.tail[0])


@cases
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("output_shrinkage", [0.01, 0.3, 1.0])
def test_losses_that_loss_aware_predicts_itself_are_those_of_any_method(
    shape: str, centred: bool, output_shrinkage: float
) -> None:
    """From its eigenvalues, also where its metric is another one than that of predictions."""
    layer = draw(shape)
    factors = factor(LossAware(output_shrinkage=output_shrinkage, centred=centred), layer)
    expected = predicted_loss(factors, layer.statistics)
    assert factors.loss is not None
    difference = float((factors.loss - expected).abs().max())
    assert difference <= TOLERANCE["error"] * float(expected[0])
    # With shrunk inputs directions are not apart in the metric of predictions.
    assert factor(LossAware(input_shrinkage=0.1), layer).loss is None


@cases
@pytest.mark.parametrize("name", CASES)
def test_no_method_without_a_bias_predicts_less_loss_than_kfac(shape: str, name: str) -> None:
    layer = draw(shape)
    factors = factor(CASES[name].method, layer)
    best = factor(LossAware(output_power=1.0, centred=factors.center is not None), layer).tail
    actual = predicted_loss(factors, layer.statistics)
    assert bool((actual >= best - TOLERANCE["error"] * best[0]).all())


def test_predicted_loss_uses_the_pooled_covariance_for_want_of_the_plain_one() -> None:
    layer = draw("wide")
    factors = factor(Bolaco(), layer)
    both = predicted_loss(factors, layer.statistics)
    rest = {k: v for k, v in layer.statistics.items() if k != Statistic.INPUT_COVARIANCE}
    assert torch.allclose(predicted_loss(factors, rest), both, rtol=1e-12)  # one group: the same
    rest[Statistic.POOLED_INPUT_COVARIANCE] = 3 * rest[Statistic.POOLED_INPUT_COVARIANCE]
    assert torch.allclose(predicted_loss(factors, rest), 3 * both, rtol=1e-12)


@given(st.floats(0, 1), st.integers(1, 8), st.integers(0, 1000))
def test_shrinking_keeps_the_trace_and_pulls_eigenvalues_together(
    share: float, size: int, seed: int
) -> None:
    rows = torch.randn(
        size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    matrix = rows @ rows.T
    actual = shrunk(matrix, share)
    assert np.abs(actual.numpy() - reference.shrunk(matrix.numpy(), share)).max() <= 1e-12 * size**2
    assert float(actual.trace()) == pytest.approx(float(matrix.trace()))
    before, after = (torch.linalg.eigvalsh(m) for m in (matrix, actual))
    spread = (before[-1] - before[0]) * (1 - share)
    assert float(after[-1] - after[0]) == pytest.approx(float(spread), abs=1e-9)


# --- optimality ----------------------------------------------------------------------------------


@given(
    st.sampled_from([name for name in CASES if name != "bolaco"]),
    st.sampled_from(list(SHAPES)),
    st.integers(1, 4),
    st.sampled_from([1e-6, 1e-3, 0.1, 1.0]),
    st.integers(0, 2**31),
)
def test_no_layer_of_that_rank_near_it_is_better(
    name: str, shape: str, rank: int, size: float, seed: int
) -> None:
    layer = draw(shape)
    factors = factor(CASES[name].method, layer)
    chooser = np.random.default_rng(seed)
    left = factors.left[:, :rank].numpy() + size * chooser.normal(size=(len(layer.weight), rank))
    width = layer.weight.shape[1]
    right = factors.right[:rank].numpy() + size * chooser.normal(size=(rank, width))
    measured = CASES[name].error(layer, (left @ right, layer.dense[1]))
    assert measured >= float(factors.tail[rank]) * (1 - TOLERANCE["error"])


@given(
    st.sampled_from(list(SHAPES)),
    st.integers(1, 4),
    st.sampled_from([1e-6, 1e-3, 0.1, 1.0]),
    st.integers(0, 2**32 - 1),
)
def test_no_affine_layer_of_that_rank_near_that_of_bolaco_is_better(
    shape: str, rank: int, size: float, seed: int
) -> None:
    layer = draw(shape)
    factors = factor(Bolaco(), layer)
    chooser = np.random.default_rng(seed)
    rows, columns = layer.weight.shape
    left = factors.left[:, :rank].numpy() + size * chooser.normal(size=(rows, rank))
    right = factors.right[:rank].numpy() + size * chooser.normal(size=(rank, columns))
    bias = factors.bias_at(rank)
    assert bias is not None
    offset = bias.numpy() + size * chooser.normal(size=rows)
    measured = reference.mean_squared_output_error(layer.dense, (left @ right, offset), layer.rows)
    assert measured >= float(factors.tail[rank]) * (1 - TOLERANCE["error"])


@cases
@pytest.mark.parametrize("rank", [1, 3])
def test_alternating_least_squares_from_random_starts_is_never_better(
    shape: str, rank: int
) -> None:
    """An optimizer that knows nothing of eigenvectors comes close from above, never below."""
    layer = draw(shape)
    rows, dense = layer.rows, layer.dense
    optimum = float(factor(Bolaco(), layer).tail[rank])
    targets = rows @ dense[0].T + dense[1]
    best = np.inf
    for seed in range(5):
        right = np.random.default_rng(seed).normal(size=(rank, rows.shape[1]))
        for _ in range(200):
            design = np.column_stack([rows @ right.T, np.ones(len(rows))])
            solution = np.linalg.lstsq(design, targets, rcond=None)[0]
            left, offset = solution[:rank].T, solution[rank]
            right = np.linalg.lstsq(rows, (targets - offset) @ np.linalg.pinv(left).T, rcond=None)[
                0
            ].T
        error = reference.mean_squared_output_error(dense, (left @ right, offset), rows)
        assert error >= optimum * (1 - TOLERANCE["error"])
        best = min(best, error)
    assert best <= optimum * 1.01  # so the bound above is not an empty one
