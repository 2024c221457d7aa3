"""Options of least predicted loss: against every allocation there is, and never over budget."""

import logging
import re
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrbo.allocation import knapsack
from lrbo.allocation.allocate import Allocation, allocate_by_loss, dense_cost
from lrbo.errors import BudgetError
from lrbo.layers.options import DENSE, MEASURES, Budget, Measure, Menu, Option, cost_of
from lrbo.models.specs import LayerSpec
from tests.allocation.test_allocate import factored, parameters, spec
from tests.support import reference

# No tolerances: costs are integers, and so are losses where allocations are compared.

Curves = dict[str, list[list[float]]]  # by unit, then by form, a loss per level


@dataclass(frozen=True)
class Case:
    """Units with whole-number losses of their options, flat, convex or neither.

    ``fullness`` places the budget between the cheapest options and dense.
    """

    units: list[LayerSpec]
    forms: list[str]
    curves: Curves
    measure: Measure
    adds_bias: bool
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
                itemsize=2,
                multiple=self.multiple,
                minimum=self.minimum,
            ).with_losses([np.array(losses) for losses in self.curves[unit.name]])
            for unit in self.units
        }

    def options(self, unit: LayerSpec) -> list[tuple[Option, int, float]]:
        """Return all that a unit may become with price and loss; levels end with their losses."""
        ranks = [r for r in range(1, min(unit.out_features, unit.in_features) + 1)
                 if r % self.multiple == 0 and r >= self.minimum]  # fmt: skip
        pairs = [
            (Option(form, (rank,)), loss)
            for form, losses in zip(self.forms, self.curves[unit.name], strict=True)
            for rank, loss in zip(ranks, losses, strict=False)
        ]
        bias = self.adds_bias or unit.has_bias
        return [
            (option, cost_of(unit, option, bias=bias, itemsize=2).of(self.measure), loss)
            for option, loss in [*(pairs if unit.name not in self.dense else []), (DENSE, 0.0)]
        ]

    def ladder(self, unit: LayerSpec) -> list[tuple[Option, int, float]]:
        return reference.undominated(self.options(unit))

    @property
    def smallest(self) -> int:
        return sum(self.ladder(unit)[0][1] for unit in self.units)

    @property
    def budget(self) -> Budget:
        whole = sum(self.options(unit)[-1][1] for unit in self.units)
        limit = self.smallest + round(self.fullness * (whole + 5 - self.smallest))
        return Budget(self.measure, limit)

    def allocate(self, budget: Budget | None = None) -> Allocation:
        return allocate_by_loss(self.menus, budget or self.budget, dense=self.dense)

    def loss(self, allocation: Allocation) -> float:
        return sum(
            next(x for option, _, x in self.options(unit) if option == chosen_option)
            for unit, chosen_option in zip(self.units, allocation.options.values(), strict=True)
        )

    def least_loss(self, budget: Budget) -> float:
        """Return the least loss of all allocations, also of options that others beat."""
        options = [[(price, loss) for _, price, loss in self.options(unit)] for unit in self.units]
        return reference.least_loss(options, budget.limit)


@st.composite
def cases(draw) -> Case:
    shape = st.tuples(st.integers(1, 11), st.integers(1, 11), st.booleans())
    shapes = draw(st.lists(shape, min_size=1, max_size=4))
    units = [spec(f"unit{index}", *shape) for index, shape in enumerate(shapes)]
    forms = draw(
        st.sampled_from(
            [["factored"], ["pivoted"], ["factored", "pivoted"], ["pivoted", "factored"]]
        )
    )
    multiple, minimum = draw(st.integers(1, 4)), draw(st.integers(0, 5))
    curves: Curves = {}
    for unit in units:
        count = min(unit.out_features, unit.in_features)
        levels = sum(rank % multiple == 0 and rank >= minimum for rank in range(1, count + 1))
        curves[unit.name] = []
        for _ in forms:
            length = draw(st.integers(0, levels))
            flat = draw(st.booleans())
            drop = st.sampled_from([0, 0, 1, 2, 7]) if flat else st.integers(0, 1000)
            drops = draw(st.lists(drop, min_size=length, max_size=length))
            curves[unit.name].append([float(sum(drops[level:])) for level in range(length)])
    return Case(
        units=units,
        forms=forms,
        curves=curves,
        measure=draw(st.sampled_from(MEASURES)),
        adds_bias=draw(st.booleans()),
        multiple=multiple,
        minimum=minimum,
        dense=draw(st.sets(st.sampled_from([unit.name for unit in units]), max_size=2)),
        fullness=draw(st.one_of(st.just(0.0), st.just(1.0), st.floats(0.0, 1.0))),
    )


@given(cases())
@settings(max_examples=150)
def test_equals_every_allocation_tried(case: Case) -> None:
    allocation = case.allocate()
    assert case.loss(allocation) == case.least_loss(case.budget)
    assert list(allocation.options) == [unit.name for unit in case.units]


@given(cases())
@settings(max_examples=150)
def test_keeps_the_promises(case: Case) -> None:
    allocation = case.allocate()
    counted = 0
    for unit in case.units:
        prices = {option: price for option, price, _ in case.options(unit)}
        counted += prices[allocation.options[unit.name]]  # on offer at all
    assert allocation.cost.of(case.measure) == counted <= case.budget.limit
    assert allocation.budget == case.budget
    for unit in case.units:
        steps = case.ladder(unit)
        rung = [option for option, _, _ in steps].index(allocation.options[unit.name])
        if rung + 1 < len(steps):
            price = steps[rung + 1][1] - steps[rung][1]
            assert counted + price > case.budget.limit, unit.name


@given(cases(), st.randoms(use_true_random=False))
def test_order_of_units_is_irrelevant(case: Case, chooser) -> None:
    shuffled = replace(case, units=chooser.sample(case.units, len(case.units)))
    assert dict(shuffled.allocate().options) == dict(case.allocate().options)


@given(cases(), st.sampled_from([0.5, 3.0, 1000.0]))
def test_only_proportions_of_the_losses_decide(case: Case, factor: float) -> None:
    scaled = {
        name: [[factor * loss for loss in losses] for losses in forms]
        for name, forms in case.curves.items()
    }
    assert case.loss(replace(case, curves=scaled).allocate()) == case.loss(case.allocate())


@given(cases(), st.integers(1, 60))
def test_a_larger_budget_never_loses_more(case: Case, more: int) -> None:
    large = case.allocate(Budget(case.measure, case.budget.limit + more))
    assert case.loss(large) <= case.loss(case.allocate())


@given(cases())
def test_a_further_form_never_loses_more(case: Case) -> None:
    """At the budget of the first form alone: what one form can, several can too."""
    first = {name: forms[:1] for name, forms in case.curves.items()}
    alone = replace(case, forms=case.forms[:1], curves=first)
    assert case.loss(case.allocate(alone.budget)) <= alone.loss(alone.allocate())


@given(cases())
def test_the_border_of_what_can_be_met(case: Case) -> None:
    least = case.smallest
    assert case.allocate(Budget(case.measure, least)).cost.of(case.measure) == least
    with pytest.raises(BudgetError) as caught:
        case.allocate(Budget(case.measure, least - 1))
    stated = float(re.search(r"keep_ratio to at least (\d\.\d+)", str(caught.value))[1])
    budget = Budget.keeping(stated, dense_cost(case.menus), case.measure)
    assert case.allocate(budget).cost.of(case.measure) >= least


@given(cases())
def test_losses_may_be_given_in_place_of_those_of_the_menus(case: Case) -> None:
    """Units that have none there stay dense."""
    given_ = {name: menu.losses for name, menu in case.menus.items() if name not in case.dense}
    bare = {name: replace(menu, losses=menu.losses * 0.0) for name, menu in case.menus.items()}
    expected = case.allocate()
    assert allocate_by_loss(bare, case.budget, losses=given_) == expected


def menus_of(
    curves: dict[str, object], *units: LayerSpec, multiple: int = 1, minimum: int = 0
) -> dict[str, Menu]:
    """Return menus of factored options with losses by rank from 0 up; none for units without."""
    menus = {}
    for unit in units:
        menu = Menu.of(
            unit, ["factored"], bias=unit.has_bias, itemsize=4, multiple=multiple, minimum=minimum
        )
        if unit.name in curves:
            curve = np.asarray(curves[unit.name])
            ranks = menu.sections[0].levels[:, 0]
            menu = menu.with_losses([curve[ranks[ranks < len(curve)]]])
        menus[unit.name] = menu
    return menus


def by_loss(curve: object, budget: int, unit: LayerSpec | None = None, **options: int):
    menus = menus_of({"a": curve}, unit or spec("a", 8, 8), **options)
    return allocate_by_loss(menus, parameters(budget))


def test_one_unit_of_each_kind() -> None:
    """The steep curve gets the ranks, the flat one the least, the pinned one is dense."""
    units = [spec("steep", 20, 20), spec("flat", 20, 20), spec("pinned", 20, 20)]
    curves = {
        "steep": [10.0 * (1 - rank / 21) ** 2 for rank in range(21)],
        "flat": [1e-3 * (1 - rank / 21) ** 2 for rank in range(21)],
    }
    budget = parameters(400 + 40 * 9)
    allocation = allocate_by_loss(menus_of(curves, *units), budget, dense=["pinned"])
    assert allocation.options == factored(steep=8, flat=1, pinned=None)
    menus = menus_of(curves, *units)
    menus["flat"] = menus_of(curves, units[1], minimum=3)["flat"]
    allocation = allocate_by_loss(menus, budget, dense=["pinned"])
    assert allocation.options == factored(steep=6, flat=3, pinned=None)


def test_the_form_that_loses_less_for_its_bytes_is_taken() -> None:
    """The small rank has no room for an index; the large one is cheaper for leaving out more."""
    unit = spec("a", 20, 20)
    losses = np.linspace(2.0, 0.1, 20)
    menu = Menu.of(unit, ["factored", "pivoted"], bias=False, itemsize=2)
    menus = {"a": menu.with_losses([losses, losses])}  # one function in both forms
    options = {
        limit: str(allocate_by_loss(menus, Budget("bytes", limit)).options["a"])
        for limit in (80, 160, 560, 700, 800)
    }
    assert options == {
        80: "factored 1", 160: "factored 2", 560: "pivoted 7", 700: "pivoted 10", 800: "dense"
    }  # fmt: skip


def test_spends_the_rest_where_curves_are_flat() -> None:
    """Nothing is gained beyond rank 2, so equal units step up in the order of their names."""
    units = [spec(name, 20, 20) for name in ("b", "a", "c")]
    curves = {name: [2.0, 1.0, *[0.0] * 19] for name in "abc"}
    allocation = allocate_by_loss(menus_of(curves, *units), parameters(3 * 80 + 50))
    assert allocation.options == factored(b=2, a=3, c=2)


def test_a_unit_smaller_than_the_step_is_dense() -> None:
    units = [spec("small", 6, 30), spec("large", 30, 30)]
    curves = {"small": [5.0], "large": [3.0 - 0.1 * rank for rank in range(31)]}
    menus = menus_of(curves, *units, multiple=8)
    allocation = allocate_by_loss(menus, parameters(180 + 480))
    assert allocation.options == factored(small=None, large=8)


def test_minimum_is_rounded_up_and_may_leave_only_dense() -> None:
    unit = spec("a", 20, 20)  # ranks up to 9 are smaller than dense
    curve = [0.0] * 21
    assert by_loss(curve, 200, unit, multiple=4, minimum=3).options == factored(a=4)
    with pytest.raises(BudgetError, match=r"lower rank_multiple or the minimum rank"):
        by_loss(curve, 200, unit, multiple=4, minimum=5)
    assert by_loss(curve, 400, unit, multiple=4, minimum=9).options == factored(a=None)


def test_infeasible_budget_says_what_came_and_what_to_do() -> None:
    menus = menus_of({"a": [0.0] * 41}, spec("a", 40, 40), spec("b", 40, 40), minimum=3)
    with pytest.raises(BudgetError) as caught:
        allocate_by_loss(menus, parameters(1700), dense=["b"])
    message = str(caught.value)
    for part in ("1_700", "1_840", "2 units", "1 of them fixed dense", "0.5750", "minimum rank"):
        assert part in message, part


def test_levels_beyond_the_losses_are_not_on_offer() -> None:
    unit = spec("a", 20, 20)
    assert by_loss([3.0, 2.0, 1.0], 399, unit).options == factored(a=2)
    assert by_loss([3.0, 2.0, 1.0], 400, unit).options == factored(a=None)


def test_rounding_of_a_curve_is_flattened() -> None:
    """What is left of it would take rank 4 for a gain, and the rest only where nothing gains."""
    curve = np.array([1.0, 0.5, 0.5 + 1e-7, 0.2, -1e-7, 1e-8, 0.0, 0.0, 0.0])
    assert by_loss(curve, 48).options == factored(a=3)


def test_a_unit_without_losses_is_refused_by_name() -> None:
    units = spec("a", 8, 8), spec("b", 8, 8)
    menus = menus_of({"a": [1.0] * 9}, *units)
    message = r"1 of 2 units have no predicted losses, the first is b; calibrate with output"
    with pytest.raises(ValueError, match=message):
        allocate_by_loss(menus, parameters(100))
    allocation = allocate_by_loss(menus, parameters(100), dense={"b"})
    assert allocation.options == factored(a=2, b=None)


def test_says_when_a_proof_would_take_too_long(monkeypatch, caplog) -> None:
    solve = knapsack.solve
    curve = [float(8 - rank) for rank in range(9)]
    with caplog.at_level(logging.WARNING):
        by_loss(curve, 33)
        assert not caplog.text
        monkeypatch.setattr(
            knapsack, "solve", lambda *problem: replace(solve(*problem), bound=5.75)
        )
        assert by_loss(curve, 33).options == factored(a=2)
    assert "loss of 6 nats per token may be 0.25 above the least possible" in caplog.text
