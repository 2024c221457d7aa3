"""Fixed, bounded and tied variables: every point is one of the whole space that keeps them."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog

from lrbo.errors import BudgetError, ConfigError
from lrbo.optimization.budgets import over_budgets
from lrbo.optimization.fixed_variables import RestrictedSpace, restrict
from lrbo.optimization.proposals import Observation, SearchClient
from lrbo.optimization.space import STARTS, Space, sobol_point
from tests.support.fakes import make_front_space, make_space, make_weight_space

TOLERANCES = {
    "constraint": 1e-6,  # of the optimizer of the acquisition function
    "budget": 1e-9,  # sums of shares times ratios in float64
    "nearest": 1e-7,  # of HiGHS, the solver that checks the projection
    "parameters": 2.0,  # budgets are whole numbers, and so are both ends of the constraint
}
both = pytest.mark.parametrize("kind", ["weights", "ratios"])


def whole_space(kind: str) -> Space:
    return make_space() if kind == "ratios" else make_weight_space()


def restricted(kind: str, variables: dict[str, Any], tied: Any = ()) -> RestrictedSpace:
    space = restrict(whole_space(kind), variables, tied)
    assert isinstance(space, RestrictedSpace)
    return space


CASES: dict[str, tuple[dict[str, Any], list[list[str]]]] = {
    "weights": ({"exponent": 0.25, "depth.*": (-0.2, 0.2)}, [["kind.q_proj", "kind.k_proj"]]),
    "ratios": ({"down": 0.9, "qk": (0.3, 0.5)}, [["o", "up"]]),
}


@both
def test_a_point_is_one_of_the_whole_space_that_keeps_what_is_set(kind: str) -> None:
    variables, tied = CASES[kind]
    space = restricted(kind, variables, tied)
    assert isinstance(space, Space)
    inside = space.inside
    (fixed,) = (name for name, value in variables.items() if isinstance(value, float))
    for index in range(8):
        point = sobol_point(space, index, seed=2)
        assert list(point) == list(space.names)
        assert set(point) == set(inside.names) - {fixed, tied[0][1]}
        assert all(low <= point[name] <= high for name, (low, high) in space.bounds.items())
        whole = {fixed: variables[fixed], tied[0][1]: point[tied[0][0]], **point}
        assert space.allocate(point) == inside.allocate(whole)
        assert set(space.realised(space.allocate(point), point)) == set(space.names)
        if inside.constraint is not None:
            assert space.constraint is not None
            for one, values in ((inside.constraint, whole), (space.constraint, point)):
                used = sum(weight * values[name] for name, weight in one.weights.items())
                assert used == pytest.approx(one.bound, abs=TOLERANCES["budget"])
    names = set(space.names)
    assert space.of(space.problem).names == space.names
    bounded = next(name for name, value in variables.items() if isinstance(value, tuple))
    hit = [name for name in names if name.startswith(bounded.rstrip("*"))]
    assert hit
    assert all(space.bounds[name] == variables[bounded] for name in hit)


@given(st.lists(st.floats(-1, 2), min_size=2, max_size=2))
def test_projection_is_the_nearest_point_of_what_is_left(wished: list[float]) -> None:
    """``p`` is nearest to ``w`` exactly if no allowed ``c`` has ``(w - p)(c - p) > 0``."""
    space = restricted("ratios", {"down": 0.8, "qk": (0.25, 0.6)}, [["o", "up"]])
    assert space.constraint is not None
    weights, bound = list(space.constraint.weights.values()), space.constraint.bound
    nearest = [*space.project(dict(zip(space.names, wished, strict=True))).values()]
    limits = list(space.bounds.values())
    assert all(low <= value <= high for value, (low, high) in zip(nearest, limits, strict=True))
    used = sum(w * v for w, v in zip(weights, nearest, strict=True))
    assert used == pytest.approx(bound, abs=TOLERANCES["budget"])
    away = [p - w for p, w in zip(nearest, wished, strict=True)]
    best = linprog(away, A_eq=[weights], b_eq=[bound], bounds=limits)
    assert best.success
    assert (
        sum(a * p for a, p in zip(away, nearest, strict=True)) <= best.fun + TOLERANCES["nearest"]
    )


@both
def test_the_surrogate_proposes_within_what_is_set(kind: str) -> None:
    variables, tied = CASES[kind]
    space = restricted(kind, variables, tied)
    observations = [Observation(sobol_point(space, i, 0), float(i % 3)) for i in range(6)]
    point = SearchClient(space, seed=0).ask(6, observations)
    assert set(point) == set(space.names)
    near = TOLERANCES["constraint"]
    for name, (low, high) in space.bounds.items():
        assert low - near <= point[name] <= high + near
    if space.constraint is not None:
        used = sum(weight * point[name] for name, weight in space.constraint.weights.items())
        assert used == pytest.approx(space.constraint.bound, abs=near)


def test_starts_stand_at_points_only_where_these_are_allowed() -> None:
    free = restricted("weights", {"exponent": (-0.1, 0.1)})
    shifted = restricted("weights", {"exponent": 0.25})
    for space, stands in ((free, True), (shifted, False)):
        uniform, analytic = space.warm_starts(STARTS)
        assert analytic.allocation == whole_space("weights").problem.by_loss()
        assert bool(analytic.point) == stands
        assert uniform.point == {}
    ratios = restricted("ratios", {"down": 0.9, "qk": (0.3, 0.5)})
    uniform, start = ratios.warm_starts(STARTS)
    assert uniform.allocation == whole_space("ratios").problem.uniform()
    assert uniform.point == {}
    assert start.origin == "start"
    assert 0.3 <= start.point["qk"] <= 0.5


@both
def test_a_front_keeps_what_is_set_at_every_budget(kind: str) -> None:
    front = make_front_space(kind, lowest=0.6)
    variables, tied = CASES[kind]
    inside = restrict(front.inside, variables, tied)
    space = over_budgets(inside, 0.6, 0.8)
    for index in range(6):
        point = sobol_point(space, index, seed=0)
        assert list(point) == [*inside.names, "keep_ratio"]
        used = space.allocate(point).cost.parameters
        assert used <= front.problem.keeping(point["keep_ratio"]).budget.limit
        if space.constraint is not None:
            total = sum(weight * point[name] for name, weight in space.constraint.weights.items())
            near = TOLERANCES["parameters"] / front.problem.dense_cost.parameters
            assert total == pytest.approx(space.constraint.bound, abs=near)


def test_nothing_set_is_the_space_itself() -> None:
    space = make_space()
    assert restrict(space, {}, []) is space


@pytest.mark.parametrize(
    ("variables", "tied", "messages"),
    [
        ({"qkx": 0.5}, [], [r"space.variables.qkx is no variable of the space: qk, o, up, down"]),
        ({"q*": 0.5, "qk": 0.6}, [], ["q\\* and qk contradict each other about qk"]),
        ({}, [["o", "nope"]], ["space.tied: nope is no variable"]),
        ({}, [["o", "up"], ["up", "down"]], ["up is in two lists"]),
        ({}, [["o", "up"], ["down", "o"]], ["o is in two lists"]),
        ({"o": 0.5}, [["o", "up"]], [r"bounds \[0.5, 0.5\] and \[0.2, 1.0\]"]),
        ({"*": 0.7}, [], ["every variable is fixed"]),
        ({"x": 0.1}, [["y"]], ["x is no variable", "y is no variable"]),
    ],
)
def test_what_cannot_be_set_is_named(variables: Any, tied: Any, messages: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        restricted("ratios", variables, tied)
    assert len(caught.value.problems) == len(messages)
    for message in messages:
        assert caught.match(message)


@pytest.mark.parametrize("variables", [{"qk": 0.2, "o": 0.2, "up": (0.2, 0.3)}, {"*": (0.8, 1.0)}])
def test_bounds_that_cannot_use_the_budget_are_refused(variables: Any) -> None:
    with pytest.raises(BudgetError, match=r"would have to keep .* but its bounds let it keep"):
        restricted("ratios", variables)
