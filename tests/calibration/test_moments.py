"""Streaming equals the batch formula, in any order and split."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lrbo.calibration.moments import Moments, PooledMoments
from tests.support import reference

# Differences of entry (i, j) are measured in units of sqrt(C_ii C_jj) (the largest that entry
# could be), so that small features beside large ones are tested too.
TOLERANCE = {
    torch.float64: 1e-12,  # sums of at most 200 products, each rounded at 1e-16
    # Rows around their mean are rounded to float32 (6e-8) and a batch's products are summed in
    # float32; bfloat16 and float16 inputs are exact in float32, so the same holds for them.
    torch.float32: 2e-6,
    torch.bfloat16: 2e-6,
    torch.float16: 2e-6,
}
MEAN_TOLERANCE = 1e-13  # relative to the largest entry: means are summed in float64 throughout


def assert_same(actual: Tensor, expected: np.ndarray, tolerance: float) -> None:
    """Compare covariances entry by entry in units of the features' own spreads."""
    spread = np.sqrt(np.diag(expected))
    unit = np.outer(spread, spread) + np.finfo(float).tiny
    assert np.abs(actual.numpy() - expected).max() <= tolerance * unit.max()
    worst = (np.abs(actual.numpy() - expected) / unit).max()
    assert worst <= tolerance, f"differs by {worst:.2e} of the spreads"


def rows_of(seed: int, sizes: list[int], features: int, shift: float) -> list[Tensor]:
    """Draw batches whose means differ by about ``shift`` times their spread."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator, dtype=torch.float64)
    batches = []
    for size in sizes:
        noise = torch.randn(size, features, generator=generator, dtype=torch.float64)
        centre = shift * torch.randn(features, generator=generator, dtype=torch.float64)
        batches.append(noise @ mix + centre)
    return batches


def moments_of(batches: list[Tensor], features: int) -> Moments:
    moments = Moments(features)
    for batch in batches:
        moments.update(batch)
    return moments


seeds = st.integers(0, 2**32 - 1)
sizes = st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(lambda s: sum(s) >= 2)
features = st.integers(1, 7)
shifts = st.sampled_from([0.0, 1.0, 100.0])


@given(seeds, sizes, features, shifts)
def test_updates_equal_the_covariance_of_the_concatenation(
    seed: int, sizes: list[int], features: int, shift: float
) -> None:
    batches = rows_of(seed, sizes, features, shift)
    rows = torch.cat(batches)
    actual = moments_of(batches, features)
    assert actual.tokens == len(rows)
    expected = reference.covariance(rows.numpy())
    assert_same(actual.covariance, expected, TOLERANCE[torch.float64])
    library = torch.cov(rows.T, correction=0).reshape(features, features)
    assert_same(actual.covariance, library.numpy(), TOLERANCE[torch.float64])
    error = np.abs(actual.mean.numpy() - reference.mean(rows.numpy())).max()
    assert error <= MEAN_TOLERANCE * rows.abs().max()


@given(seeds, features)
def test_an_empty_batch_changes_nothing(seed: int, features: int) -> None:
    batches = rows_of(seed, [5, 4], features, 10.0)
    moments, nothing = moments_of(batches, features), torch.empty(0, features)
    other = moments_of([nothing, *batches, nothing], features)
    assert other.tokens == moments.tokens
    assert torch.equal(other.mean, moments.mean)
    assert torch.equal(other.covariance, moments.covariance)
    empty = moments_of([nothing], features)
    assert empty.tokens == 0
    assert torch.equal(empty.covariance, torch.zeros(features, features, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_half_precision_batches_within_tolerance(dtype: torch.dtype, shift: float) -> None:
    batches = [batch.to(dtype) for batch in rows_of(7, [300, 17, 1, 200], 24, shift)]
    rows = reference.numpy_of(torch.cat(batches))
    actual = moments_of(batches, 24)
    assert actual.mean.dtype == actual.covariance.dtype == torch.float64
    assert_same(actual.covariance, reference.covariance(rows), TOLERANCE[dtype])
    error = np.abs(actual.mean.numpy() - reference.mean(rows)).max()
    assert error <= 1e-7 * np.abs(rows).max()  # rows are shifted in float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_large_common_mean_cancels_nothing(dtype: torch.dtype) -> None:
    # 1e3 spreads away from zero: E[xx^T] - mean mean^T in float32 would keep no digit.
    batches = [(b + 1000.0).to(dtype) for b in rows_of(3, [64, 64], 6, 0.0)]
    actual = moments_of(batches, 6)
    expected = reference.covariance(reference.numpy_of(torch.cat(batches)))
    assert_same(actual.covariance, expected, {torch.float64: 1e-11, torch.float32: 2e-6}[dtype])


def test_wide_features_go_through_the_panels() -> None:
    batches = rows_of(5, [40, 23], 300, 5.0)
    rows = torch.cat(batches).numpy()
    actual = moments_of(batches, 300).covariance
    assert_same(actual, reference.covariance(rows), TOLERANCE[torch.float64])
    assert torch.equal(actual, actual.T)


# --- pooled ------------------------------------------------------------------------------------


@given(
    seeds,
    st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=3), min_size=1, max_size=4),
    features,
    shifts,
)
def test_pooled_is_the_mean_of_the_groups_covariances(
    seed: int, splits: list[list[int]], features: int, shift: float
) -> None:
    """Groups of unequal size, each fed in one or several batches."""
    flat = rows_of(seed, [size for split in splits for size in split], features, shift)
    moments, groups, position = PooledMoments(features), [], 0
    for split in splits:
        batches = flat[position : position + len(split)]
        position += len(split)
        for index, batch in enumerate(batches):
            moments.update([batch], closes_last=index + 1 == len(batches))
        groups.append(torch.cat(batches).numpy())
    rows = np.concatenate(groups)
    assert (moments.groups, moments.tokens) == (len(groups), len(rows))
    expected = reference.pooled_covariance(groups)
    unit = max(np.trace(expected), np.finfo(float).tiny)  # a group of one token has no spread
    assert np.abs(moments.covariance.numpy() - expected).max() <= 1e-12 * unit + 1e-24 * shift
    error = np.abs(moments.mean.numpy() - reference.mean(rows)).max()
    assert error <= MEAN_TOLERANCE * np.abs(rows).max()


@given(seeds, sizes.map(lambda s: [max(size, 1) for size in s]), features, shifts)
def test_one_group_is_the_plain_covariance(
    seed: int, sizes: list[int], features: int, shift: float
) -> None:
    batches = rows_of(seed, sizes, features, shift)
    pooled = PooledMoments(features)
    for index, batch in enumerate(batches):
        pooled.update([batch], closes_last=index + 1 == len(batches))
    rows = torch.cat(batches).numpy()
    if len(rows) > 1:
        assert_same(pooled.covariance, reference.covariance(rows), TOLERANCE[torch.float64])
    assert pooled.groups == 1


@given(seeds, st.lists(st.integers(1, 12), min_size=1, max_size=5), features, shifts)
def test_whole_groups_at_once_equal_one_after_the_other(
    seed: int, sizes: list[int], features: int, shift: float
) -> None:
    """Also behind the end of an open group, and before the beginning of another."""
    first, last, *whole = rows_of(seed, [3, 4, *sizes], features, shift)
    pooled = PooledMoments(features)
    pooled.update([first], closes_last=False)
    pooled.update([first, *whole, last], closes_last=False)
    pooled.update([last], closes_last=True)
    arrays = [torch.cat([one, one]).numpy() for one in (first, last)]
    arrays += [group.numpy() for group in whole]
    expected = reference.pooled_covariance(arrays)
    unit = max(np.trace(expected), np.finfo(float).tiny)
    assert np.abs(pooled.covariance.numpy() - expected).max() <= 1e-12 * unit + 1e-24 * shift
    assert (pooled.groups, pooled.tokens) == (len(arrays), sum(map(len, arrays)))
