"""Identities between methods, and the optimality that their docstrings claim."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lrbo.factorization.base import Statistic
from lrbo.factorization.pooled import Bolaco
from lrbo.factorization.weighted import Svd
from lrbo.linalg import psd_root, weighted_svd
from tests import reference
from tests.reference import Affine, Matrix

TOLERANCE = {
    "map": 1e-9,  # 1e-16 times the condition of the covariance (below 1e4), over the gaps
    "error": 1e-10,  # relative to the error at rank 0
}

SHAPES = [(5, 9), (9, 5), (7, 7)]
TOKENS = 80


def problem(shape: tuple[int, int], *, bias: bool, seed: int = 1) -> tuple[Affine, Matrix]:
    """Draw a dense layer and correlated inputs with a mean."""
    chooser = np.random.default_rng(seed)
    out_features, in_features = shape
    rows = chooser.normal(size=(TOKENS, in_features)) @ chooser.normal(size=(in_features,) * 2)
    rows += 3 * chooser.normal(size=in_features)
    offset = chooser.normal(size=out_features) if bias else np.zeros(out_features)
    return (chooser.normal(size=shape), offset), rows


def bolaco_with_one_group(dense: Affine, rows: Matrix, *, bias: bool):
    weight, offset = (torch.from_numpy(array) for array in dense)
    covariance = torch.from_numpy(reference.covariance(rows))
    statistics = {
        Statistic.INPUT_MEAN: torch.from_numpy(reference.mean(rows)),
        Statistic.POOLED_INPUT_COVARIANCE: covariance,
    }
    return Bolaco().factor(weight, offset if bias else None, statistics)


cases = pytest.mark.parametrize("shape", SHAPES)
biases = pytest.mark.parametrize("bias", [False, True])


@cases
@biases
def test_bolaco_with_one_group_is_whitened_svd_with_the_centred_covariance(
    shape: tuple[int, int], bias: bool
) -> None:
    """One by eigenvectors of the outputs, the other by a Cholesky root of the inputs."""
    dense, rows = problem(shape, bias=bias)
    factors = bolaco_with_one_group(dense, rows, bias=bias)
    covariance, centre = reference.covariance(rows), reference.mean(rows)
    for rank in range(factors.max_rank + 1):
        weight = reference.whitened_svd(dense[0], covariance, rank)
        offset = dense[0] @ centre + dense[1] - weight @ centre  # restores the mean output
        found = reference.affine_of(factors.at_rank(rank), shape[1])
        assert np.abs(found[0] - weight).max() <= TOLERANCE["map"], rank
        assert np.abs(found[1] - offset).max() <= TOLERANCE["map"], rank


@cases
def test_bolaco_is_weighted_svd_with_a_root_of_the_centred_covariance(
    shape: tuple[int, int],
) -> None:
    dense, rows = problem(shape, bias=False)
    factors = bolaco_with_one_group(dense, rows, bias=False)
    root, inverse = psd_root(torch.from_numpy(reference.covariance(rows)))
    left, values, right = weighted_svd(torch.from_numpy(dense[0]), root, inverse)
    for rank in range(factors.max_rank + 1):
        expected = left[:, :rank] * values[:rank] @ right[:rank]
        found = factors.left[:, :rank] @ factors.right[:rank]
        assert float((found - expected).abs().max()) <= TOLERANCE["map"], rank
        error = float(values[rank:].square().sum())
        assert abs(factors.error_at(rank) - error) <= TOLERANCE["error"] * factors.error_at(0)


@cases
def test_bolaco_with_white_inputs_is_plain_svd(shape: tuple[int, int]) -> None:
    dense, _ = problem(shape, bias=False)
    weight = torch.from_numpy(dense[0])
    statistics = {
        Statistic.INPUT_MEAN: torch.zeros(shape[1], dtype=torch.float64),
        Statistic.POOLED_INPUT_COVARIANCE: torch.eye(shape[1], dtype=torch.float64),
    }
    ours, plain = Bolaco().factor(weight, None, statistics), Svd().factor(weight, None, {})
    for rank in range(ours.max_rank + 1):
        found = reference.affine_of(ours.at_rank(rank), shape[1])
        expected = reference.affine_of(plain.at_rank(rank), shape[1])
        assert np.abs(found[0] - expected[0]).max() <= TOLERANCE["map"]
        assert np.abs(found[1]).max() <= TOLERANCE["map"]
        error = abs(ours.error_at(rank) - plain.error_at(rank))
        assert error <= TOLERANCE["error"] * plain.error_at(0)


@cases
@biases
def test_svd_equals_numpy(shape: tuple[int, int], bias: bool) -> None:
    dense, _ = problem(shape, bias=bias)
    weight, offset = (torch.from_numpy(array) for array in dense)
    factors = Svd().factor(weight, offset if bias else None, {})
    values = np.linalg.svd(dense[0], compute_uv=False)
    for rank in range(factors.max_rank + 1):
        found = reference.affine_of(factors.at_rank(rank), shape[1]) if bias else None
        product = (factors.left[:, :rank] @ factors.right[:rank]).numpy()
        expected = reference.truncated_svd(dense[0], rank)
        assert np.abs(product - expected).max() <= TOLERANCE["map"], rank
        if found is not None:
            assert np.abs(found[1] - dense[1]).max() == 0.0  # the bias is kept as it is
        assert factors.error_at(rank) == pytest.approx((values[rank:] ** 2).sum(), rel=1e-12)
    spread = factors.left.norm(dim=0) / factors.right.norm(dim=1)
    torch.testing.assert_close(spread, torch.ones_like(spread))  # split evenly


@cases
@biases
def test_error_is_the_mean_squared_output_error_on_the_calibration_tokens(
    shape: tuple[int, int], bias: bool
) -> None:
    dense, rows = problem(shape, bias=bias)
    factors = bolaco_with_one_group(dense, rows, bias=bias)
    for rank in range(factors.max_rank + 1):
        layer = reference.affine_of(factors.at_rank(rank), shape[1])
        measured = reference.mean_squared_output_error(dense, layer, rows)
        assert abs(factors.error_at(rank) - measured) <= TOLERANCE["error"] * factors.error_at(0)


@given(
    st.sampled_from(SHAPES),
    st.integers(1, 4),
    st.sampled_from([1e-6, 1e-3, 0.1, 1.0]),
    st.integers(0, 2**32 - 1),
)
def test_no_affine_layer_of_that_rank_near_it_is_better(
    shape: tuple[int, int], rank: int, size: float, seed: int
) -> None:
    dense, rows = problem(shape, bias=True)
    factors = bolaco_with_one_group(dense, rows, bias=True)
    chooser = np.random.default_rng(seed)
    left = factors.left[:, :rank].numpy() + size * chooser.normal(size=(shape[0], rank))
    right = factors.right[:rank].numpy() + size * chooser.normal(size=(rank, shape[1]))
    offset = factors.bias_at(rank).numpy() + size * chooser.normal(size=shape[0])
    measured = reference.mean_squared_output_error(dense, (left @ right, offset), rows)
    assert measured >= factors.error_at(rank) * (1 - TOLERANCE["error"])


@cases
@pytest.mark.parametrize("rank", [1, 3])
def test_alternating_least_squares_from_random_starts_is_never_better(
    shape: tuple[int, int], rank: int
) -> None:
    """An optimizer that knows nothing of eigenvectors comes close from above, never below."""
    dense, rows = problem(shape, bias=True)
    optimum = bolaco_with_one_group(dense, rows, bias=True).error_at(rank)
    targets = rows @ dense[0].T + dense[1]
    best = np.inf
    for seed in range(5):
        right = np.random.default_rng(seed).normal(size=(rank, shape[1]))
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
