"""What every space owes a search: names, bounds, a constraint that is the budget, a best guess."""

import pytest
from hypothesis import given

from lrbo.errors import BudgetError
from lrbo.layers.options import DENSE
from lrbo.optimization.space import Space, sobol_point
from tests.optimization.test_ratios import Case, cases
from tests.optimization.test_thresholds import make as make_threshold_space
from tests.support.fakes import (
    make_curves,
    make_front_space,
    make_layers,
    make_space,
    make_weight_space,
    predicted,
)


@pytest.mark.parametrize(
    "make", [make_space, make_weight_space, make_front_space, make_threshold_space]
)
def test_every_space_is_a_space(make) -> None:
    space = make()
    assert isinstance(space, Space)
    assert list(space.bounds) == list(space.names)
    other = space.of(space.problem.keeping(0.75))
    assert (other.names, other.bounds) == (space.names, space.bounds)


@given(cases())
def test_bounds_and_constraint_say_what_points_keep(case: Case) -> None:
    space = case.space
    assert space.bounds == dict.fromkeys(space.names, tuple(case.changes["bounds"]))
    constraint = space.constraint
    assert list(constraint.weights) == list(space.names)
    point = sobol_point(space, 4, 0)
    total = sum(weight * point[name] for name, weight in constraint.weights.items())
    if constraint.is_equality:
        assert total == pytest.approx(max(constraint.bound, case.changes["bounds"][0]), abs=1e-11)
    else:
        assert total <= constraint.bound
    # A point of the constraint is a share of the budget, in its measure.
    units = {unit.name: unit for unit in case.layers}
    pinned = case.price(units[name] for name in space.problem.dense)
    sizes = {v: case.price(units[name] for name in names) for v, names in space.units.items()}
    counted = sum(point[name] * size for name, size in sizes.items())
    searched = sum(sizes.values())
    assert counted / searched == pytest.approx(total, abs=1e-11)
    assert constraint.bound * searched + pinned == pytest.approx(space.problem.budget.limit)


@given(cases())
def test_the_analytic_allocation_has_least_loss_and_keeps_what_is_pinned(case: Case) -> None:
    space = case.space
    assert space.starts("analytic") == []
    curves = make_curves(space.problem.units)
    predicted_space = space.of(predicted(space.problem, curves))
    (analytic,) = predicted_space.starts("analytic")
    allocation = analytic.allocation
    assert analytic.point == {}
    assert all(allocation.options[name] == DENSE for name in space.problem.dense)
    assert allocation.cost.of(case.offered["measure"]) <= space.problem.budget.limit

    def loss(options) -> float:
        return sum(curves[n][o.level[0]] for n, o in options.items() if o != DENSE)

    for index in range(3):
        other = predicted_space.allocate(sobol_point(predicted_space, index, 0))
        assert loss(allocation.options) <= loss(other.options) + 1e-9
    assert predicted_space.allocate(sobol_point(predicted_space, 0, 0)) == space.allocate(
        sobol_point(space, 0, 0)
    )


@pytest.mark.parametrize("make", [make_space, make_weight_space])
def test_a_budget_below_the_cheapest_options_says_what_came_and_what_to_do(make) -> None:
    layers = make_layers(1, {"q_proj": (20, 20), "v_proj": (20, 20)})
    changes = {"dense": ["v_proj"], "rank_multiple": 8}
    with pytest.raises(BudgetError) as caught:
        make(0.8, layers, **changes)
    message = str(caught.value)
    # The pinned layer's 400, and 8 * (20 + 20) with a bias of 20.
    for part in (
        "640 ",
        "(keep_ratio 0.8000)",
        "with 400 ",
        "least 340,",
        "cheapest options",
        "0.9250",
    ):
        assert part in message, part
    assert "lower space." in message
    assert make(0.925, layers, **changes).problem.budget.limit == 740


@pytest.mark.parametrize("make", [make_space, make_weight_space])
def test_units_smaller_than_the_step_of_ranks_are_dense(make) -> None:
    layers = make_layers(1, {"q_proj": (6, 30), "up_proj": (30, 30)})
    space = make(0.7, layers, rank_multiple=8, dense=[])
    space = space.of(predicted(space.problem, make_curves(layers)))
    for allocation in (
        space.allocate(sobol_point(space, 0, 0)),
        space.problem.uniform(),
        space.problem.by_loss(),
    ):
        texts = {name: str(option) for name, option in allocation.options.items()}
        assert texts == {"layers.0.q_proj": "dense", "layers.0.up_proj": "factored 8"}
    with pytest.raises(BudgetError, match=r"smallest feasible budget\.keep_ratio is 1\.0000"):
        make(0.9, layers, rank_multiple=31, dense=[])
