"""What every space owes a search: names, bounds, a constraint that is the budget, a best guess."""

import pytest
from hypothesis import given

from lrbo.accounting import dense_parameters
from lrbo.errors import BudgetError
from lrbo.optimization.base import Space
from tests.fakes import make_curves, make_layers, make_space, make_weight_space
from tests.test_space import Case, cases


def test_both_spaces_are_spaces() -> None:
    for space in (make_weight_space(), make_space()):
        assert isinstance(space, Space)
        assert list(space.bounds) == list(space.names)


@given(cases())
def test_bounds_and_constraint_say_what_points_keep(case: Case) -> None:
    space = case.space
    assert space.bounds == dict.fromkeys(space.names, (space.lower, space.upper))
    found = space.constraint
    assert list(found.weights) == list(space.names)
    point = space.sobol_point(4, 0)
    total = sum(weight * point[name] for name, weight in found.weights.items())
    if found.is_equality:
        assert total == pytest.approx(max(found.bound, space.lower), abs=1e-11)
    else:
        assert total <= found.bound
    # A point of the constraint is a share of the budget: counted in parameters.
    pinned = dense_parameters(spec for spec in space.layers if spec.name in space.dense)
    counted = sum(point[v.name] * v.dense_parameters for v in space.variables)
    searched = sum(v.dense_parameters for v in space.variables)
    assert counted / searched == pytest.approx(total, abs=1e-11)
    assert found.bound * searched + pinned == pytest.approx(space.budget.parameters)


@given(cases())
def test_the_analytic_allocation_has_least_loss_and_keeps_what_is_pinned(case: Case) -> None:
    space = case.space
    assert space.analytic() is None
    curves = make_curves(space.layers)
    known = space.with_curves(curves)
    found = known.analytic()
    assert found is not None
    allocation, point = found
    assert point == {}
    assert all(allocation.ranks[name] is None for name in space.dense)
    assert allocation.parameters <= space.budget.parameters

    def loss(ranks) -> float:
        return sum(curves[name][rank] for name, rank in ranks.items() if rank is not None)

    for index in range(3):
        other = known.allocate(known.sobol_point(index, 0))
        assert loss(allocation.ranks) <= loss(other.ranks) + 1e-9
    assert known.allocate(known.sobol_point(0, 0)) == space.allocate(space.sobol_point(0, 0))


@pytest.mark.parametrize("make", [make_space, make_weight_space])
def test_a_budget_below_the_smallest_ranks_says_what_came_and_what_to_do(make) -> None:
    layers = make_layers(1, {"q_proj": (20, 20), "v_proj": (20, 20)})
    changes = {"dense": ["v_proj"], "rank_multiple": 8}
    with pytest.raises(BudgetError) as caught:
        make(0.8, layers, **changes)
    message = str(caught.value)
    # The pinned layer's 400, and 8 * (20 + 20) with a bias of 20.
    for part in ("640 ", "(keep_ratio 0.8000)", "with 400 ", "least 340 ", "rank 8", "0.9250"):
        assert part in message, part
    assert "lower space." in message
    assert make(0.925, layers, **changes).budget.parameters == 740


@pytest.mark.parametrize("make", [make_space, make_weight_space])
def test_layers_smaller_than_the_step_of_ranks_are_dense(make) -> None:
    layers = make_layers(1, {"q_proj": (6, 30), "up_proj": (30, 30)})
    space = make(0.7, layers, rank_multiple=8, dense=[])
    space = space.with_curves(make_curves(layers))
    analytic = space.analytic()
    assert analytic is not None
    for found in (space.allocate(space.sobol_point(0, 0)), space.uniform(), analytic[0]):
        assert found.ranks == {"layers.0.q_proj": None, "layers.0.up_proj": 8}
    with pytest.raises(BudgetError, match=r"smallest feasible budget\.keep_ratio is 1\.0000"):
        make(0.9, layers, rank_multiple=31, dense=[])
