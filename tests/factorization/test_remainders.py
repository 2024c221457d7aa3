"""What integers leave: factored as the metric asks, by any method, with its loss at every rank."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lrbo.calibration.statistics import Statistic
from lrbo.factorization.base import factor_layer
from lrbo.factorization.methods import LossAware
from lrbo.factorization.prediction import PREDICTION_SHRINKAGE, predicted_loss
from lrbo.factorization.registry import METHODS

SHAPES = [(6, 9), (9, 6), (7, 7)]
every_shape = pytest.mark.parametrize("shape", SHAPES)
RANK = 4
# The products of a change are in float32.
EXACT = 1e-5


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def statistics_of(shape: tuple[int, int]) -> dict[Statistic, Tensor]:
    out_features, in_features = shape

    def moment(size: int, seed: int) -> Tensor:
        root = drawn(size, size, seed=seed)
        return root @ root.T / size

    covariance = moment(in_features, 1)
    return {
        Statistic.INPUT_MEAN: drawn(in_features, seed=2),
        Statistic.INPUT_COVARIANCE: covariance,
        Statistic.POOLED_INPUT_COVARIANCE: covariance,
        Statistic.OUTPUT_GRADIENT: moment(out_features, 3),
        Statistic.INPUT_IMPORTANCE: drawn(in_features, seed=4).square(),
        Statistic.WEIGHT_GRADIENT: drawn(*shape, seed=6).abs(),
        Statistic.INPUT_MAGNITUDE: drawn(in_features, seed=5).abs(),
    }


def root_of(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    root: np.ndarray = vectors * np.sqrt(values) @ vectors.T
    return root


@every_shape
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_loss_aware_ones_are_the_best_of_their_rank(
    shape: tuple[int, int], centred: bool, with_bias: bool
) -> None:
    """By the textbook: the SVD between both roots, and half the squares that a rank leaves."""
    given, change = statistics_of(shape), drawn(*shape, seed=6)
    bias = drawn(shape[0], seed=7) if with_bias else None
    factors = LossAware(centred=centred).remainders(bias, given)(change, RANK)
    gradient = given[Statistic.OUTPUT_GRADIENT].numpy()
    trace = np.trace(gradient) / shape[0]
    shrunk = (1 - PREDICTION_SHRINKAGE) * gradient + PREDICTION_SHRINKAGE * trace * np.eye(shape[0])
    mean = given[Statistic.INPUT_MEAN].numpy()
    inputs = given[Statistic.INPUT_COVARIANCE].numpy()
    if not centred:
        inputs = inputs + np.outer(mean, mean)
    left, right = root_of(shrunk), root_of(inputs)
    u, s, vh = np.linalg.svd(left @ change.numpy() @ right, full_matrices=False)
    assert factors.max_rank == RANK
    assert factors.loss is not None
    for rank in range(RANK + 1):
        best = np.linalg.inv(left) @ (u[:, :rank] * s[:rank]) @ vh[:rank] @ np.linalg.inv(right)
        actual = (factors.left[:, :rank] @ factors.right[:rank]).numpy()
        assert np.abs(actual - best).max() < 100 * EXACT * float(change.abs().max())
        expected = float((s[rank:] ** 2).sum() / 2)
        # Eigenvalues in float32 are as exact as the largest one allows.
        floor = 1e-6 * float((s**2).sum() / 2)
        assert float(factors.loss[rank]) == pytest.approx(expected, rel=EXACT, abs=floor)
        if centred:  # the mean output is what it was
            whole = factors.bias_at(rank)
            assert whole is not None
            output = actual @ mean + whole.numpy()
            before = change.numpy() @ mean + (0.0 if bias is None else bias.numpy())
            assert float(np.abs(output - before).max()) < 1e-9
        elif bias is not None:
            assert factors.bias_at(rank) is bias or torch.equal(factors.bias_at(rank), bias)


@every_shape
def test_at_rank_0_the_loss_is_that_of_the_whole_change(shape: tuple[int, int]) -> None:
    given, change = statistics_of(shape), drawn(*shape, seed=6)
    factors = LossAware().remainders(None, given)(change, 0)
    expected = predicted_loss(factor_layer(LossAware(), change, None, given), given)
    assert factors.max_rank == 0
    assert float(factors.loss[0]) == pytest.approx(float(expected[0]), rel=EXACT)


@every_shape
@pytest.mark.parametrize("name", [name for name in METHODS if name != "loss_aware"])
def test_the_others_are_prefixes_of_what_the_method_gives(
    name: str, shape: tuple[int, int]
) -> None:
    given, change, method = statistics_of(shape), drawn(*shape, seed=6), METHODS[name]
    factors = method.remainders(None, given)(change, RANK)
    whole = factor_layer(method, change, None, given)
    assert torch.equal(factors.left, whole.left[:, :RANK])
    assert torch.equal(factors.right, whole.right[:RANK])
    assert torch.equal(factors.loss, predicted_loss(whole, given)[: RANK + 1])


@pytest.mark.parametrize("missing", [Statistic.OUTPUT_GRADIENT, Statistic.INPUT_COVARIANCE])
def test_where_nothing_has_an_effect_nothing_is_lost(missing: Statistic) -> None:
    given, change = statistics_of((6, 9)), drawn(6, 9, seed=6)
    given[missing] = torch.zeros_like(given[missing])
    given[Statistic.INPUT_MEAN] = torch.zeros(9, dtype=torch.float64)
    factors = LossAware().remainders(None, given)(change, RANK)
    assert not bool(factors.loss.any())
    assert bool(torch.isfinite(factors.left).all() & torch.isfinite(factors.right).all())
