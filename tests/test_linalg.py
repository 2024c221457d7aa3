"""Roots and weighted SVD, against plain matrix algebra; bad input is announced."""

import math
import re
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lrbo.errors import StatisticsError
from lrbo.linalg import (
    JitterWarning,
    column_space,
    output_directions,
    psd_cholesky,
    psd_eigenpairs,
    psd_root,
    require_finite,
    weighted_svd,
)
from tests.support import reference

TOLERANCE = {
    "exact": 1e-12,  # a handful of float64 products of numbers around 1, relative to the largest
    "root": 1e-9,  # a root halves the digits of the smallest eigenvalue that is kept
    "gram": 1e-5,  # float32 products of a few hundred terms, relative to the largest entry
}


def draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def psd(width: int, rank: int, seed: int = 0) -> Tensor:
    """Draw a positive semi-definite matrix of a rank."""
    rows = draw(rank, width, seed=seed)
    return rows.T @ rows


def relative(actual: Tensor, expected: Tensor) -> float:
    scale = max(float(expected.abs().max()), 1e-300)
    return float((actual - expected).abs().max()) / scale


# --- require_finite ----------------------------------------------------------------------------


@given(
    bad=st.lists(st.sampled_from([math.nan, math.inf, -math.inf]), min_size=1, max_size=12),
    good=st.integers(0, 8),
)
def test_non_finite_values_are_counted(bad: list[float], good: int) -> None:
    tensor = torch.tensor([*bad, *[1.0] * good])
    counted = rf"^layer 3 holds {len(bad)} non-finite values out of {len(bad) + good}\."
    with pytest.raises(StatisticsError, match=counted):
        require_finite("layer 3", tensor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_largest_finite_values_pass(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    tensor = torch.tensor([limits.min, limits.max, limits.tiny, 0.0], dtype=dtype)
    before = tensor.clone()
    require_finite("limits", tensor)
    require_finite("nothing", tensor[:0])
    assert torch.equal(tensor, before)


# --- psd_eigenpairs ----------------------------------------------------------------------------


@given(width=st.integers(1, 8), rank=st.integers(0, 8), seed=st.integers(0, 1000))
def test_eigenpairs_rebuild_the_matrix_largest_first(width: int, rank: int, seed: int) -> None:
    matrix = psd(width, rank, seed)
    values, vectors = psd_eigenpairs(matrix)
    assert values.dtype == vectors.dtype == torch.float64
    assert bool((values.diff() <= 0).all())
    assert bool((values >= 0).all())
    identity = torch.eye(width, dtype=torch.float64)
    assert relative(vectors.T @ vectors, identity) <= TOLERANCE["exact"]
    scale = max(float(matrix.abs().max()), 1e-300)
    rebuilt = (vectors * values) @ vectors.T
    assert float((rebuilt - matrix).abs().max()) <= TOLERANCE["exact"] * scale * width


def test_eigenpairs_read_the_symmetric_part_and_leave_the_matrix() -> None:
    matrix = psd(5, 5)
    skew = draw(5, 5, seed=1)
    uneven = matrix + (skew - skew.T) / 2
    before = uneven.clone()
    values, _ = psd_eigenpairs(uneven)
    assert torch.equal(uneven, before)
    assert relative(values, psd_eigenpairs(matrix)[0]) <= TOLERANCE["exact"]


def test_eigenpairs_of_half_precision_are_computed_in_float64() -> None:
    matrix = torch.diag(torch.tensor([1.0, 4.0, 2.0], dtype=torch.bfloat16))
    values, vectors = psd_eigenpairs(matrix)
    assert values.tolist() == [4.0, 2.0, 1.0]
    assert vectors.dtype == torch.float64


def test_a_matrix_without_rows_has_no_eigenpairs() -> None:
    values, vectors = psd_eigenpairs(torch.zeros(0, 0))
    assert values.shape == (0,)
    assert vectors.shape == (0, 0)


def test_an_eigenvalue_negative_beyond_rounding_is_announced_with_its_size() -> None:
    matrix = torch.diag(torch.tensor([2.0, -0.5, 1.0], dtype=torch.float64))
    with pytest.warns(JitterWarning, match=r"mlp\.fc1: smallest eigenvalue -5\.000e-01 .*2\.000e"):
        values, _ = psd_eigenpairs(matrix, "mlp.fc1")
    assert values.tolist() == [2.0, 1.0, 0.0]


def test_a_matrix_that_is_negative_altogether_is_announced() -> None:
    with pytest.warns(JitterWarning):
        values, _ = psd_eigenpairs(-torch.eye(3, dtype=torch.float64))
    assert values.tolist() == [0.0, 0.0, 0.0]


def test_rounding_below_zero_is_not_announced() -> None:
    matrix = torch.diag(torch.tensor([1.0, -1e-14], dtype=torch.float64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values, _ = psd_eigenpairs(matrix)
    assert values.tolist() == [1.0, 0.0]


def test_a_broken_matrix_is_refused_by_name() -> None:
    matrix = torch.eye(3, dtype=torch.float64)
    matrix[1, 2] = math.nan
    for function in (psd_eigenpairs, psd_root, psd_cholesky):
        with pytest.raises(StatisticsError, match=r"covariance of x holds 1 non-finite .* 9\."):
            function(matrix, "covariance of x")


# --- psd_root ----------------------------------------------------------------------------------


@given(width=st.integers(1, 8), rank=st.integers(0, 10), seed=st.integers(0, 1000))
def test_root_has_the_rank_and_its_inverse_is_moore_penrose(
    width: int, rank: int, seed: int
) -> None:
    """The four Penrose conditions say that it is the pseudo-inverse, and no other matrix."""
    matrix = psd(width, rank, seed)
    root, inverse = psd_root(matrix)
    count = min(width, rank)
    assert root.shape == (width, count)
    assert inverse.shape == (count, width)
    if count == 0:
        return
    assert relative(root @ root.T, matrix) <= TOLERANCE["root"]
    assert relative(root @ inverse @ root, root) <= TOLERANCE["root"]
    assert relative(inverse @ root @ inverse, inverse) <= TOLERANCE["root"]
    projector = root @ inverse
    assert float((projector - projector.T).abs().max()) <= TOLERANCE["root"]
    identity = torch.eye(count, dtype=torch.float64)
    assert relative(inverse @ root, identity) <= TOLERANCE["root"]


# --- psd_cholesky --------------------------------------------------------------------------------


@given(width=st.integers(1, 8), extra=st.integers(0, 6), seed=st.integers(0, 1000))
def test_a_positive_definite_matrix_has_its_cholesky_factor_in_silence(
    width: int, extra: int, seed: int
) -> None:
    matrix = psd(width, width + extra, seed) + 1e-3 * torch.eye(width, dtype=torch.float64)
    factor = psd_cholesky(matrix)  # a warning would be an error
    assert torch.equal(factor, factor.tril())
    assert bool((factor.diagonal() > 0).all())
    assert relative(factor @ factor.T, matrix) <= TOLERANCE["exact"] * width


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e9])
def test_a_singular_matrix_gets_jitter_that_is_announced_with_its_size(size: float) -> None:
    """The least that helps, as a share of the mean diagonal entry whatever the unit."""
    matrix = size * torch.diag(torch.tensor([3.0, 0.0, 2.0, 3.0], dtype=torch.float64))
    added = rf"added {2e-12 * size:.3e} to its diagonal, 1e-12 of the mean entry"
    announced = rf"^mlp\.fc1 is not positive definite \(pivot 2 of 4\); {re.escape(added)}"
    with pytest.warns(JitterWarning, match=announced):
        factor = psd_cholesky(matrix, "mlp.fc1")
    assert relative(factor @ factor.T, matrix) <= 1e-11


@pytest.mark.parametrize(("below", "share"), [(-1e-11, "1e-10"), (-3e-7, "1e-06")])
def test_jitter_grows_until_it_is_enough(below: float, share: str) -> None:
    matrix = torch.diag(torch.tensor([2.0, below], dtype=torch.float64))
    with pytest.warns(JitterWarning, match=rf", {share} of the mean entry"):
        psd_cholesky(matrix)


def test_the_pivot_that_is_named_is_the_first_that_failed() -> None:
    matrix = torch.diag(torch.tensor([3.0, 0.0, 2.0, -1e-11], dtype=torch.float64))
    with pytest.warns(JitterWarning, match=r"\(pivot 2 of 4\).* 1e-11 of the mean entry"):
        psd_cholesky(matrix)


def test_a_matrix_that_no_jitter_helps_is_refused() -> None:
    matrix = torch.diag(torch.tensor([2.0, -0.5, 1.5], dtype=torch.float64))
    with pytest.raises(StatisticsError, match=r"x is not positive definite even with 1\.000e-04"):
        psd_cholesky(matrix, "x")


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_matrix_without_energy_is_refused(value: float) -> None:
    matrix = value * torch.eye(3, dtype=torch.float64)
    with pytest.raises(StatisticsError, match=r"x has a mean diagonal of .*nothing was measured"):
        psd_cholesky(matrix, "x")


# --- weighted_svd --------------------------------------------------------------------------------

shapes = pytest.mark.parametrize("shape", [(5, 8), (8, 5), (6, 6)])


def assert_optimal(
    weight: Tensor, svd: tuple[Tensor, Tensor, Tensor], root: Tensor, limit: float
) -> None:
    """Compare errors on ``W B`` with those of Eckart and Young, and the full rank with ``W``."""
    left, values, right = svd
    count = min(weight.shape)
    assert left.shape == (weight.shape[0], count)
    assert values.shape == (count,)
    assert right.shape == (count, weight.shape[1])
    assert bool((values.diff() <= 0).all())
    assert bool((values >= 0).all())
    identity = torch.eye(count, dtype=torch.float64)
    assert relative(left.T @ left, identity) <= TOLERANCE["exact"]
    assert relative(right, left.T @ weight) <= TOLERANCE["exact"]
    assert relative(left @ right, weight) <= TOLERANCE["exact"]
    exact = (weight @ root).numpy()
    unit = float((exact**2).sum())
    for rank in range(count + 1):
        rest = exact - (left[:, :rank] @ right[:rank] @ root).numpy()
        best = exact - reference.truncated_svd(exact, rank)
        assert abs(float((rest**2).sum() - (best**2).sum())) <= limit * unit, rank
        error = float((values[rank:] ** 2).sum())
        assert abs(error - float((best**2).sum())) <= limit * unit, rank


@shapes
def test_without_weights_every_prefix_is_the_truncated_svd(shape: tuple[int, int]) -> None:
    weight = draw(*shape)
    before = weight.clone()
    left, values, right = weighted_svd(weight)
    assert torch.equal(weight, before)
    assert_optimal(weight, (left, values, right), torch.eye(shape[1]).double(), TOLERANCE["exact"])
    for rank in range(len(values) + 1):
        plain = reference.truncated_svd(reference.numpy_of(weight), rank)
        product = left[:, :rank] @ right[:rank]
        assert np.abs(product.numpy() - plain).max() <= TOLERANCE["exact"] * 10, rank


@shapes
@pytest.mark.parametrize("root", ["cholesky", "eigenvectors", "tokens"])
def test_with_a_full_weight_every_prefix_is_the_whitened_svd(
    shape: tuple[int, int], root: str
) -> None:
    """Whatever root of the moment is given: also one with more columns than rows."""
    weight, tokens = draw(*shape), draw(40, shape[1], seed=3)
    moment = tokens.T @ tokens
    given = {"cholesky": psd_cholesky(moment), "eigenvectors": psd_root(moment)[0]}.get(
        root, tokens.T
    )
    left, values, right = weighted_svd(weight, given)
    assert_optimal(weight, (left, values, right), given, TOLERANCE["exact"])
    for rank in range(len(values) + 1):
        plain = reference.whitened_svd(reference.numpy_of(weight), reference.numpy_of(moment), rank)
        product = left[:, :rank] @ right[:rank]
        assert np.abs(product.numpy() - plain).max() <= TOLERANCE["root"], rank


@shapes
@pytest.mark.parametrize("zeros", [0, 2])
def test_a_vector_is_a_diagonal_weight(shape: tuple[int, int], zeros: int) -> None:
    weight, diagonal = draw(*shape), draw(shape[1], seed=2).abs()
    diagonal[:zeros] = 0.0
    svd = weighted_svd(weight, diagonal)
    assert_optimal(weight, svd, torch.diag(diagonal), TOLERANCE["exact"])
    other = weighted_svd(weight, torch.diag(diagonal))
    assert relative(svd[1], other[1]) <= TOLERANCE["exact"]


@shapes
@pytest.mark.parametrize("rank_of_inputs", [1, 3])
def test_a_singular_weight_leaves_directions_for_last_and_the_full_rank_exact(
    shape: tuple[int, int], rank_of_inputs: int
) -> None:
    """With fewer tokens than features: the error is measured on the tokens themselves."""
    tokens, weight = draw(rank_of_inputs, shape[1], seed=4), draw(*shape)
    moment = tokens.T @ tokens
    eigenvalues, vectors = psd_eigenpairs(moment)
    for root in (tokens.T, psd_root(moment)[0], vectors * eigenvalues.sqrt()):
        left, values, right = weighted_svd(weight, root)
        assert_optimal(weight, (left, values, right), root, TOLERANCE["root"])
        energy = values.square()
        assert float(energy[rank_of_inputs:].max()) <= TOLERANCE["exact"] * float(energy[0])


def test_half_precision_weights_are_factored_in_float64() -> None:
    weight = draw(4, 6).to(torch.bfloat16)
    low, high = weighted_svd(weight), weighted_svd(weight.double())
    assert all(torch.equal(a, b) for a, b in zip(low, high, strict=True))


# --- output_directions ---------------------------------------------------------------------------


@shapes
@pytest.mark.parametrize("tokens", [2, 40])
def test_output_directions_are_the_weighted_svd_without_a_root(
    shape: tuple[int, int], tokens: int
) -> None:
    weight, rows = draw(*shape), draw(tokens, shape[1], seed=3)
    directions = output_directions(weight, rows.T @ rows)
    assert_optimal(
        weight, (directions[0], directions[1].sqrt(), directions[2]), rows.T, TOLERANCE["root"]
    )


@shapes
def test_output_directions_diagonalise_the_covariance_of_the_outputs(
    shape: tuple[int, int],
) -> None:
    weight, inputs = draw(*shape), psd(shape[1], 40, seed=3)
    directions, energy, _ = output_directions(weight, inputs)
    outputs = weight @ inputs @ weight.T
    assert relative(directions.T @ outputs @ directions, torch.diag(energy)) <= TOLERANCE["exact"]
    assert float(energy.sum()) == pytest.approx(float(outputs.trace()), rel=TOLERANCE["exact"])


@shapes
def test_the_column_space_of_a_tall_matrix_is_a_basis_and_the_matrix_in_it(
    shape: tuple[int, int],
) -> None:
    weight = draw(*shape)
    basis, reduced = column_space(weight)
    assert reduced.shape == (min(shape), shape[1])
    if basis is None:
        assert shape[0] <= shape[1]
        assert torch.equal(reduced, weight)
        return
    assert shape[0] > shape[1]
    assert relative(basis @ reduced, weight) <= TOLERANCE["exact"]
    identity = torch.eye(min(shape), dtype=torch.float64)
    assert relative(basis.T @ basis, identity) <= TOLERANCE["exact"]
