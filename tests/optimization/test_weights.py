"""Weights around the analytic allocation: every point meets the budget, the origin is the optimum.

What a point distorts is checked against a plain formula, what is optimal by exchange arguments.
"""

import math
import re
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lrbo.accounting import dense_parameters
from lrbo.allocation import Allocation, Budget, allocate_by_loss, rungs
from lrbo.errors import BudgetError, ConfigError
from lrbo.optimization.weights import WeightSpace, build_weight_space
from lrbo.specs import LayerSpec
from tests.fakes import factored, make_curves, make_layers, make_space, make_weight_space

TOLERANCES = {
    "loss": 1e-9,  # sums of curves of order 1 in float64, and the solver's own rounding
}
KINDS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Case:
    """Arguments of a space.

    Attributes:
        layers: Of the model.
        changes: The other arguments.
        fullness: Places the budget between the smallest that can be met and dense.
        seed: Of the curves.
    """

    layers: list[LayerSpec]
    changes: dict
    fullness: float
    seed: int

    @property
    def smallest(self) -> int:
        """Return the smallest budget that the smallest ranks meet, layer by layer."""
        dense, minimum = self.changes["dense"], self.changes["minimum"]
        total = 0
        for spec in self.layers:
            offered = [
                price
                for rank, price in rungs(spec, factored, self.changes["rank_multiple"])
                if rank is None or rank >= minimum
            ]
            total += spec.parameters if spec.kind in dense else offered[0]
        return total

    def build(self, budget: int) -> WeightSpace:
        options = {"groups": {}, "width": 0.5, "cost": factored, **self.changes}
        space = build_weight_space(self.layers, Budget(budget), **options)
        return space.with_curves(make_curves(self.layers, self.seed))

    @property
    def space(self) -> WeightSpace:
        rest = dense_parameters(self.layers) - self.smallest
        return self.build(self.smallest + round(self.fullness * rest))


@st.composite
def cases(draw) -> Case:
    """Draw plain values only: the run-time type checks of lrbo must not run in a strategy."""
    side = st.integers(3, 20)
    changes = {
        "dense": draw(st.sampled_from([[], ["v_proj"], ["v_proj", "q_proj"]])),
        "knots": draw(st.sampled_from([0, 2, 3])),
        "exponent": draw(st.booleans()),
        "rank_multiple": draw(st.sampled_from([1, 2, 4])),
        "minimum": draw(st.sampled_from([0, 1, 3, 5])),
    }
    shapes = {kind: (draw(side), draw(side)) for kind in KINDS}
    layers = make_layers(draw(st.integers(1, 4)), shapes)
    return Case(layers, changes, draw(st.floats(0, 1)), draw(st.integers(0, 99)))


def point_of(space: WeightSpace, index: int) -> dict[str, float]:
    return space.sobol_point(index, 5)


def loss(space: WeightSpace, allocation: Allocation, names: list[str] | None = None) -> float:
    """Return the summed predicted loss of an allocation."""
    total = 0.0
    for name in space.curves if names is None else names:
        rank = allocation.ranks[name]
        total += 0.0 if rank is None else float(space.curves[name][rank])
    return total


def assert_keeps_its_promises(space: WeightSpace, allocation: Allocation) -> None:
    """The budget is met, no step is left that fits, pinned layers are dense, ranks are on offer."""
    assert list(allocation.ranks) == [spec.name for spec in space.layers]
    counted, steps = 0, []
    for spec in space.layers:
        rank = allocation.ranks[spec.name]
        ladder = rungs(spec, space.cost, space.rank_multiple)
        counted += dict(ladder)[rank]
        assert rank is None or rank >= space.minimum
        if rank is not None:
            steps += [after - now for (own, now), (_, after) in pairwise(ladder) if own == rank]
    assert counted == allocation.parameters
    assert 0 <= space.budget.parameters - counted < min(steps, default=10**9)
    assert all(allocation.ranks[name] is None for name in space.dense)


# --- points ------------------------------------------------------------------------------------


@given(cases(), st.integers(0, 40))
def test_every_point_keeps_the_promises_of_an_allocation(case: Case, index: int) -> None:
    space = case.space
    assert_keeps_its_promises(space, space.allocate(point_of(space, index)))


@given(cases())
def test_the_origin_is_the_analytic_allocation(case: Case) -> None:
    space = case.space
    found = space.analytic()
    assert found is not None
    allocation, origin = found
    assert origin == dict.fromkeys(space.names, 0.0)
    assert allocation == space.allocate(origin)
    expected = allocate_by_loss(
        space.curves,
        space.layers,
        space.budget,
        cost=space.cost,
        rank_multiple=space.rank_multiple,
        dense=space.dense,
        minimum=space.minimum,
    )
    assert allocation == expected


@given(cases(), st.integers(0, 40))
def test_no_point_predicts_less_loss_than_the_analytic_allocation(case: Case, index: int) -> None:
    space = case.space
    least, _ = space.analytic()
    other = space.allocate(point_of(space, index))
    assert loss(space, least) <= loss(space, other) + TOLERANCES["loss"]


@given(cases(), st.integers(0, 40))
def test_a_point_has_the_least_loss_of_curves_that_the_formula_distorts(
    case: Case, index: int
) -> None:
    space = case.space
    point = point_of(space, index)
    blocks = len({spec.block for spec in space.layers})
    distorted = {}
    for spec in space.layers:
        if spec.name in space.dense:
            continue
        weight = point[f"kind.{spec.kind}"]
        if space.knots:
            # Where the block stands between two knots, in steps from knot to knot.
            place = (space.knots - 1) * spec.block / max(blocks - 1, 1)
            low = min(int(place), space.knots - 2)
            ends = point[f"depth.{low}"], point[f"depth.{low + 1}"]
            weight += ends[0] + (place - low) * (ends[1] - ends[0])
        power = math.exp(point["exponent"]) if space.exponent else 1.0
        curve = space.curves[spec.name]
        distorted[spec.name] = np.array([math.exp(weight) * value**power for value in curve])
    expected = allocate_by_loss(
        distorted,
        space.layers,
        space.budget,
        cost=space.cost,
        rank_multiple=space.rank_multiple,
        dense=space.dense,
        minimum=space.minimum,
    )
    found = space.allocate(point)

    def price(allocation: Allocation) -> float:
        ranks = allocation.ranks.items()
        return sum(distorted[n][rank] for n, rank in ranks if rank is not None)

    # Ranks themselves may differ where rounding decides between equals.
    assert price(found) == pytest.approx(price(expected), abs=TOLERANCES["loss"])


@given(cases(), st.integers(0, 20), st.floats(-3, 3))
def test_a_constant_added_to_all_kinds_changes_nothing(
    case: Case, index: int, constant: float
) -> None:
    space = case.space
    point = point_of(space, index)
    moved = {name: v + constant * name.startswith("kind.") for name, v in point.items()}
    before, after = space.allocate(point), space.allocate(moved)
    # A scale may decide between selections whose losses are equal to rounding, and no others.
    assert loss(space, after) == pytest.approx(loss(space, before), abs=TOLERANCES["loss"])
    if space.knots:
        deep = {name: v + constant * name.startswith("depth.") for name, v in point.items()}
        found = space.allocate(deep)
        assert loss(space, found) == pytest.approx(loss(space, before), abs=TOLERANCES["loss"])


@given(cases(), st.integers(0, 20), st.floats(0.01, 3), st.sampled_from(KINDS))
def test_a_larger_weight_of_a_kind_never_gives_it_fewer_parameters(
    case: Case, index: int, more: float, kind: str
) -> None:
    """Two optima, exchanged: the kind's own loss cannot rise with its weight.

    Nor then can its parameters fall: fewer of them with less loss would have been better before.
    Where curves are flat, the rest of the budget goes to anybody; these here fall strictly.
    """
    space = case.space
    variable = f"kind.{kind}"
    if variable not in space.names:
        return
    specs = [spec for spec in space.layers if spec.kind == kind]

    def kept(point: dict[str, float]) -> int:
        ranks = space.allocate(point).ranks
        return sum(dict(rungs(s, factored, space.rank_multiple))[ranks[s.name]] for s in specs)

    point = point_of(space, index)
    assert kept(point) <= kept(point | {variable: point[variable] + more})


@given(cases(), st.integers(0, 20))
def test_depth_and_exponent_of_nothing_are_left_out(case: Case, index: int) -> None:
    """Knots at 0 and the exponent at 0 are a space without them."""
    space = case.space
    kinds = {n: v for n, v in point_of(space, index).items() if n.startswith("kind.")}
    plain = Case(
        case.layers, case.changes | {"knots": 0, "exponent": False}, case.fullness, case.seed
    )
    assert plain.space.names == tuple(kinds)
    rest = dict.fromkeys(set(space.names) - set(kinds), 0.0)
    assert space.allocate(kinds | rest) == plain.space.allocate(kinds)


def test_rounding_in_curves_decides_nothing() -> None:
    """A tail of rounding, below 0 or rising, has no power and must not be magnified by one."""
    layers = make_layers()
    clean = make_curves(layers)
    noisy = {name: curve.copy() for name, curve in clean.items()}
    for curve in noisy.values():
        curve[-2:] = -1e-9 * curve[0], 1e-9 * curve[0]
    flat = {name: np.append(curve[:-2], [0.0, 0.0]) for name, curve in clean.items()}
    for exponent in (-0.5, 0.0, 0.5):
        found, expected = (
            make_weight_space(0.7, layers, curves).allocate(
                dict.fromkeys(make_weight_space().names, 0.0) | {"exponent": exponent}
            )
            for curves in (noisy, flat)
        )
        assert found == expected


# --- the space itself --------------------------------------------------------------------------


def test_without_groups_each_kind_of_the_model_is_one() -> None:
    space = make_weight_space(dense=["v_proj"])
    kinds = [f"kind.{k}" for k in ("q_proj", "k_proj", "o_proj", "up_proj", "down_proj")]
    assert space.names == (*kinds, "depth.0", "depth.1", "depth.2", "exponent")
    assert space.dense == ("layers.0.v_proj", "layers.1.v_proj")
    assert space.bounds == dict.fromkeys(space.names, (-0.5, 0.5))
    assert space.constraint is None
    assert space.start_point() is None


def test_groups_share_a_weight() -> None:
    groups = {"attention": ["?_proj", "*.[qkvo]_proj"], "rest": ["*"]}
    space = make_weight_space(groups=groups, knots=0, exponent=False)
    assert space.names == ("kind.attention", "kind.rest")
    assert {space.groups[f"layers.1.{kind}"] for kind in ("q_proj", "o_proj")} == {"attention"}
    single = make_weight_space(knots=0, exponent=False)
    point = {"kind.attention": 0.4, "kind.rest": -0.2}
    attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    each = {n: 0.4 if n.removeprefix("kind.") in attention else -0.2 for n in single.names}
    assert space.allocate(point) == single.allocate(each)


@given(cases(), st.integers(0, 40), st.integers(0, 10**6))
def test_sobol_points_are_in_bounds_and_depend_on_index_and_seed_only(
    case: Case, index: int, seed: int
) -> None:
    space = case.space
    point = space.sobol_point(index, seed)
    assert list(point) == list(space.names)
    assert all(low <= point[name] <= high for name, (low, high) in space.bounds.items())
    torch.manual_seed(index)
    before = torch.random.get_rng_state()
    assert case.space.sobol_point(index, seed) == point
    assert torch.equal(torch.random.get_rng_state(), before)


def test_sobol_points_fill_the_box() -> None:
    space = make_weight_space()
    points = torch.tensor([list(space.sobol_point(i, 0).values()) for i in range(64)])
    for quadrant in (points < 0, points > 0):
        assert (quadrant.sum(0) >= 24).all()
    assert not torch.equal(points[0], torch.tensor(list(space.sobol_point(0, 1).values())))


@given(st.data())
def test_projection_clamps(data) -> None:
    space = make_weight_space()
    size = len(space.names)
    values = data.draw(st.lists(st.floats(-2, 2), min_size=size, max_size=size))
    found = space.project(values)
    assert found == [float(v) for v in np.clip(values, -0.5, 0.5)]
    assert space.project(found) == found


def test_what_was_evaluated_is_the_point_itself_and_the_baseline_has_none() -> None:
    space = make_weight_space()
    point = point_of(space, 3)
    assert space.realised(space.allocate(point), point) == point
    assert space.realised(space.uniform(), {}) is None


def test_the_uniform_baseline_is_that_of_ratios() -> None:
    """Studies of both kinds of space compare with the same trial."""
    assert make_weight_space(0.6).uniform() == make_space(0.6).uniform()
    pinned = make_weight_space(0.6, dense=["v_proj"], minimum=5)
    assert pinned.uniform() == make_space(0.6).uniform()


def test_layers_without_curves_stay_dense() -> None:
    """As those that are too small for any low-rank form."""
    layers = make_layers()
    curves = dict(make_curves(layers))
    missing = [s.name for s in layers if s.kind == "k_proj"]
    for name in missing:
        del curves[name]
    space = make_weight_space(0.8, layers, curves)
    allocation = space.allocate(point_of(space, 0))
    assert all(allocation.ranks[name] is None for name in missing)
    assert allocation.parameters <= space.budget.parameters


def test_without_any_curves_nothing_can_be_allocated() -> None:
    space = make_weight_space(curves={})
    with pytest.raises(ValueError, match="no loss curves; calibrate with output gradients"):
        space.allocate(point_of(space, 0))


# --- what cannot be searched -------------------------------------------------------------------


@given(cases())
def test_an_infeasible_budget_names_the_smallest_keep_ratio(case: Case) -> None:
    with pytest.raises(BudgetError) as caught:
        case.build(case.smallest - 1)
    message = str(caught.value)
    assert message.endswith("or lower space.minimum_rank or space.rank_multiple.")
    stated = re.search(r"smallest feasible budget.keep_ratio is (\d\.\d{4})", message)
    assert stated is not None
    budget = Budget.from_keep_ratio(case.layers, float(stated[1]))
    space = case.build(budget.parameters)
    assert_keeps_its_promises(space, space.allocate(point_of(space, 0)))
    below = Budget.from_keep_ratio(case.layers, round(float(stated[1]) - 1e-4, 4)).parameters
    assert below < case.smallest
    with pytest.raises(BudgetError):
        case.build(below)


@given(cases())
def test_the_smallest_budget_of_all_can_be_searched(case: Case) -> None:
    space = case.build(case.smallest)
    assert_keeps_its_promises(space, space.allocate(point_of(space, 1)))


def test_layers_of_no_group_are_all_listed() -> None:
    with pytest.raises(ConfigError) as caught:
        make_weight_space(groups={"qk": ["q_proj", "k_proj"]}, dense=["v_proj", "o_proj"])
    problems = caught.value.problems
    assert len(problems) == 4
    for block in range(2):
        for kind in ("up_proj", "down_proj"):
            assert any(f"layers.{block}.{kind}" in problem for problem in problems)


def test_nothing_left_to_search_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing is left to search"):
        make_weight_space(dense=["*"])
