"""Streaming equals the batch formula, in any order and split."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lrbo.calibration.moments import Moments, PooledMoments
from tests import reference

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


def assert_same(found: Tensor, expected: np.ndarray, tolerance: float) -> None:
    """Compare covariances entry by entry in units of the features' own spreads."""
    spread = np.sqrt(np.diag(expected))
    unit = np.outer(spread, spread) + np.finfo(float).tiny
    assert np.abs(found.numpy() - expected).max() <= tolerance * unit.max()
    worst = (np.abs(found.numpy() - expected) / unit).max()
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
    moments = Moments.empty(features)
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
    found = moments_of(batches, features)
    assert found.tokens == len(rows)
    expected = reference.covariance(rows.numpy())
    assert_same(found.covariance, expected, TOLERANCE[torch.float64])
    library = torch.cov(rows.T, correction=0).reshape(features, features)
    assert_same(found.covariance, library.numpy(), TOLERANCE[torch.float64])
    assert_same(found.scatter / len(rows), expected, TOLERANCE[torch.float64])
    error = np.abs(found.mean.numpy() - reference.mean(rows.numpy())).max()
    assert error <= MEAN_TOLERANCE * rows.abs().max()


@given(seeds, sizes, features, shifts, st.randoms(use_true_random=False))
def test_any_merge_order_equals_the_concatenation(
    seed: int, sizes: list[int], features: int, shift: float, chooser
) -> None:
    batches = rows_of(seed, sizes, features, shift)
    parts = [moments_of([batch], features) for batch in batches]
    while len(parts) > 1:  # merge two of the parts, in any order, until one is left
        first = parts.pop(chooser.randrange(len(parts)))
        second = parts.pop(chooser.randrange(len(parts)))
        parts.insert(chooser.randrange(len(parts) + 1), first.merge(second))
    rows = torch.cat(batches).numpy()
    assert parts[0].tokens == len(rows)
    assert_same(parts[0].covariance, reference.covariance(rows), TOLERANCE[torch.float64])
    error = np.abs(parts[0].mean.numpy() - reference.mean(rows)).max()
    assert error <= MEAN_TOLERANCE * np.abs(rows).max()


@given(seeds, features, shifts)
def test_merge_is_associative_and_commutative(seed: int, features: int, shift: float) -> None:
    a, b, c = (moments_of([x], features) for x in rows_of(seed, [3, 17, 8], features, shift))
    left, right, swapped = a.merge(b).merge(c), a.merge(b.merge(c)), c.merge(b).merge(a)
    for other in (right, swapped):
        assert other.tokens == left.tokens
        assert_same(other.covariance, left.covariance.numpy(), TOLERANCE[torch.float64])
        torch.testing.assert_close(other.mean, left.mean, rtol=1e-12, atol=1e-12 * shift + 1e-14)


@given(seeds, features)
def test_empty_moments_are_neutral_to_the_bit(seed: int, features: int) -> None:
    moments = moments_of(rows_of(seed, [5, 4], features, 10.0), features)
    empty = Moments.empty(features)
    empty.update(torch.empty(0, features))
    for merged in (moments.merge(empty), empty.merge(moments)):
        assert merged.tokens == moments.tokens
        assert torch.equal(merged.mean, moments.mean)
        assert torch.equal(merged.covariance, moments.covariance)
    assert empty.tokens == 0
    assert torch.equal(empty.covariance, torch.zeros(features, features, dtype=torch.float64))


def test_merge_leaves_its_arguments_alone() -> None:
    a, b = (moments_of([x], 4) for x in rows_of(1, [9, 5], 4, 10.0))
    before = [t.clone() for m in (a, b) for t in (m.mean, m.covariance)]
    merged = a.merge(b)
    merged.update(torch.ones(3, 4))
    after = [t for m in (a, b) for t in (m.mean, m.covariance)]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert (a.tokens, b.tokens, merged.tokens) == (9, 5, 17)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_half_precision_batches_within_tolerance(dtype: torch.dtype, shift: float) -> None:
    batches = [batch.to(dtype) for batch in rows_of(7, [300, 17, 1, 200], 24, shift)]
    rows = reference.numpy_of(torch.cat(batches))
    found = moments_of(batches, 24)
    assert found.mean.dtype == found.covariance.dtype == torch.float64
    assert_same(found.covariance, reference.covariance(rows), TOLERANCE[dtype])
    error = np.abs(found.mean.numpy() - reference.mean(rows)).max()
    assert error <= 1e-7 * np.abs(rows).max()  # rows are shifted in float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_large_common_mean_cancels_nothing(dtype: torch.dtype) -> None:
    # 1e3 spreads away from zero: E[xx^T] - mean mean^T in float32 would keep no digit.
    batches = [(b + 1000.0).to(dtype) for b in rows_of(3, [64, 64], 6, 0.0)]
    found = moments_of(batches, 6)
    expected = reference.covariance(reference.numpy_of(torch.cat(batches)))
    assert_same(found.covariance, expected, {torch.float64: 1e-11, torch.float32: 2e-6}[dtype])


def test_wide_features_go_through_the_panels() -> None:
    batches = rows_of(5, [40, 23], 300, 5.0)
    rows = torch.cat(batches).numpy()
    found = moments_of(batches, 300).covariance
    assert_same(found, reference.covariance(rows), TOLERANCE[torch.float64])
    assert torch.equal(found, found.T)


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
    moments, groups, position = PooledMoments.empty(features), [], 0
    for split in splits:
        batches = flat[position : position + len(split)]
        position += len(split)
        for index, batch in enumerate(batches):
            moments.update(batch, closes_group=index + 1 == len(batches))
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
    pooled = PooledMoments.empty(features)
    for index, batch in enumerate(batches):
        pooled.update(batch, closes_group=index + 1 == len(batches))
    rows = torch.cat(batches).numpy()
    if len(rows) > 1:
        assert_same(pooled.covariance, reference.covariance(rows), TOLERANCE[torch.float64])
    assert pooled.groups == 1


@given(seeds, st.integers(0, 4), features)
def test_merged_groups_equal_all_groups(seed: int, split: int, features: int) -> None:
    groups = rows_of(seed, [6, 2, 9, 3], features, 10.0)
    parts = []
    for chosen in (groups[:split], groups[split:]):
        part = PooledMoments.empty(features)
        for group in chosen:
            part.update(group, closes_group=True)
        parts.append(part)
    expected = reference.pooled_covariance([group.numpy() for group in groups])
    for merged in (parts[0].merge(parts[1]), parts[1].merge(parts[0])):
        assert (merged.groups, merged.tokens) == (4, 20)
        assert_same(merged.covariance, expected, TOLERANCE[torch.float64])
        error = np.abs(merged.mean.numpy() - reference.mean(torch.cat(groups).numpy())).max()
        assert error <= MEAN_TOLERANCE * max(float(group.abs().max()) for group in groups)


@given(seeds, st.lists(st.integers(1, 12), min_size=1, max_size=5), features, shifts)
def test_whole_groups_at_once_equal_one_after_the_other(
    seed: int, sizes: list[int], features: int, shift: float
) -> None:
    """Also beside a group that is open, which stays open."""
    groups = rows_of(seed, [3, *sizes], features, shift)
    pooled = PooledMoments.empty(features)
    pooled.update(groups[0], closes_group=False)
    pooled.update_whole(groups[1:])
    pooled.update(groups[0], closes_group=True)
    arrays = [torch.cat([groups[0], groups[0]]).numpy(), *(g.numpy() for g in groups[1:])]
    expected = reference.pooled_covariance(arrays)
    unit = max(np.trace(expected), np.finfo(float).tiny)
    assert np.abs(pooled.covariance.numpy() - expected).max() <= 1e-12 * unit + 1e-24 * shift
    assert (pooled.groups, pooled.tokens) == (len(arrays), sum(map(len, arrays)))


def test_merging_open_groups_is_refused_with_their_size() -> None:
    closed, still_open = PooledMoments.empty(3), PooledMoments.empty(3)
    closed.update(torch.ones(2, 3), closes_group=True)
    still_open.update(torch.ones(5, 3), closes_group=False)
    with pytest.raises(ValueError, match=r"0 and 5 tokens"):
        closed.merge(still_open)
    with pytest.raises(ValueError, match=r"5 and 0 tokens"):
        still_open.merge(closed)


def test_merged_groups_share_nothing_with_their_parts() -> None:
    a, b = PooledMoments.empty(3), PooledMoments.empty(3)
    for part, batch in zip((a, b), rows_of(2, [4, 6], 3, 1.0), strict=True):
        part.update(batch, closes_group=True)
    before = a.covariance.clone()
    merged = a.merge(b)
    merged.update(torch.randn(5, 3), closes_group=False)
    merged.update(torch.randn(5, 3), closes_group=True)
    assert merged.groups == 3
    assert a.open.tokens == b.open.tokens == 0
    assert torch.equal(a.covariance, before)


def test_closing_an_empty_group_counts_nothing() -> None:
    moments = PooledMoments.empty(3)
    moments.update(torch.empty(0, 3), closes_group=True)
    assert (moments.groups, moments.tokens) == (0, 0)
    assert torch.equal(moments.covariance, torch.zeros(3, 3, dtype=torch.float64))
