"""Roots, weighted SVD and Gram panels, against plain matrix algebra; bad input is announced."""

import math
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
    add_gram,
    mirror_upper,
    psd_eigenpairs,
    psd_root,
    require_finite,
    weighted_svd,
)
from tests import reference

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


def relative(found: Tensor, expected: Tensor) -> float:
    scale = max(float(expected.abs().max()), 1e-300)
    return float((found - expected).abs().max()) / scale


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
    for function in (psd_eigenpairs, psd_root):
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


# --- weighted_svd ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (6, 6)])
def test_without_weights_every_prefix_is_the_truncated_svd(shape: tuple[int, int]) -> None:
    weight = draw(*shape)
    before = weight.clone()
    left, values, right = weighted_svd(weight)
    assert torch.equal(weight, before)
    assert bool((values.diff() <= 0).all())
    for rank in range(len(values) + 1):
        found = (left[:, :rank] * values[:rank]) @ right[:rank]
        plain = reference.truncated_svd(reference.numpy_of(weight), rank)
        assert np.abs(found.numpy() - plain).max() <= TOLERANCE["exact"] * 10, rank


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (6, 6)])
def test_with_a_full_weight_every_prefix_is_the_whitened_svd(shape: tuple[int, int]) -> None:
    weight, moment = draw(*shape), psd(shape[1], 40, seed=3)
    left, values, right = weighted_svd(weight, *psd_root(moment))
    for rank in range(len(values) + 1):
        found = (left[:, :rank] * values[:rank]) @ right[:rank]
        plain = reference.whitened_svd(reference.numpy_of(weight), reference.numpy_of(moment), rank)
        assert np.abs(found.numpy() - plain).max() <= TOLERANCE["root"], rank


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (6, 6)])
@pytest.mark.parametrize("rank_of_inputs", [1, 3])
def test_a_singular_weight_gives_the_stated_error_and_no_better_matrix_exists(
    shape: tuple[int, int], rank_of_inputs: int
) -> None:
    """With fewer tokens than features: the error is measured on the tokens themselves."""
    tokens = draw(rank_of_inputs, shape[1], seed=4)
    weight = draw(*shape)
    left, values, right = weighted_svd(weight, *psd_root(tokens.T @ tokens))
    exact = weight @ tokens.T
    for rank in range(len(values) + 1):
        found = (left[:, :rank] * values[:rank]) @ right[:rank]
        error = float(((exact - found @ tokens.T) ** 2).sum())
        # Eckart and Young on the outputs: no matrix of this rank has outputs any closer.
        best = exact.numpy() - reference.truncated_svd(exact.numpy(), rank)
        assert error == pytest.approx(float((best**2).sum()), rel=1e-9, abs=1e-9), rank
        assert error == pytest.approx(float((values[rank:] ** 2).sum()), rel=1e-9, abs=1e-9), rank


def test_half_precision_weights_are_factored_in_float64() -> None:
    weight = draw(4, 6).to(torch.bfloat16)
    low, high = weighted_svd(weight), weighted_svd(weight.double())
    assert all(torch.equal(a, b) for a, b in zip(low, high, strict=True))


# --- Gram panels -------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 7, 255, 256, 259, 301])
@pytest.mark.parametrize("panels", [1, 4, 5])
def test_panels_add_up_to_the_scaled_gram_matrix(width: int, panels: int) -> None:
    """Widths on both sides of the limit above which panels are used, some not divisible."""
    accumulator = torch.zeros(width, width, dtype=torch.float64)
    expected = torch.zeros_like(accumulator)
    for seed, scale in enumerate((1.0, 0.25)):
        rows = draw(9, width, seed=seed)
        add_gram(accumulator, rows, scale, panels)
        expected += scale * rows.T @ rows
    assert relative(mirror_upper(accumulator), expected) <= TOLERANCE["exact"]


def test_panels_leave_what_is_below_the_block_diagonal_untouched() -> None:
    accumulator = torch.zeros(256, 256, dtype=torch.float64)
    add_gram(accumulator, torch.ones(1, 256, dtype=torch.float64), panels=4)
    untouched = int((accumulator == 0).sum())
    assert untouched == 64 * 64 * 6  # six of sixteen blocks
    assert untouched == int((accumulator.tril(-1) == 0).sum()) - 256 * 257 // 2


def test_float32_rows_are_added_up_in_the_dtype_of_the_accumulator() -> None:
    rows = draw(50, 300).float()
    accumulator = torch.zeros(300, 300, dtype=torch.float64)
    for _ in range(3):
        add_gram(accumulator, rows)
    exact = 3 * rows.double().T @ rows.double()
    assert accumulator.dtype == torch.float64
    assert relative(mirror_upper(accumulator), exact) <= TOLERANCE["gram"]


def test_mirror_reads_the_upper_triangle_only() -> None:
    matrix = draw(6, 6)
    mirrored = mirror_upper(matrix)
    assert torch.equal(mirrored, mirrored.T)
    assert torch.equal(mirrored.triu(), matrix.triu())
    other = matrix.triu() + draw(6, 6, seed=9).tril(-1)
    assert torch.equal(mirror_upper(other), mirrored)
