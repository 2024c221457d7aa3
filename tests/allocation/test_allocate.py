"""Ratios become options that fit the budget: never over, and nothing left that would fit."""

import math
import re
from dataclasses import dataclass, replace
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrbo.allocation.allocate import Allocation, allocate, dense_cost, smallest_cost, widest
from lrbo.errors import BudgetError
from lrbo.layers.form import GROUP_SIZES
from lrbo.layers.forms import FORMS, Codebook, Quantized
from lrbo.layers.options import DENSE, MEASURES, Budget, Cost, Measure, Menu, Option, cost_of
from lrbo.models.specs import LayerSpec
from lrbo.optimization.space import Problem
from tests.support import reference
from tests.support.reference import Priced

# No tolerances: everything here is an integer.


def spec(name: str, out_features: int, in_features: int, has_bias: bool = False) -> LayerSpec:
    return LayerSpec(name, "kind", 0, out_features, in_features, has_bias, site=name)


def menus_of(
    units: list[LayerSpec], *forms: str, multiple: int = 1, minimum: int = 0
) -> dict[str, Menu]:
    return {
        unit.name: Menu.of(
            unit,
            forms or ("factored",),
            bias=unit.has_bias,
            itemsize=4,
            multiple=multiple,
            minimum=minimum,
        )
        for unit in units
    }


def parameters(limit: int) -> Budget:
    return Budget("parameters", limit)


def factored(**ranks: int | None) -> dict[str, Option]:
    """Return options by unit; ``None`` is dense."""
    return {n: DENSE if rank is None else Option("factored", (rank,)) for n, rank in ranks.items()}


@dataclass(frozen=True)
class Case:
    """Units, wishes and settings; ``fullness`` places the budget between smallest and dense."""

    units: list[LayerSpec]
    ratios: dict[str, float]
    forms: list[str]
    measure: Measure
    adds_bias: bool
    itemsize: int
    multiple: int
    minimum: int
    dense: set[str]
    fullness: float

    @property
    def menus(self) -> dict[str, Menu]:
        return {
            unit.name: Menu.of(
                unit,
                self.forms,
                bias=self.adds_bias or unit.has_bias,
                itemsize=self.itemsize,
                multiple=self.multiple,
                minimum=self.minimum,
            )
            for unit in self.units
        }

    def price(self, unit: LayerSpec, option: Option) -> int:
        bias = self.adds_bias or unit.has_bias
        return cost_of(unit, option, bias=bias, itemsize=self.itemsize).of(self.measure)

    def ladder(self, unit: LayerSpec) -> list[Priced]:
        """Return what a unit may become: ranks of the first form, or dense."""
        ranks = range(1, min(unit.out_features, unit.in_features) + 1)
        allowed = [r for r in ranks if r % self.multiple == 0 and r >= self.minimum]
        options = [] if unit.name in self.dense else [Option(self.forms[0], (r,)) for r in allowed]
        return reference.ladder([(o, self.price(unit, o)) for o in [*options, DENSE]])

    @property
    def ladders(self) -> dict[str, list[Priced]]:
        return {unit.name: self.ladder(unit) for unit in self.units}

    @property
    def smallest(self) -> int:
        return sum(steps[0][1] for steps in self.ladders.values())

    @property
    def whole(self) -> int:
        return sum(self.price(unit, DENSE) for unit in self.units)

    @property
    def budget(self) -> Budget:
        free = self.whole + 5 - self.smallest
        return Budget(self.measure, self.smallest + round(self.fullness * free))

    def allocate(self, budget: Budget | None = None) -> Allocation:
        return allocate(self.ratios, self.menus, budget or self.budget, dense=self.dense)

    def keeping(self, keep_ratio: float) -> Budget:
        return Budget.keeping(keep_ratio, dense_cost(self.menus), self.measure)


@st.composite
def cases(draw) -> Case:
    side = st.integers(1, 24)
    shapes = draw(st.lists(st.tuples(side, side, st.booleans()), min_size=1, max_size=6))
    names = [f"unit{index}" for index in range(len(shapes))]
    # Few distinct values beside arbitrary ones: ties must be broken the same way each time.
    ratio = st.one_of(st.sampled_from([0.25, 0.5, 1.0]), st.floats(1e-3, 1e3))
    forms = [["factored"], ["pivoted"], ["factored", "pivoted"], ["pivoted", "factored"]]
    return Case(
        units=[spec(name, *shape) for name, shape in zip(names, shapes, strict=True)],
        ratios={name: draw(ratio) for name in names},
        forms=draw(st.sampled_from(forms)),
        measure=draw(st.sampled_from(MEASURES)),
        adds_bias=draw(st.booleans()),
        itemsize=draw(st.sampled_from([2, 4])),
        multiple=draw(st.integers(1, 6)),
        minimum=draw(st.integers(0, 4)),
        dense=draw(st.sets(st.sampled_from(names), max_size=3)),
        fullness=draw(st.floats(0.0, 1.0)),
    )


@given(cases())
@settings(max_examples=200)
def test_equals_the_plain_loop(case: Case) -> None:
    allocation = case.allocate()
    expected = reference.allocate(case.ratios, case.ladders, case.budget.limit)
    assert dict(allocation.options) == expected
    assert list(allocation.options) == [unit.name for unit in case.units]


@given(cases())
def test_fits_the_budget_and_counts_what_is_stored(case: Case) -> None:
    allocation = case.allocate()
    counted = sum(case.price(unit, allocation.options[unit.name]) for unit in case.units)
    assert allocation.cost.of(case.measure) == counted <= case.budget.limit
    assert allocation.budget == case.budget
    for unit in case.units:
        option, bias = allocation.options[unit.name], case.adds_bias or unit.has_bias
        cost = cost_of(unit, option, bias=bias, itemsize=case.itemsize)
        assert allocation.costs[unit.name] == cost
    assert allocation.cost == Cost.total(allocation.costs.values())
    not_dense = {n: option for n, option in allocation.options.items() if option.form != "dense"}
    assert allocation.compressed == not_dense


@given(cases())
def test_no_unit_could_take_one_more_step(case: Case) -> None:
    allocation = case.allocate()
    for name, steps in case.ladders.items():
        rung = [option for option, _ in steps].index(allocation.options[name])
        if rung + 1 < len(steps):
            price = steps[rung + 1][1] - steps[rung][1]
            assert allocation.cost.of(case.measure) + price > case.budget.limit, name


@given(cases())
def test_dense_as_soon_as_the_first_form_is_not_cheaper(case: Case) -> None:
    allocation = case.allocate()
    for unit in case.units:
        option = allocation.options[unit.name]
        if option != DENSE:
            assert option.form == case.forms[0]
            assert case.price(unit, option) < case.price(unit, DENSE)
            (rank,) = option.level
            assert rank > 0
            assert rank % case.multiple == 0


@given(cases(), st.randoms(use_true_random=False))
def test_order_of_units_is_irrelevant(case: Case, chooser) -> None:
    allocation = case.allocate()
    shuffled = replace(
        case,
        units=chooser.sample(case.units, len(case.units)),
        ratios=dict(reversed(case.ratios.items())),
    )
    other = shuffled.allocate()
    assert dict(other.options) == dict(allocation.options)
    assert other.cost == allocation.cost


@given(cases(), st.sampled_from([0.25, 2.0, 1024.0]))
def test_only_proportions_of_the_wishes_decide(case: Case, factor: float) -> None:
    scaled = {name: factor * ratio for name, ratio in case.ratios.items()}  # powers of 2: exact
    assert replace(case, ratios=scaled).allocate() == case.allocate()


@given(cases(), st.integers(1, 300))
@settings(max_examples=200)
def test_a_larger_budget_never_buys_less(case: Case, more: int) -> None:
    small = case.allocate()
    large = case.allocate(Budget(case.measure, case.budget.limit + more))
    assert large.cost.of(case.measure) >= small.cost.of(case.measure)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("form", ["factored", "pivoted"])
def test_total_is_monotone_over_every_budget_of_a_case(form: str, measure: Measure) -> None:
    menus = menus_of([spec("a", 9, 7), spec("b", 6, 5, True), spec("c", 4, 9)], form)
    ratios = {"a": 0.3, "b": 0.7, "c": 0.2}
    least, whole = smallest_cost(menus, measure), dense_cost(menus).of(measure)
    totals = [
        allocate(ratios, menus, Budget(measure, limit)).cost.of(measure)
        for limit in range(least, whole + 1)
    ]
    assert totals[0] == least
    assert totals[-1] == whole
    assert totals == sorted(totals)


@given(cases())
@settings(max_examples=200)
def test_infeasible_budget_names_a_keep_ratio_that_is_feasible(case: Case) -> None:
    least = case.smallest
    with pytest.raises(BudgetError) as caught:
        case.allocate(Budget(case.measure, least - 1))
    stated = float(re.search(r"keep_ratio to at least (\d\.\d+)", str(caught.value))[1])
    assert case.allocate(case.keeping(stated)).cost.of(case.measure) >= least
    # And it is the smallest at the four digits that are shown.
    lower = stated - 1e-4
    if lower > 0:
        assert lower * case.whole < least


def test_infeasible_budget_says_what_came_and_what_to_do() -> None:
    menus = menus_of([spec("a", 40, 40), spec("b", 40, 40)], multiple=4)
    with pytest.raises(BudgetError) as caught:
        allocate({"a": 1.0, "b": 1.0}, menus, parameters(1500), dense=["b"])
    message = str(caught.value)
    for part in (
        "1_500 parameters", "1_920", "2 units", "1 of them fixed dense", "0.6000", "rank_multiple"
    ):  # fmt: skip
        assert part in message, part
    with pytest.raises(BudgetError, match=r"budget of 6_000 bytes is below the 7_680"):
        allocate({"a": 1.0, "b": 1.0}, menus, Budget("bytes", 6000), dense=["b"])
    with pytest.raises(BudgetError, match=r"1_500 multiply-adds is below the 1_920"):
        allocate({"a": 1.0, "b": 1.0}, menus, Budget("macs", 1500), dense=["b"])


def test_a_unit_smaller_than_the_step_is_dense() -> None:
    units = [spec("small", 6, 30), spec("large", 30, 30)]
    ratios = {"small": 0.1, "large": 1.0}
    allocation = allocate(ratios, menus_of(units, multiple=8), parameters(180 + 480))
    assert allocation.options == factored(small=None, large=8)
    with pytest.raises(BudgetError, match=r"keep_ratio to at least 1\.0000, .*rank_multiple"):
        allocate(ratios, menus_of(units, multiple=31), parameters(1079))


def test_pinned_units_stay_dense_and_need_no_wish() -> None:
    menus = menus_of([spec("a", 20, 20), spec("b", 20, 20), spec("c", 20, 20)])
    allocation = allocate({"a": 1.0, "c": 3.0}, menus, parameters(900), dense={"b"})
    # With pinning, the rest of the budget is shared 1 : 3 by the others.
    assert allocation.options == factored(a=3, b=None, c=9)
    assert allocation.cost.parameters == 120 + 400 + 360 <= 900


def test_the_measure_decides_what_fits() -> None:
    """Indices cost bytes and neither parameters nor multiply-adds; a bias costs no product."""
    menus = {
        "a": Menu.of(spec("a", 20, 20), ["pivoted"], bias=True, itemsize=2)
    }  # 5 * 40 - 25 + 20 parameters, and 80 bytes of indices
    for measure, limit in (("parameters", 195), ("bytes", 470), ("macs", 175)):
        for ceiling, rank in ((limit, 5), (limit - 1, 4)):
            allocation = allocate({"a": 1.0}, menus, Budget(measure, ceiling))
            assert allocation.options == {"a": Option("pivoted", (rank,))}


@pytest.mark.parametrize("ratio", [0.0, -0.5, math.nan, math.inf, None])
def test_a_wish_that_is_no_positive_number_is_refused_by_name(ratio: float | None) -> None:
    menus = menus_of([spec("good", 8, 8), spec("bad", 8, 8)])
    ratios = {"good": 0.5} if ratio is None else {"good": 0.5, "bad": ratio}
    with pytest.raises(ValueError, match=r"1 units .* bad: "):
        allocate(ratios, menus, parameters(100))


@given(cases())
def test_smallest_cost_is_the_border_of_what_can_be_met(case: Case) -> None:
    least = case.smallest
    assert smallest_cost(case.menus, case.measure, case.dense) == least
    tightest = case.allocate(Budget(case.measure, least))
    assert tightest.cost.of(case.measure) == least
    with pytest.raises(BudgetError):
        case.allocate(Budget(case.measure, least - 1))


@given(cases())
def test_ladders_rise_and_end_dense(case: Case) -> None:
    for unit in case.units:
        menu = case.menus[unit.name]
        ladder = menu.ladder(case.measure, None)
        options = [menu.option(int(index)) for index in ladder.indices]
        steps = list(zip(options, map(int, ladder.prices), strict=True))
        if unit.name not in case.dense:
            assert steps == case.ladder(unit)
        assert options[-1] == DENSE
        prices = [price for _, price in steps]
        assert prices == sorted(set(prices))


# --- one choice for all units --------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(st.integers(1, 24), st.sampled_from([16, 24, 32, 64])), min_size=1, max_size=4
    ),
    st.lists(st.sampled_from(list(FORMS)), unique=True),
    st.lists(st.sampled_from(GROUP_SIZES), min_size=1, unique=True),
    st.sampled_from(MEASURES),
    st.floats(0.0, 1.1),
)
@settings(max_examples=200)
def test_the_widest_integers_are_the_dearest_that_all_units_can_be(
    shapes: list[tuple[int, int]],
    forms: list[str],
    sizes: list[int],
    measure: Measure,
    share: float,
) -> None:
    units = [spec(f"unit{index}", *shape) for index, shape in enumerate(shapes)]
    menus = {
        unit.name: Menu.of(unit, forms, bias=False, itemsize=2, group_sizes=sizes) for unit in units
    }
    budget = Budget(measure, round(share * dense_cost(menus).of(measure)))
    affordable = []
    integers = [name for name, form in FORMS.items() if isinstance(form, Quantized)]
    codebooks = [name for name, form in FORMS.items() if isinstance(form, Codebook)]
    for option in (
        *(Option(name, (size, 0)) for name in integers for size in GROUP_SIZES),
        *(Option(name, (0,)) for name in codebooks),
    ):
        options, price = {}, 0
        for name, menu in menus.items():
            offered = [menu.option(index) for index in range(len(menu))]
            options[name] = option if option in offered else DENSE
            cost = cost_of(menu.unit, options[name], bias=False, itemsize=2)
            price += cost.of(measure)
        is_cheaper = price < dense_cost(menus).of(measure)
        if is_cheaper and price <= budget.limit and option in options.values():
            affordable.append((price, options))
    actual = widest(menus, budget)
    if actual is None:
        assert not affordable
    else:
        assert (actual.cost.of(measure), dict(actual.options)) in affordable
        assert actual.cost.of(measure) == max(price for price, _ in affordable)
        assert actual.budget == budget


@pytest.mark.parametrize("measure", ["parameters", "macs"])
def test_integers_that_cost_what_dense_costs_are_no_baseline(measure: Measure) -> None:
    unit = spec("a", 8, 32)  # an integer is a parameter, of however many bits
    menus = {"a": Menu.of(unit, ["int3", "int8"], bias=False, itemsize=2, group_sizes=[32, 16])}
    assert widest(menus, Budget(measure, 8 * 32)) is None


def test_the_uniform_baseline_is_the_widest_integers_or_one_ratio() -> None:
    units = [spec("a", 32, 32), spec("b", 16, 24), spec("c", 24, 64)]
    menus = {
        unit.name: Menu.of(unit, ["pivoted", "int4"], bias=False, itemsize=2, group_sizes=[16])
        for unit in units
    }
    integers = {"a": Option("int4", (16, 0)), "b": DENSE, "c": Option("int4", (16, 0))}
    alike = dict.fromkeys(menus, 1.0)
    # Half a byte, and three bytes for every 16 inputs; 24 inputs have no groups of 16.
    least = 32 * (16 + 2 * 3) + 2 * 16 * 24 + 24 * (32 + 4 * 3)
    for limit, expected in ((least, integers), (least - 1, None), (least + 200, integers)):
        problem = Problem(menus, Budget("bytes", limit), dense=("a",))
        uniform = problem.uniform()
        assert uniform == (widest if expected else partial(allocate, alike))(menus, problem.budget)
        assert expected in (None, uniform.options)
