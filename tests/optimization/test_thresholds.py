"""One threshold for all units: of each the cheapest option within it, and budgets by bisection."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from lrbo.config.choices import THRESHOLD
from lrbo.errors import BudgetError, ConfigError
from lrbo.layers.options import DENSE, Option, Section
from lrbo.optimization.space import sobol_point
from lrbo.optimization.thresholds import ThresholdSpace, build_threshold_space
from lrbo.optimization.variables import SpaceSettings
from tests.support.fakes import make_layers, make_problem

SHAPES = {"q_proj": (32, 32), "v_proj": (16, 32), "up_proj": (64, 32), "down_proj": (32, 64)}
FORMS = ("factored_int4", "int4", "int8")
LOWEST, HIGHEST = 0.08, 0.25


def errors(section: Section, seed: int) -> NDArray[np.float64]:
    """Draw errors that fall with the level, small ones of integers."""
    generator = np.random.default_rng([seed, len(section.form), len(section.levels)])
    falling = np.sort(generator.uniform(0.05, 0.9, len(section.levels)))[::-1]
    return falling * {"int4": 0.2, "int8": 0.01}.get(section.form, 1.0)


def make(dense: Sequence[str] = (), *, lowest: float = LOWEST) -> ThresholdSpace:
    problem = make_problem(
        HIGHEST, make_layers(2, SHAPES), forms=FORMS, bias=False, measure="bytes"
    )
    settings = SpaceSettings(bounds=[0.001, 0.95], dense=dense)
    space = build_threshold_space(problem, settings, lowest)
    graded = {
        name: menu.with_losses([errors(section, seed) for section in menu.sections[:-1]])
        for seed, (name, menu) in enumerate(space.problem.menus.items())
    }
    return replace(space, graded=graded)


def test_only_thresholds_that_give_sizes_of_the_budgets_are_searched() -> None:
    """Beyond them a threshold changes nothing, and trials would be scored again."""
    space = make()
    informed = space.within_budgets()
    least, most = informed.bounds[THRESHOLD]
    assert (least, most) == informed.limits
    assert 0.001 < least < most < 0.95
    ends = [informed.allocate({THRESHOLD: each}).options for each in (least, most)]
    assert [informed.allocate({THRESHOLD: x}).options for x in (0.001, 0.95)] == ends
    with pytest.raises(ConfigError, match="expected some of the thresholds that give sizes"):
        replace(space, bounds={THRESHOLD: (0.001, least / 2)}).within_budgets()


def options_of(space: ThresholdSpace, name: str) -> list[tuple[int, float, Option]]:
    """Return price in bytes, error and option of all that a unit may become but dense."""
    menu = space.graded[name]
    assert menu.losses is not None
    return [
        (menu.cost(i).bytes, float(menu.losses[i]), menu.option(i)) for i in range(len(menu) - 1)
    ]


def plainly(space: ThresholdSpace, threshold: float) -> dict[str, Option]:
    """Choose one by one: the cheapest within the threshold, else the closest."""
    chosen = {}
    for name in space.graded:
        options = options_of(space, name)
        within = [each for each in options if each[1] <= threshold]
        best = min(within) if within else min(options, key=lambda each: each[1])
        chosen[name] = DENSE if name in space.problem.dense else best[2]
    return chosen


def size(space: ThresholdSpace, options: dict[str, Option]) -> int:
    menus = space.graded
    return sum(menus[name].cost(menus[name].index(each)).bytes for name, each in options.items())


def thresholds(space: ThresholdSpace) -> list[float]:
    """Return all at which an option comes within the threshold, and one below all of them."""
    names = [name for name in space.graded if name not in space.problem.dense]
    return sorted({0.0, *(each[1] for name in names for each in options_of(space, name))})


@pytest.mark.parametrize("dense", [[], ["v_proj"]])
def test_a_unit_is_the_cheapest_option_within_the_threshold_or_the_closest(
    dense: list[str],
) -> None:
    space = make(dense, lowest=0.15 if dense else LOWEST)
    least, most = (
        space.meeting(space.problem.keeping(ratio).budget) for ratio in (HIGHEST, space.lowest)
    )
    assert 0.0 < least < most
    sizes = []
    for threshold in np.linspace(least, most, 40):
        point = {THRESHOLD: float(threshold)}
        allocation = space.allocate(point)
        assert dict(allocation.options) == plainly(space, float(threshold))
        assert space.realised(allocation, point) == point
        assert allocation.cost.bytes <= space.problem.budget.limit
        sizes.append(allocation.cost.bytes)
    assert all(more >= less for more, less in pairwise(sizes))
    assert len(set(sizes)) > 10


def test_a_budget_is_met_by_the_smallest_threshold_that_does() -> None:
    space = make()
    for ratio in (0.25, 0.2, 0.14, 0.09):
        budget = space.problem.keeping(ratio).budget
        fitting = [t for t in thresholds(space) if size(space, plainly(space, t)) <= budget.limit]
        assert space.meeting(budget) == fitting[0]


def test_thresholds_of_other_sizes_are_moved_to_the_budgets() -> None:
    space = make()
    least, most = (
        space.meeting(space.problem.keeping(ratio).budget) for ratio in (HIGHEST, LOWEST)
    )
    for given, actual in ((0.001, least), (0.95, most)):
        allocation = space.allocate({THRESHOLD: given})
        assert dict(allocation.options) == plainly(space, actual)
        assert space.realised(allocation, {THRESHOLD: given}) == {THRESHOLD: actual}
    assert space.realised(allocation, {}) == {}


def test_it_starts_with_thresholds_and_baselines_at_several_budgets() -> None:
    space = make()
    starts, uniform = space.starts("start"), space.starts("uniform")
    assert [each.origin for each in starts] == ["start"] * 4
    assert space.starts("analytic") == []  # nothing is predicted
    limits = [space.problem.keeping(ratio).budget for ratio in (0.25, 0.1933, 0.1367, 0.08)]
    for each, baseline, budget in zip(starts, uniform, limits, strict=True):
        assert each.allocation.budget == baseline.allocation.budget == budget
        assert each.allocation.cost.bytes <= budget.limit
        assert each.point == {THRESHOLD: space.meeting(budget)}
        assert baseline.point == {}
    assert sobol_point(space, 3, 0).keys() == {THRESHOLD}


def test_nothing_is_chosen_before_errors_are_known() -> None:
    problem = make_problem(0.25, make_layers(1, SHAPES), forms=FORMS, measure="bytes")
    space = build_threshold_space(problem, SpaceSettings(bounds=[0.1, 0.9]), 0.2)
    with pytest.raises(ValueError, match="no errors are known yet"):
        space.allocate({THRESHOLD: 0.5})
    with pytest.raises(BudgetError, match="cannot be met"):
        build_threshold_space(problem, SpaceSettings(bounds=[0.1, 0.9]), 0.001)
    with pytest.raises(ConfigError, match="every layer is kept dense"):
        build_threshold_space(problem, SpaceSettings(bounds=[0.1, 0.9], dense=["*"]), 0.2)
