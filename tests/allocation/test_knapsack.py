"""The knapsack against every selection there is, and its proof against what it claims."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lrbo.allocation import knapsack

# Losses that are small integers sum without rounding: there everything must be equal.
# Other losses: sums of a few float64 in two orders.
ROUNDING = 1e-13

Table = list[list[tuple[int, float]]]  # per layer (cost, loss) of each choice

whole = st.integers(0, 12).map(float)
real = st.builds(lambda x, e: x * 10.0**e, st.floats(0.0, 1.0), st.integers(-6, 6))


def tables(loss) -> st.SearchStrategy[Table]:
    """Draw layers with arbitrary choices: dominated, equal, convex or not."""
    size = st.one_of(st.integers(1, 6), st.integers(1, 10_000))
    return st.lists(st.lists(st.tuples(size, loss), min_size=1, max_size=6), min_size=1, max_size=5)


def solve(table: Table, ceiling: int, **options: int) -> knapsack.Solution:
    sizes = [np.array([size for size, _ in choices]) for choices in table]
    losses = [np.array([loss for _, loss in choices], dtype=float) for choices in table]
    return knapsack.solve(sizes, losses, ceiling, **options)


def brute(table: Table, ceiling: int) -> tuple[float, int]:
    """Return the least loss, and the least cost of those that have it."""
    return min(
        (math.fsum(loss for _, loss in selection), sum(size for size, _ in selection))
        for selection in itertools.product(*table)
        if sum(size for size, _ in selection) <= ceiling
    )


def ceiling_of(table: Table, fullness: float) -> int:
    least = sum(min(size for size, _ in choices) for choices in table)
    most = sum(max(size for size, _ in choices) for choices in table)
    return least + round(fullness * (most + 2 - least))


def consistent(solution: knapsack.Solution, table: Table, ceiling: int) -> None:
    selection = [choices[index] for choices, index in zip(table, solution.choices, strict=True)]
    assert solution.cost == sum(size for size, _ in selection) <= ceiling
    assert solution.loss == math.fsum(loss for _, loss in selection)
    assert solution.multiplier >= 0.0
    assert solution.gap == solution.loss - solution.bound >= 0.0


fullnesses = st.one_of(st.just(0.0), st.just(1.0), st.floats(0.0, 1.0))


@given(tables(whole), fullnesses)
@settings(max_examples=300)
def test_equals_every_selection_tried(table: Table, fullness: float) -> None:
    ceiling = ceiling_of(table, fullness)
    solution = solve(table, ceiling)
    consistent(solution, table, ceiling)
    assert (solution.loss, solution.cost) == brute(table, ceiling)
    assert solution.gap == 0.0


@given(tables(real), fullnesses)
@settings(max_examples=300)
def test_equals_every_selection_tried_with_losses_of_all_sizes(
    table: Table, fullness: float
) -> None:
    ceiling = ceiling_of(table, fullness)
    solution = solve(table, ceiling)
    consistent(solution, table, ceiling)
    best, _ = brute(table, ceiling)
    scale = math.fsum(max(loss for _, loss in choices) for choices in table)
    assert abs(solution.loss - best) <= ROUNDING * scale
    assert solution.gap == 0.0


@given(tables(whole), fullnesses, st.integers(1, 200))
@example([[(7, 5.0), (10, 0.0)], [(7, 5.0), (11, 0.0)]], 0.3, 1)
def test_whatever_it_leaves_out_its_gap_covers(table: Table, fullness: float, states: int) -> None:
    ceiling = ceiling_of(table, fullness)
    solution = solve(table, ceiling, states=states)
    consistent(solution, table, ceiling)
    best, cheapest = brute(table, ceiling)
    assert solution.bound <= best + ROUNDING * max(1.0, best)
    assert solution.loss >= best
    if solution.gap == 0.0:
        assert (solution.loss, solution.cost) == (best, cheapest)


def test_large_steps_beside_small_ones_are_proven_in_parts(monkeypatch) -> None:
    """A layer with one huge step is all or nothing, which the bound of the whole cannot see."""
    random = np.random.default_rng(0)
    table = [[(8, 40.0 + number), (1_000_000 + 8 * number, 0.0)] for number in range(3)]
    table += [
        [
            (8 * int(k * size + random.integers(0, 9)), random.uniform(0.5, 1.0) * 0.9**k)
            for k in range(1, 60)
        ]
        for size in random.integers(1, 40, 30)
    ]
    searched = []
    search = knapsack._search
    monkeypatch.setattr(knapsack, "_search", lambda *part: searched.append(part) or search(*part))
    whole = solve(table, 2_000_000)
    assert len(searched) == 1
    parts = solve(table, 2_000_000, states=4_096)
    assert len(searched) > 3
    assert (whole.gap, parts.gap) == (0.0, 0.0)
    assert parts.choices == whole.choices


def test_a_search_that_is_cut_short_says_so() -> None:
    """A subset sum of large numbers: no bound tells its selections apart."""
    sizes = np.random.default_rng(0).integers(10**8, 10**9, 40)
    table = [[(0, float(size)), (int(size), 0.0)] for size in sizes]
    ceiling = int(sizes.sum()) // 2
    short, long = solve(table, ceiling, states=2_000), solve(table, ceiling, states=200_000)
    for solution in (short, long):
        consistent(solution, table, ceiling)
        assert 0.0 < solution.gap < 1e-2 * solution.loss
    assert long.gap < short.gap
    assert max(short.bound, long.bound) <= min(short.loss, long.loss)


@given(tables(whole), fullnesses, st.integers(0, 500))
def test_a_larger_ceiling_never_loses_more(table: Table, fullness: float, more: int) -> None:
    ceiling = ceiling_of(table, fullness)
    assert solve(table, ceiling + more).loss <= solve(table, ceiling).loss


@given(tables(whole), fullnesses, st.sampled_from([0.25, 3.0, 1024.0, 1e6]))
def test_a_common_factor_of_the_losses_changes_no_optimum(
    table: Table, fullness: float, factor: float
) -> None:
    ceiling = ceiling_of(table, fullness)
    scaled = [[(size, factor * loss) for size, loss in choices] for choices in table]
    before, after = solve(table, ceiling), solve(scaled, ceiling)
    assert (after.loss, after.cost) == (factor * before.loss, before.cost)
    assert math.isclose(after.multiplier, factor * before.multiplier, rel_tol=1e-12)


@given(tables(whole), fullnesses, st.randoms(use_true_random=False))
def test_order_of_layers_and_choices_changes_no_optimum(
    table: Table, fullness: float, chooser
) -> None:
    ceiling = ceiling_of(table, fullness)
    shuffled = [chooser.sample(choices, len(choices)) for choices in table]
    chooser.shuffle(shuffled)
    before, after = solve(table, ceiling), solve(shuffled, ceiling)
    assert (after.loss, after.cost) == (before.loss, before.cost)
    assert solve(table, ceiling) == before


@given(tables(whole))
def test_the_border_of_what_fits(table: Table) -> None:
    least = ceiling_of(table, 0.0)
    assert solve(table, least).cost == least
    with pytest.raises(ValueError, match=f"{len(table)} layers cost {least:_}, above"):
        solve(table, least - 1)


def test_nothing_to_choose() -> None:
    solution = knapsack.solve([], [], 5)
    assert solution == knapsack.Solution((), 0.0, 0, 0.0, 0.0)
    assert solve([[(3, 1.0)], [(4, 2.0)]], 100) == knapsack.Solution((0, 0), 3.0, 7, 3.0, 0.0)


def test_where_everything_fits_the_smallest_of_the_best_is_taken() -> None:
    solution = solve([[(1, 2.0), (5, 0.0), (9, 0.0)]], 100)
    assert solution == knapsack.Solution((1,), 0.0, 5, 0.0, 0.0)


def test_the_multiplier_is_the_saving_per_cost() -> None:
    """Savings per cost are 4, 2, 1; two steps of 10 fit, the third would be the next."""
    solution = solve([[(0, 70.0), (10, 30.0), (20, 10.0), (30, 0.0)]], 25)
    assert (solution.choices, solution.multiplier) == ((2,), 1.0)


@pytest.mark.parametrize(
    ("sizes", "losses", "message"),
    [
        ([[1, 2]], [[1.0, math.nan]], "layer 0: 1 of 2 losses are not finite"),
        ([[1, 2]], [[math.inf, -math.inf]], "layer 0: 2 of 2 losses are not finite"),
    ],
)
def test_what_is_no_problem_is_refused(sizes: list, losses: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        knapsack.solve(
            [np.array(own, dtype=np.int64) for own in sizes],
            [np.array(own, dtype=np.float64) for own in losses],
            10,
        )


@pytest.mark.parametrize("form", ["factored", "pivoted"])
@pytest.mark.parametrize("keep", [0.9, 0.5])
def test_a_model_of_many_layers_is_solved_with_a_proof(form: str, keep: float) -> None:
    """56 layers of Llama's shapes at ranks in steps of 64; the optimum beats a plain greedy."""
    random = np.random.default_rng(0)
    sizes, losses = [], []
    for out, into in [(4096, 4096)] * 32 + [(11008, 4096)] * 24:
        ranks = np.arange(64, 4097, 64)
        price = ranks * (out + into) - (ranks**2 if form == "pivoted" else 0)
        low = price < out * into
        spectrum = np.arange(1, 4097) ** -random.uniform(0.3, 2.5)
        tail = np.append(np.cumsum(spectrum[::-1])[::-1], 0.0)[ranks] / spectrum.sum()
        sizes.append(np.append(price[low], out * into))
        losses.append(np.append(tail[low] * random.uniform(0.01, 1.0), 0.0))
    ceiling = int(keep * sum(int(own[-1]) for own in sizes))
    solution = knapsack.solve(sizes, losses, ceiling)
    assert solution.gap == 0.0
    assert solution.cost <= ceiling
    relaxed = min_over_multipliers(sizes, losses, ceiling, solution.multiplier)
    assert relaxed <= solution.loss <= relaxed + 1e-3


def min_over_multipliers(sizes: list, losses: list, ceiling: int, multiplier: float) -> float:
    """Return the Lagrangian bound at a multiplier, as the formula is printed."""
    least = [
        (own_loss + multiplier * own).min() for own, own_loss in zip(sizes, losses, strict=True)
    ]
    return math.fsum(least) - multiplier * ceiling
