"""The chosen windows say of allocations what all say: by definition, by search, by symmetry."""

import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lrbo.pipeline.choose_windows import select_windows

# Of sums of float64 numbers in another order.
ROUNDING = 1e-12


def draw(allocations: int, windows: int, seed: int) -> Tensor:
    """Draw losses: hard and easy windows, good and bad allocations, and what is their own."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    slopes = 1 + 0.3 * normal(windows)
    own = 0.05 * normal(windows).exp() * normal(allocations, windows)
    return 3 + normal(windows) + 0.1 * normal(allocations, 1) * slopes + own


def distance(losses: Tensor, windows: list[int]) -> float:
    """Return the summed squares of what differences between allocations are off by."""
    off = losses[:, windows].mean(1) - losses.mean(1)
    return float(((off - off.mean()) ** 2).sum())


@given(st.integers(2, 9), st.integers(1, 24), st.integers(0, 999), st.data())
@settings(max_examples=60, deadline=None)
def test_as_many_places_as_are_wanted_come_in_order_and_always_the_same(
    allocations: int, windows: int, seed: int, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, windows))
    losses = draw(allocations, windows, seed)
    indices = select_windows(losses, count)
    assert indices == sorted(set(indices))
    assert len(indices) == count
    assert set(indices) <= set(range(windows))
    assert select_windows(losses.clone(), count) == indices
    if count == windows:
        assert indices == list(range(windows))


@given(st.integers(0, 999))
@settings(max_examples=25, deadline=None)
def test_no_exchange_of_one_window_comes_nearer_to_what_all_windows_say(seed: int) -> None:
    losses = draw(5, 14, seed)
    indices = select_windows(losses, 5)
    reached = distance(losses, indices)
    for position, other in itertools.product(range(5), set(range(14)) - set(indices)):
        exchanged = [*indices[:position], other, *indices[position + 1 :]]
        assert distance(losses, exchanged) >= reached * (1 - 1e-6) - ROUNDING


@given(st.integers(0, 999), st.integers(2, 6))
@settings(max_examples=25, deadline=None)
def test_it_is_near_the_best_of_all_choices(seed: int, count: int) -> None:
    """Of 66 to 924 choices, found by trying all, at least 9 in 10 are worse."""
    losses = draw(5, 12, seed)
    every = [distance(losses, list(some)) for some in itertools.combinations(range(12), count)]
    reached = distance(losses, select_windows(losses, count))
    assert sum(other < reached - ROUNDING for other in every) <= 0.1 * len(every)


@given(st.integers(0, 999))
@settings(max_examples=25, deadline=None)
def test_how_hard_a_window_is_and_how_good_an_allocation_is_do_not_matter(seed: int) -> None:
    losses = draw(6, 16, seed)
    indices = select_windows(losses, 4)
    generator = torch.Generator().manual_seed(seed + 1)
    harder = losses + torch.randn(16, generator=generator, dtype=torch.float64)
    assert select_windows(harder, 4) == indices
    # What an allocation loses everywhere, every subset says.
    assert select_windows(losses + torch.arange(6)[:, None], 4) == indices
    order = torch.randperm(16, generator=generator)
    moved = select_windows(losses[:, order], 4)
    assert sorted(order[moved].tolist()) == indices
    rows = torch.randperm(6, generator=generator)
    assert select_windows(losses[rows], 4) == indices


def test_windows_that_differ_most_in_ways_of_their_own_are_not_taken() -> None:
    """Two windows differ most between allocations, in ways of their own that cancel out."""
    generator = torch.Generator().manual_seed(0)
    quality = torch.tensor([0.0, 0.1, 0.2, 0.4], dtype=torch.float64)[:, None]
    losses = quality + torch.randn(10, generator=generator, dtype=torch.float64)
    losses = losses + 0.01 * torch.randn((4, 10), generator=generator, dtype=torch.float64)
    loud = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    losses[:, 3] += loud
    losses[:, 7] -= 0.9 * loud
    assert set(losses.var(0).argsort(descending=True)[:2].tolist()) == {3, 7}
    for count in (1, 2, 4):
        assert {3, 7} & set(select_windows(losses, count)) == set()


def test_it_generalises_to_allocations_that_it_has_not_seen() -> None:
    """Against windows drawn at random, over many draws of everything."""
    mine, drawn = [], []
    for seed in range(40):
        losses = draw(24, 48, seed)
        indices = select_windows(losses[:8], 8)
        mine.append(distance(losses[8:], indices))
        drawn += [
            distance(
                losses[8:],
                torch.randperm(48, generator=torch.Generator().manual_seed(draw_))[:8].tolist(),
            )
            for draw_ in range(10)
        ]
    assert sum(mine) / len(mine) < 0.8 * sum(drawn) / len(drawn)


@pytest.mark.parametrize(
    ("shape", "count", "message"),
    [
        ((1, 4), 2, "1 allocations: at least 2 are needed"),
        ((3, 4), 5, "5 windows are wanted: expected 1 to 4"),
        ((3, 4), 0, "0 windows are wanted: expected 1 to 4"),
    ],
)
def test_what_cannot_be_chosen_is_refused(shape: tuple[int, int], count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_windows(torch.zeros(shape), count)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_losses_that_are_not_finite_are_refused(value: float) -> None:
    losses = draw(3, 4, 0)
    losses[1, 2] = value
    with pytest.raises(ValueError, match=re.escape("1 of 12 losses are not finite")):
        select_windows(losses, 2)


def test_allocations_that_do_not_differ_leave_the_first_windows() -> None:
    assert select_windows(torch.ones((3, 6)), 2) == [0, 1]
