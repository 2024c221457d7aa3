"""Variables and ratios: every point keeps bounds and budget, and options stand for a point."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog

from lrbo.allocation.allocate import smallest_cost
from lrbo.errors import BudgetError, ConfigError
from lrbo.layers.options import DENSE, MEASURES, Budget
from lrbo.models.specs import LayerSpec, ModelMap
from lrbo.optimization.space import Problem, sobol_point
from lrbo.optimization.variables import RatioSpace, SpaceSettings, build_ratio_space
from tests.support.fakes import GROUPS, ITEMSIZE, make_layers, make_problem, make_space

TOLERANCES = {
    "budget": 1e-12,  # a sum of shares times ratios in float64, all of order 1
    "nearest": 1e-7,  # of HiGHS, the solver that checks the projection
    "ratio": 1e-12,  # a quotient of integers
}
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
FIRST = ["layers.0.*"]


@dataclass(frozen=True)
class Case:
    """Arguments of a space.

    Attributes:
        layers: Of the model.
        offered: What the menus are made of, and the measure of the budget.
        changes: The other arguments.
        fullness: Places the budget between the smallest that can be met and dense.
    """

    layers: list[LayerSpec]
    offered: dict
    changes: dict
    fullness: float

    def price(self, units: Iterable[LayerSpec]) -> int:
        """Return what dense units cost, by their shapes."""
        size = sum(unit.out_features * unit.in_features for unit in units)
        return size * ITEMSIZE if self.offered["measure"] == "bytes" else size

    @property
    def whole(self) -> Problem:
        """Return the problem of the whole budget."""
        return make_problem(1.0, self.layers, **self.offered)

    @property
    def smallest(self) -> int:
        """Return the smallest budget that bounds and options can meet, with integers alone."""
        dense, lower = self.changes["dense"], round(100 * self.changes["bounds"][0])
        pinned = [s for s in self.layers if s.kind in dense or (s.block == 0 and dense == FIRST)]
        fixed, total = self.price(pinned), self.price(self.layers)
        at_bounds = fixed - (-lower * (total - fixed) // 100)  # rounded up
        cheapest = smallest_cost(
            self.whole.menus, self.offered["measure"], [spec.name for spec in pinned]
        )
        return max(at_bounds, cheapest)

    def build(self, limit: int) -> RatioSpace:
        budget = Budget(self.offered["measure"], limit)
        return build_ratio_space(replace(self.whole, budget=budget), SpaceSettings(**self.changes))

    @property
    def space(self) -> RatioSpace:
        rest = self.price(self.layers) - self.smallest
        return self.build(self.smallest + round(self.fullness * rest))


@st.composite
def cases(draw) -> Case:
    """Draw plain values only: the run-time type checks of lrbo must not run in a strategy."""
    side = st.integers(3, 30)
    blocks = draw(st.integers(1, 4))
    pins = [["v_proj"], [], ["v_proj", "o_proj"]] + ([FIRST] if blocks > 1 else [])
    changes = {
        "groups": {**GROUPS, "v": ["v_proj"]},
        "dense": draw(st.sampled_from(pins)),
        "granularity": draw(st.sampled_from(["kind", "depth", "layer"])),
        "depth_groups": draw(st.integers(1, 5)),
        "bounds": [
            draw(st.sampled_from([0.05, 0.07, 0.2, 0.57])),
            draw(st.sampled_from([0.8, 1.0])),
        ],
        "start": draw(st.sampled_from([{}, {"qk": 0.3}, {"qk": [0.2, 0.9, 0.4], "down": 1.0}])),
    }
    offered = {
        "forms": draw(st.sampled_from([("factored",), ("pivoted",), ("pivoted", "factored")])),
        "bias": draw(st.booleans()),
        "rank_multiple": draw(st.sampled_from([1, 2, 4])),
        "measure": draw(st.sampled_from(MEASURES)),
    }
    shapes = {kind: (draw(side), draw(side)) for kind in KINDS}
    return Case(make_layers(blocks, shapes), offered, changes, draw(st.floats(0, 1)))


def used(space: RatioSpace, point: Mapping[str, float]) -> float:
    return sum(share * point[name] for name, share in space.shares.items())


def assert_keeps_bounds_and_budget(space: RatioSpace, point: Mapping[str, float]) -> None:
    assert list(point) == list(space.names)
    lower, upper = space.bounds[space.names[0]]
    assert all(lower <= value <= upper for value in point.values())
    # At the smallest budget of all, integers leave the lower bounds a fraction of a parameter.
    room = max(space.room, lower)
    assert used(space, point) <= room + TOLERANCES["budget"]
    assert used(space, point) == pytest.approx(min(room, upper), abs=10 * TOLERANCES["budget"])


@given(cases(), st.integers(0, 40), st.integers(0, 10**6))
def test_sobol_points_keep_bounds_and_budget(case: Case, index: int, seed: int) -> None:
    space = case.space
    assert_keeps_bounds_and_budget(space, sobol_point(space, index, seed))


@given(cases())
def test_the_start_point_keeps_bounds_and_budget(case: Case) -> None:
    space = case.space
    point = space.start_point()
    assert bool(point) == bool(case.changes["start"])
    if point:
        assert_keeps_bounds_and_budget(space, point)


@given(cases(), st.data())
def test_projection_is_the_nearest_point_of_the_budget_plane(case: Case, data) -> None:
    """``p`` is nearest to ``w`` exactly if no feasible ``c`` has ``(w - p)(c - p) > 0``."""
    space = case.space
    size = len(space.names)
    wished = data.draw(st.lists(st.floats(-2, 3), min_size=size, max_size=size))
    point = space.project(dict(zip(space.names, wished, strict=True)))
    assert_keeps_bounds_and_budget(space, point)
    nearest = [*point.values()]
    slope = [w - p for w, p in zip(wished, nearest, strict=True)]
    best = linprog(
        [-value for value in slope],
        A_eq=[[*space.shares.values()]],
        b_eq=[used(space, point)],
        bounds=case.changes["bounds"],
    )
    assert best.success
    gain = -best.fun - sum(s * p for s, p in zip(slope, nearest, strict=True))
    assert gain <= TOLERANCES["nearest"] * (1 + size)


@given(cases(), st.integers(0, 20))
def test_projection_leaves_a_point_of_the_plane_alone(case: Case, index: int) -> None:
    space = case.space
    point = sobol_point(space, index, 3)
    assert space.project(point) == pytest.approx(point, abs=1e-9)


@given(cases(), st.integers(0, 40))
def test_the_allocation_of_any_point_uses_the_budget_up(case: Case, index: int) -> None:
    space = case.space
    allocation = space.allocate(sobol_point(space, index, 0))
    assert list(allocation.options) == [spec.name for spec in case.layers]
    budget = space.problem.budget
    rest = budget.limit - allocation.cost.of(budget.measure)
    steps = []
    for name, menu in space.problem.menus.items():
        ladder = menu.ladder(budget.measure, menu.losses)
        options = [menu.option(int(index)) for index in ladder.indices]
        rung = options.index(allocation.options[name])
        steps += [int(price) for price in np.diff(ladder.prices)[rung : rung + 1]]
    assert 0 <= rest < min(steps, default=10**9)
    for name in space.problem.dense:
        assert allocation.options[name] == DENSE


@given(cases(), st.integers(0, 40))
def test_realised_is_the_point_that_was_evaluated(case: Case, index: int) -> None:
    space = case.space
    allocation = space.allocate(sobol_point(space, index, 0))
    point = space.realised(allocation, {})
    assert list(point) == list(space.names)
    assert all(0 < value <= 1 for value in point.values())
    # It spends what the allocation spends beside the pinned units: ratios times dense costs.
    units = {unit.name: unit for unit in case.layers}
    pinned = case.price(units[name] for name in space.problem.dense)
    cost_of_point = sum(
        point[v] * case.price(units[n] for n in names) for v, names in space.units.items()
    )
    cost = allocation.cost.of(case.offered["measure"])
    assert cost_of_point + pinned == pytest.approx(cost, rel=TOLERANCES["ratio"])
    assert used(space, point) <= space.room + TOLERANCES["budget"]


def test_realised_is_as_near_to_the_point_as_options_allow() -> None:
    """Ratios -> options -> ratios: off by less than a step of each layer on a fine ladder."""
    layers = make_layers(1, dict.fromkeys(KINDS, (512, 512)))
    space = make_space(0.6, layers)
    for index in range(8):
        point = sobol_point(space, index, 1)
        realised = space.realised(space.allocate(point), point)
        for name, value in point.items():
            # Above 1/2 of a square layer's parameters comes dense only at rank 256, so the
            # factored form is fine up to its last rung: one rank is 1/256 of the layer.
            assert realised[name] == pytest.approx(value, abs=3 / 256), (index, name)


def test_realised_counts_q_and_k_together() -> None:
    space = make_space()
    allocation = space.allocate(sobol_point(space, 2, 0))
    point = space.realised(allocation, {})
    compressed = dense = 0
    for spec in space.problem.units:
        if spec.kind in ("q_proj", "k_proj"):
            option, size = allocation.options[spec.name], spec.out_features * spec.in_features
            ranked = sum(rank * (spec.out_features + spec.in_features) for rank in option.level)
            compressed += size if option == DENSE else ranked + spec.out_features  # a bias is added
            dense += size
    assert point["qk"] == pytest.approx(compressed / dense, rel=TOLERANCES["ratio"])


def test_the_uniform_baseline_compresses_pinned_layers_and_stands_for_no_point() -> None:
    space = make_space(keep_ratio=0.5)
    uniform = space.problem.uniform()
    assert all(option != DENSE for option in uniform.options.values())
    assert uniform.cost.parameters <= space.problem.budget.limit
    assert space.realised(uniform, {}) == {}
    free = make_space(keep_ratio=0.5, dense=[], groups={**GROUPS, "v": ["v_proj"]})
    assert free.realised(free.problem.uniform(), {})
    # The same wish for all: units of one shape get the same rank, up to the last step.
    options = free.problem.uniform().options
    ranks = [options[s.name].level[0] for s in free.problem.units if s.kind == "q_proj"]
    assert max(ranks) - min(ranks) <= 1


def test_sobol_points_depend_on_index_and_seed_only() -> None:
    space = make_space()
    first = [sobol_point(space, index, 7) for index in range(6)]
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    points = {index: sobol_point(make_space(), index, 7) for index in (5, 0, 3, 1, 4, 2)}
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [points[index] for index in range(6)] == first
    assert len({tuple(point.values()) for point in first}) == 6
    assert sobol_point(space, 0, 8) != first[0]


@pytest.mark.parametrize("keep_ratio", [0.35, 0.6, 0.9])
def test_sobol_points_spread_under_any_budget(keep_ratio: float) -> None:
    """Ax's own design collapses to near copies of one point where the budget is tight."""
    space = make_space(keep_ratio)
    points = torch.tensor([list(sobol_point(space, i, 0).values()) for i in range(8)])
    nearest = torch.cdist(points, points).fill_diagonal_(9).min(1).values
    reach = min(space.room - 0.2, 1.0 - space.room)
    assert nearest.min() > reach / 20
    assert nearest.mean() > reach / 4


@given(cases())
def test_an_infeasible_budget_names_the_smallest_keep_ratio(case: Case) -> None:
    total = case.price(case.layers)
    with pytest.raises(BudgetError) as caught:
        case.build(case.smallest - 1)
    stated = re.search(r"smallest feasible budget.keep_ratio is (\d\.\d{4})", str(caught.value))
    assert stated is not None
    ratio = float(stated[1])
    budget = case.whole.keeping(ratio).budget
    space = case.build(budget.limit)
    assert space.allocate(sobol_point(space, 0, 0)).cost.of(budget.measure) <= budget.limit
    # One in the last digit less is not feasible.
    below = case.whole.keeping(round(ratio - 1e-4, 4)).budget.limit
    assert below < case.smallest <= total
    with pytest.raises(BudgetError):
        case.build(below)


@pytest.mark.parametrize("percent", [7, 14, 28, 29, 55, 57])
def test_the_border_is_computed_without_binary_rounding(percent: int) -> None:
    """0.07 * 10000 is 700.0000000000001 in binary, and 0.57 * 10000 is 5699.999999999999."""
    layers = make_layers(1, {"q_proj": (100, 100)})  # fine steps, so that the bound decides
    changes = {"dense": [], "bounds": [percent / 100, 1.0], "start": {}, "bias": False}
    assert make_space(percent / 100, layers, **changes).problem.budget.limit == 100 * percent
    with pytest.raises(BudgetError, match=rf"budget.keep_ratio is 0\.{percent:02d}00;"):
        make_space((percent - 1) / 100, layers, **changes)


@given(cases())
def test_the_smallest_budget_of_all_can_be_searched(case: Case) -> None:
    space = case.build(case.smallest)
    for index in range(3):
        point = sobol_point(space, index, 0)
        assert_keeps_bounds_and_budget(space, point)
        assert space.allocate(point).cost.of(case.offered["measure"]) <= case.smallest


def test_per_kind_has_one_variable_per_group_that_the_model_has() -> None:
    space = make_space(groups={**GROUPS, "gate": ["gate_proj"]})
    assert space.names == ("qk", "o", "up", "down")
    assert space.problem.dense == ("layers.0.v_proj", "layers.1.v_proj")
    qk = "layers.0.q_proj", "layers.0.k_proj", "layers.1.q_proj", "layers.1.k_proj"
    assert space.units["qk"] == qk
    assert space.problem.price(qk) == 2 * (24 * 24 + 12 * 24)
    assert sum(space.shares.values()) == pytest.approx(1, abs=TOLERANCES["budget"])


def test_q_and_k_share_a_ratio_but_each_has_its_own_option() -> None:
    space = make_space(0.6)
    options = space.allocate(dict.fromkeys(space.names, 0.5)).options
    (q,), (k,) = options["layers.0.q_proj"].level, options["layers.0.k_proj"].level
    # The same share of 24 x 24 and of 12 x 24 parameters are different ranks.
    assert q > k


@pytest.mark.parametrize(
    ("blocks", "groups", "expected"),
    [
        (4, 4, [0, 1, 2, 3]),
        (6, 3, [0, 0, 1, 1, 2, 2]),
        (5, 2, [0, 0, 0, 1, 1]),
        (7, 4, [0, 0, 1, 1, 2, 2, 3]),
        (2, 4, [0, 1]),
        (3, 1, [0, 0, 0]),
    ],
)
def test_depth_groups_are_consecutive_and_as_equal_as_can_be(blocks, groups, expected) -> None:
    space = make_space(layers=make_layers(blocks), granularity="depth", depth_groups=groups)
    depth = {u: int(name.rpartition(".")[2]) for name, units in space.units.items() for u in units}
    assert [depth[f"layers.{block}.o_proj"] for block in range(blocks)] == expected
    assert len(space.names) == 4 * len(set(expected))
    assert "qk.0" in space.names
    sizes = [expected.count(group) for group in set(expected)]
    assert max(sizes) - min(sizes) <= 1


def test_per_layer_has_one_variable_per_layer() -> None:
    space = make_space(granularity="layer")
    searched = [spec.name for spec in space.problem.units if spec.kind != "v_proj"]
    assert list(space.names) == searched
    assert space.units == {name: (name,) for name in searched}


def test_groups_may_name_layers_by_pattern_and_the_first_that_matches_takes_it() -> None:
    groups = {"early": ["layers.0.*"], "attention": ["*_proj"]}
    space = make_space(groups=groups, dense=["layers.1.v_proj"], start={})
    assert space.names == ("early", "attention")
    assert space.units["early"] == tuple(f"layers.0.{kind}" for kind in KINDS)
    assert space.problem.dense == ("layers.1.v_proj",)


def test_start_ratios_go_to_groups_and_depths() -> None:
    start = {"qk": [0.2, 0.9], "o": 0.5}
    space = make_space(layers=make_layers(3), granularity="depth", depth_groups=3, start=start)
    point = space.start_point()
    # The third depth has no value of its own and takes the last one; groups without a start
    # value take the mean that the budget leaves.
    wished = {"qk.0": 0.2, "qk.1": 0.9, "qk.2": 0.9} | {f"o.{d}": 0.5 for d in range(3)}
    assert point == space.project({name: wished.get(name, space.room) for name in space.names})


def test_all_problems_of_a_space_are_listed_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        make_space(groups={"qk": ["q_proj", "k_proj"], "o": ["o_proj"]}, start={"gate": 1.0})
    problems = caught.value.problems
    assert len(problems) == 5  # up and down of two blocks, and the start value
    for block in range(2):
        for kind in ("up_proj", "down_proj"):
            name = f"layers.{block}.{kind}"
            assert any(name in problem and f"kind {kind}" in problem for problem in problems)
    assert "gate" in problems[-1]
    assert "['o', 'qk']" in problems[-1]


def test_nothing_left_to_search_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing is left to search"):
        make_space(dense=["*"])


def test_upper_bounds_below_the_budget_leave_a_rest_that_options_use() -> None:
    space = make_space(0.95)
    space = replace(space, bounds=dict.fromkeys(space.names, (0.2, 0.5)))
    assert space.project(dict.fromkeys(space.names, 0.1)) == dict.fromkeys(space.names, 0.5)
    steps = min(24 + 24, 12 + 24)
    allocation = space.allocate(dict.fromkeys(space.names, 0.5))
    assert allocation.cost.parameters > space.problem.budget.limit - 24 * steps


def test_a_real_model_has_the_groups_of_the_paper(layers: ModelMap) -> None:
    groups = {**GROUPS, "gate": ["gate_proj"]}
    space = make_space(0.8, layers.compressible, groups=groups)
    assert space.names == ("qk", "o", "gate", "up", "down")
    covered = {name for units in space.units.values() for name in units} | set(space.problem.dense)
    assert covered == {spec.name for spec in layers.compressible}
