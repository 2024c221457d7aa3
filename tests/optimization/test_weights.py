"""Weights around the analytic allocation: every point meets the budget, the origin is the optimum.

What a point distorts is checked against a plain formula, what is optimal by exchange arguments.
"""

import math
import re
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lrbo.allocation.allocate import Allocation, allocate_by_loss
from lrbo.errors import BudgetError, ConfigError
from lrbo.layers.options import DENSE, MEASURES, Budget, Option, cost_of
from lrbo.models.specs import LayerSpec
from lrbo.optimization.space import Problem, sobol_point
from lrbo.optimization.variables import SpaceSettings, WeightSpace, build_weight_space
from tests.support.fakes import (
    ITEMSIZE,
    Curves,
    make_curves,
    make_layers,
    make_problem,
    make_space,
    make_weight_space,
    predicted,
)

TOLERANCES = {
    "loss": 1e-9,  # sums of curves of order 1 in float64, and the solver's own rounding
}
KINDS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Case:
    """Arguments of a space.

    Attributes:
        layers: Of the model.
        offered: What the menus are made of, and the measure of the budget.
        changes: The other arguments.
        fullness: Places the budget between the smallest that can be met and dense.
        seed: Of the curves.
    """

    layers: list[LayerSpec]
    offered: dict
    changes: dict
    fullness: float
    seed: int

    @property
    def measure(self) -> str:
        return self.offered["measure"]

    @property
    def whole(self) -> Problem:
        """Return the problem of the whole budget."""
        return make_problem(1.0, self.layers, **self.offered)

    @property
    def curves(self) -> Curves:
        return make_curves(self.layers, self.seed)

    @property
    def size(self) -> int:
        """Return what all units cost while they are dense, by their shapes."""
        size = sum(unit.out_features * unit.in_features for unit in self.layers)
        return size * ITEMSIZE if self.measure == "bytes" else size

    @property
    def smallest(self) -> int:
        """Return what the smallest ranks of the cheapest form cost, unit by unit.

        The baseline has one form, and must be feasible too.
        """
        return min(map(self._smallest, self.offered["forms"]))

    def _smallest(self, form: str) -> int:
        multiple, minimum = self.offered["rank_multiple"], self.offered["minimum"]
        first, total = max(-(-minimum // multiple), 1) * multiple, 0
        for unit in self.layers:
            options = [DENSE]
            if first <= min(unit.out_features, unit.in_features):
                options.append(Option(form, (first,)))
            prices = [
                cost_of(unit, option, bias=self.offered["bias"], itemsize=ITEMSIZE).of(self.measure)
                for option in options
            ]
            total += prices[0] if unit.kind in self.changes["dense"] else min(prices)
        return total

    def build(self, limit: int) -> WeightSpace:
        problem = replace(self.whole, budget=Budget(self.measure, limit))
        space = build_weight_space(problem, SpaceSettings(bounds=[-0.5, 0.5], **self.changes))
        return space.of(predicted(space.problem, self.curves))

    @property
    def space(self) -> WeightSpace:
        rest = self.size - self.smallest
        return self.build(self.smallest + round(self.fullness * rest))


@st.composite
def cases(draw) -> Case:
    """Draw plain values only: the run-time type checks of lrbo must not run in a strategy."""
    side = st.integers(3, 20)
    changes = {
        "dense": draw(st.sampled_from([[], ["v_proj"], ["v_proj", "q_proj"]])),
        "knots": draw(st.sampled_from([0, 2, 3])),
        "exponent": draw(st.booleans()),
    }
    offered = {
        "forms": draw(st.sampled_from([("factored",), ("pivoted",), ("factored", "pivoted")])),
        "bias": draw(st.booleans()),
        "rank_multiple": draw(st.sampled_from([1, 2, 4])),
        "minimum": draw(st.sampled_from([0, 1, 3, 5])),
        "measure": draw(st.sampled_from(MEASURES)),
    }
    shapes = {kind: (draw(side), draw(side)) for kind in KINDS}
    layers = make_layers(draw(st.integers(1, 4)), shapes)
    return Case(layers, offered, changes, draw(st.floats(0, 1)), draw(st.integers(0, 99)))


def point_of(space: WeightSpace, index: int) -> dict[str, float]:
    return sobol_point(space, index, 5)


def loss(curves: Curves, allocation: Allocation) -> float:
    """Return the summed predicted loss of an allocation."""
    options = allocation.options.items()
    return sum(float(curves[n][option.level[0]]) for n, option in options if option != DENSE)


def assert_keeps_its_promises(space: WeightSpace, allocation: Allocation) -> None:
    """The budget is met, no step is left that fits, pinned units are dense, all is on offer."""
    problem = space.problem
    assert list(allocation.options) == list(problem.menus)
    counted, steps = 0, []
    for name, menu in problem.menus.items():
        ladder = menu.ladder(problem.budget.measure, menu.losses)
        options = [menu.option(int(index)) for index in ladder.indices]
        rung = options.index(allocation.options[name])
        counted += int(ladder.prices[rung])
        if name not in problem.dense:
            steps += [int(price) for price in np.diff(ladder.prices)[rung : rung + 1]]
    assert counted == allocation.cost.of(problem.budget.measure)
    assert 0 <= problem.budget.limit - counted < min(steps, default=10**9)
    assert all(allocation.options[name] == DENSE for name in space.problem.dense)


# --- points ------------------------------------------------------------------------------------


@given(cases(), st.integers(0, 40))
def test_every_point_keeps_the_promises_of_an_allocation(case: Case, index: int) -> None:
    space = case.space
    assert_keeps_its_promises(space, space.allocate(point_of(space, index)))


@given(cases())
def test_the_origin_is_the_analytic_allocation(case: Case) -> None:
    space = case.space
    (analytic,) = space.starts("analytic")
    allocation, origin = analytic.allocation, analytic.point
    assert origin == dict.fromkeys(space.names, 0.0)
    assert allocation == space.allocate(origin)
    problem = space.problem
    assert allocation == allocate_by_loss(problem.menus, problem.budget, dense=problem.dense)


@given(cases(), st.integers(0, 40))
def test_no_point_predicts_less_loss_than_the_analytic_allocation(case: Case, index: int) -> None:
    space = case.space
    least = space.problem.by_loss()
    other = space.allocate(point_of(space, index))
    assert loss(case.curves, least) <= loss(case.curves, other) + TOLERANCES["loss"]


@given(cases(), st.integers(0, 40))
def test_a_point_has_the_least_loss_of_curves_that_the_formula_distorts(
    case: Case, index: int
) -> None:
    space = case.space
    point = point_of(space, index)
    blocks = len({spec.block for spec in space.problem.units})
    distorted, prices = {}, {}
    for spec in space.problem.units:
        if spec.name in space.problem.dense:
            continue
        weight = point[f"kind.{spec.kind}"]
        if space.knots:
            # Where the block stands between two knots, in steps from knot to knot.
            position = (space.knots - 1) * spec.block / max(blocks - 1, 1)
            low = min(int(position), space.knots - 2)
            ends = point[f"depth.{low}"], point[f"depth.{low + 1}"]
            weight += ends[0] + (position - low) * (ends[1] - ends[0])
        power = math.exp(point["exponent"]) if "exponent" in space.names else 1.0
        menu = space.problem.menus[spec.name]
        options = [menu.option(index) for index in range(len(menu))]
        curve = case.curves[spec.name]
        values = [0.0 if o == DENSE else float(curve[o.level[0]]) for o in options]
        distorted[spec.name] = np.array([math.exp(weight) * value**power for value in values])
        prices[spec.name] = dict(zip(options, distorted[spec.name], strict=True))
    expected = allocate_by_loss(
        space.problem.menus, space.problem.budget, losses=distorted, dense=space.problem.dense
    )
    allocation = space.allocate(point)

    def price(allocation: Allocation) -> float:
        return sum(prices[name][allocation.options[name]] for name in prices)

    # Options themselves may differ where rounding decides between equals.
    assert price(allocation) == pytest.approx(price(expected), abs=TOLERANCES["loss"])


@given(cases(), st.integers(0, 20), st.floats(-3, 3))
def test_a_constant_added_to_all_kinds_changes_nothing(
    case: Case, index: int, constant: float
) -> None:
    space = case.space
    point = point_of(space, index)
    moved = {name: v + constant * name.startswith("kind.") for name, v in point.items()}
    before, after = space.allocate(point), space.allocate(moved)
    # A scale may decide between selections whose losses are equal to rounding, and no others.
    plain = loss(case.curves, before)
    assert loss(case.curves, after) == pytest.approx(plain, abs=TOLERANCES["loss"])
    if space.knots:
        deep = {name: v + constant * name.startswith("depth.") for name, v in point.items()}
        shifted = space.allocate(deep)
        assert loss(case.curves, shifted) == pytest.approx(plain, abs=TOLERANCES["loss"])


@given(cases(), st.integers(0, 20), st.floats(0.01, 3), st.sampled_from(KINDS))
def test_a_larger_weight_of_a_kind_never_gives_it_less_of_the_budget(
    case: Case, index: int, more: float, kind: str
) -> None:
    """Two optima, exchanged: the kind's own loss cannot rise with its weight.

    Nor then can its cost fall: less of it with less loss would have been better before.
    Where curves are flat, the rest of the budget goes to anybody; these here fall strictly.
    """
    space = case.space
    variable = f"kind.{kind}"
    if variable not in space.names:
        return
    specs = [spec for spec in space.problem.units if spec.kind == kind]

    def cost(point: dict[str, float]) -> int:
        costs = space.allocate(point).costs
        return sum(costs[spec.name].of(case.measure) for spec in specs)

    point = point_of(space, index)
    assert cost(point) <= cost(point | {variable: point[variable] + more})


@given(cases(), st.integers(0, 20))
def test_depth_and_exponent_of_nothing_are_left_out(case: Case, index: int) -> None:
    """Knots at 0 and the exponent at 0 are a space without them."""
    space = case.space
    kinds = {n: v for n, v in point_of(space, index).items() if n.startswith("kind.")}
    plain = replace(case, changes=case.changes | {"knots": 0, "exponent": False})
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
        allocation, expected = (
            make_weight_space(0.7, layers, curves).allocate(
                dict.fromkeys(make_weight_space().names, 0.0) | {"exponent": exponent}
            )
            for curves in (noisy, flat)
        )
        assert allocation == expected


# --- families of forms -------------------------------------------------------------------------

MIXED = ("pivoted", "factored", "int4", "int2_sym")
WEIGHTS = ("form.low_rank", "form.int4", "form.int2_sym", "form.repair")
# Inputs of whole groups, and of 24 none.
WIDE = {"q_proj": (32, 32), "v_proj": (16, 32), "up_proj": (40, 24), "down_proj": (24, 48)}


def mixed_space(keep_ratio: float = 0.4, forms: tuple[str, ...] = MIXED, **changes) -> WeightSpace:
    """Build a space of a budget in bytes that leaves units of each family of forms."""
    changes |= {"forms": forms, "measure": "bytes"}
    return make_weight_space(keep_ratio, make_layers(3, WIDE), **changes)


def test_several_families_of_forms_have_a_weight_each_and_repair_one() -> None:
    plain = mixed_space(form_weights=False)
    assert mixed_space().names == (*plain.names, *WEIGHTS)
    assert not [name for name in plain.names if name.startswith("form.")]
    for forms in (("pivoted",), ("factored", "pivoted"), ("int4",)):
        assert mixed_space(0.5, forms).names == plain.names
    names = mixed_space(0.5, ("int4", "int4_sym")).names
    assert names[len(plain.names) :] == ("form.int4", "form.int4_sym", "form.repair")
    # Without a base there is nothing to repair.
    names = mixed_space(0.9, ("factored_int8", "pivoted", "kronecker")).names
    assert names[len(plain.names) :] == ("form.low_rank", "form.kronecker")
    names = mixed_space(0.9, ("kronecker", "sparse_rows")).names
    assert names[len(plain.names) :] == ("form.kronecker", "form.sparse_rows", "form.repair")


@pytest.mark.parametrize("index", range(8))
def test_weights_of_forms_distort_as_the_formula_says(index: int) -> None:
    space = mixed_space(knots=0)
    point = point_of(space, index)
    distorted = {}
    for unit in space.problem.units:
        menu = space.problem.menus[unit.name]
        assert menu.losses is not None
        values = []
        for number, value in enumerate(menu.losses):
            option = menu.option(number)
            weight = point[f"kind.{unit.kind}"]
            if option.form in ("pivoted", "factored"):
                weight += point["form.low_rank"]
            elif option != DENSE:
                weight += point[f"form.{option.form}"]
                weight += point["form.repair"] if option.level[1] else 0.0
            values.append(math.exp(weight) * float(value) ** math.exp(point["exponent"]))
        distorted[unit.name] = np.array(values)
    expected = space.problem.by_loss(distorted)
    assert space.allocate(point) == expected
    budget = space.problem.budget
    assert expected.cost.of(budget.measure) <= budget.limit


def test_a_large_weight_of_a_family_takes_it_out() -> None:
    space = mixed_space()
    origin = space.analytic_point()
    assert space.allocate(origin) == space.problem.by_loss()

    def families(point: dict[str, float]) -> set[str]:
        names = set()
        for option in space.allocate(point).compressed.values():
            is_low_rank = option.form in ("pivoted", "factored")
            names.add("form.low_rank" if is_low_rank else f"form.{option.form}")
            if not is_low_rank and option.level[1]:
                names.add("form.repair")
        return names

    assert families(origin) == set(WEIGHTS)
    for name in WEIGHTS:
        assert name not in families(origin | {name: 50.0})


def test_one_number_added_to_the_weights_of_all_families_changes_nothing() -> None:
    space = mixed_space()
    for index in range(8):
        point = point_of(space, index)
        moved = {name: point[name] + 0.25 * (name in WEIGHTS[:-1]) for name in point}
        assert space.allocate(moved) == space.allocate(point)


# --- the space itself --------------------------------------------------------------------------


def test_without_groups_each_kind_of_the_model_is_one() -> None:
    space = make_weight_space(dense=["v_proj"])
    kinds = [f"kind.{k}" for k in ("q_proj", "k_proj", "o_proj", "up_proj", "down_proj")]
    assert space.names == (*kinds, "depth.0", "depth.1", "depth.2", "exponent")
    assert space.problem.dense == ("layers.0.v_proj", "layers.1.v_proj")
    assert space.bounds == dict.fromkeys(space.names, (-0.5, 0.5))
    assert space.constraint is None
    assert space.start_point() == {}


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
    point = sobol_point(space, index, seed)
    assert list(point) == list(space.names)
    assert all(low <= point[name] <= high for name, (low, high) in space.bounds.items())
    torch.manual_seed(index)
    before = torch.random.get_rng_state()
    assert sobol_point(case.space, index, seed) == point
    assert torch.equal(torch.random.get_rng_state(), before)


def test_sobol_points_fill_the_box() -> None:
    space = make_weight_space()
    points = torch.tensor([list(sobol_point(space, i, 0).values()) for i in range(64)])
    for quadrant in (points < 0, points > 0):
        assert (quadrant.sum(0) >= 24).all()
    assert not torch.equal(points[0], torch.tensor(list(sobol_point(space, 0, 1).values())))


@given(st.data())
def test_projection_clamps(data) -> None:
    space = make_weight_space()
    size = len(space.names)
    values = data.draw(st.lists(st.floats(-2, 2), min_size=size, max_size=size))
    nearest = space.project(dict(zip(space.names, values, strict=True)))
    assert list(nearest.values()) == [float(v) for v in np.clip(values, -0.5, 0.5)]
    assert space.project(nearest) == nearest


def test_what_was_evaluated_is_the_point_itself_and_the_baseline_has_none() -> None:
    space = make_weight_space()
    point = point_of(space, 3)
    assert space.realised(space.allocate(point), point) == point
    assert space.realised(space.problem.uniform(), {}) == {}


def test_the_uniform_baseline_is_that_of_ratios() -> None:
    """Studies of both kinds of space compare with the same trial."""
    assert make_weight_space(0.6).problem.uniform() == make_space(0.6).problem.uniform()
    pinned = make_weight_space(0.6, dense=["v_proj"], forms=("factored", "pivoted"))
    assert pinned.problem.uniform() == make_space(0.6).problem.uniform()
    options = make_weight_space(0.6, minimum=6).problem.uniform().options.values()
    assert all(o == DENSE or o.level >= (6,) for o in options)  # of the menu, as any trial


def test_units_without_losses_stay_dense() -> None:
    """As those that are too small for any low-rank form."""
    layers = make_layers()
    curves = dict(make_curves(layers))
    missing = [s.name for s in layers if s.kind == "k_proj"]
    for name in missing:
        del curves[name]
    space = make_weight_space(0.8, layers, curves)
    allocation = space.allocate(point_of(space, 0))
    assert all(allocation.options[name] == DENSE for name in missing)
    assert allocation.cost.parameters <= space.problem.budget.limit


def test_before_losses_are_predicted_nothing_can_be_allocated() -> None:
    space = make_weight_space().of(make_problem())
    with pytest.raises(ValueError, match="nothing is predicted yet; calibrate with output grad"):
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
    space = case.build(case.whole.keeping(float(stated[1])).budget.limit)
    assert_keeps_its_promises(space, space.allocate(point_of(space, 0)))
    below = case.whole.keeping(round(float(stated[1]) - 1e-4, 4)).budget.limit
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


def test_a_form_that_does_not_fit_is_no_obstacle_to_one_that_does() -> None:
    layers = make_layers(2, {"q_proj": (32, 32), "up_proj": (48, 32)})
    changes = {"forms": ("int8_sym", "pivoted"), "measure": "bytes", "bias": False}
    space = make_weight_space(0.2, layers, knots=0, **changes)  # int8 takes over a quarter
    uniform = space.problem.uniform()
    assert {option.form for option in uniform.options.values()} == {"pivoted"}
    for allocation in (uniform, space.problem.by_loss()):
        assert allocation.cost.bytes <= space.problem.budget.limit
    with pytest.raises(BudgetError):
        make_weight_space(0.2, layers, knots=0, **{**changes, "forms": ("int8_sym",)})
