"""Ratios become integers that fit the budget: never over, and nothing left that would fit."""

import json
import math
import re
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrbo.accounting import STORAGES, Storage, dense_parameters, low_rank_parameters
from lrbo.allocation import Allocation, Budget, allocate, rungs, smallest_parameters
from lrbo.errors import BudgetError
from lrbo.factorization.registry import METHODS
from lrbo.specs import LayerSpec
from tests import reference

# No tolerances: everything here is an integer.


def spec(name: str, out_features: int, in_features: int, has_bias: bool = False) -> LayerSpec:
    return LayerSpec(name, "kind", 0, out_features, in_features, has_bias, site=name)


def factored(layer: LayerSpec, rank: int) -> int:
    return low_rank_parameters(layer, rank, bias=layer.has_bias, storage="factored")


@dataclass(frozen=True)
class Problem:
    """Layers, wishes and settings; ``fullness`` places the budget between smallest and dense."""

    layers: list[LayerSpec]
    ratios: dict[str, float]
    method: str
    storage: Storage
    multiple: int
    dense: set[str]
    fullness: float

    def cost(self, layer: LayerSpec, rank: int) -> int:
        return METHODS[self.method].parameters(layer, rank, self.storage)

    @property
    def options(self) -> dict[str, object]:
        return {"cost": self.cost, "rank_multiple": self.multiple, "dense": self.dense}

    @property
    def smallest(self) -> int:
        return sum(
            layer.parameters
            if layer.name in self.dense
            else min(price for _, price in reference.ladder(layer, self.cost, self.multiple))
            for layer in self.layers
        )

    @property
    def budget(self) -> Budget:
        whole = sum(layer.parameters for layer in self.layers)
        return Budget(self.smallest + round(self.fullness * (whole + 5 - self.smallest)))

    def allocate(self) -> Allocation:
        return allocate(self.ratios, self.layers, self.budget, **self.options)


@st.composite
def problems(draw) -> Problem:
    side = st.integers(1, 24)
    shapes = draw(st.lists(st.tuples(side, side, st.booleans()), min_size=1, max_size=6))
    names = [f"layer{index}" for index in range(len(shapes))]
    # Few distinct values beside arbitrary ones: ties must be broken the same way each time.
    ratio = st.one_of(st.sampled_from([0.25, 0.5, 1.0]), st.floats(1e-3, 1e3))
    return Problem(
        layers=[spec(name, *shape) for name, shape in zip(names, shapes, strict=True)],
        ratios={name: draw(ratio) for name in names},
        method=draw(st.sampled_from(sorted(METHODS))),
        storage=draw(st.sampled_from(STORAGES)),
        multiple=draw(st.integers(1, 6)),
        dense=draw(st.sets(st.sampled_from(names), max_size=3)),
        fullness=draw(st.floats(0.0, 1.0)),
    )


def stored(layer: LayerSpec, rank: int | None, cost) -> int:
    return layer.parameters if rank is None else cost(layer, rank)


@given(problems())
@settings(max_examples=200)
def test_equals_the_plain_loop(problem: Problem) -> None:
    layers, ratios, budget = problem.layers, problem.ratios, problem.budget
    found = problem.allocate()
    expected = reference.allocate(
        ratios,
        layers,
        budget.parameters,
        problem.cost,
        problem.multiple,
        problem.dense,
    )
    assert dict(found.ranks) == expected
    assert list(found.ranks) == [layer.name for layer in layers]


@given(problems())
def test_fits_the_budget_and_counts_what_is_stored(problem: Problem) -> None:
    layers, budget = problem.layers, problem.budget
    found = problem.allocate()
    counted = sum(stored(layer, found.ranks[layer.name], problem.cost) for layer in layers)
    assert found.parameters == counted <= budget.parameters
    assert found.budget == budget


@given(problems())
def test_no_layer_could_take_one_more_step(problem: Problem) -> None:
    layers, budget = problem.layers, problem.budget
    found = problem.allocate()
    for layer in layers:
        rank = found.ranks[layer.name]
        if rank is None:
            continue
        steps = reference.ladder(layer, problem.cost, problem.multiple)
        place = [r for r, _ in steps].index(rank)
        price = steps[place + 1][1] - steps[place][1]
        assert found.parameters + price > budget.parameters, layer.name


@given(problems())
def test_dense_as_soon_as_low_rank_is_not_smaller(problem: Problem) -> None:
    layers = problem.layers
    found = problem.allocate()
    for layer in layers:
        rank = found.ranks[layer.name]
        if rank is not None:
            assert problem.cost(layer, rank) < layer.parameters
            assert rank > 0
            assert rank % problem.multiple == 0


@given(problems(), st.randoms(use_true_random=False))
def test_order_of_layers_is_irrelevant(problem: Problem, chooser) -> None:
    layers, ratios, budget = problem.layers, problem.ratios, problem.budget
    found = problem.allocate()
    shuffled = chooser.sample(layers, len(layers))
    reversed_wishes = dict(reversed(ratios.items()))
    other = allocate(reversed_wishes, shuffled, budget, **problem.options)
    assert dict(other.ranks) == dict(found.ranks)
    assert other.parameters == found.parameters


@given(problems(), st.sampled_from([0.25, 2.0, 1024.0]))
def test_only_proportions_of_the_wishes_decide(problem: Problem, factor: float) -> None:
    layers, ratios, budget = problem.layers, problem.ratios, problem.budget
    scaled = {name: factor * ratio for name, ratio in ratios.items()}  # powers of 2: exact
    assert allocate(scaled, layers, budget, **problem.options) == allocate(
        ratios, layers, budget, **problem.options
    )


@given(problems(), st.integers(1, 300))
@settings(max_examples=200)
def test_a_larger_budget_never_gives_fewer_parameters(problem: Problem, more: int) -> None:
    layers, ratios, budget = problem.layers, problem.ratios, problem.budget
    small = problem.allocate()
    large = allocate(ratios, layers, Budget(budget.parameters + more), **problem.options)
    assert large.parameters >= small.parameters


def test_total_is_monotone_over_every_budget_of_a_case() -> None:
    layers = [spec("a", 9, 7), spec("b", 12, 5, True), spec("c", 4, 30), spec("d", 8, 8)]
    ratios = {"a": 0.3, "b": 0.7, "c": 0.2, "d": 0.5}
    least = smallest_parameters(layers, cost=factored)
    totals = [
        allocate(ratios, layers, Budget(ceiling), cost=factored).parameters
        for ceiling in range(least, dense_parameters(layers) + 1)
    ]
    assert totals[0] == least
    assert totals[-1] == dense_parameters(layers)
    assert totals == sorted(totals)


@given(problems())
def test_json_round_trip(problem: Problem) -> None:
    found = problem.allocate()
    again = Allocation.from_json(found.to_json())
    assert again == found
    assert list(again.ranks) == list(found.ranks)
    assert "\n" not in found.to_json()


@pytest.mark.parametrize(
    "change",
    [
        {"ranks": None},
        {"ranks": [1, 2]},
        {"ranks": {"a": "two"}},
        {"ranks": {"a": 2.5}},
        {"parameters": "many"},
        {"budget": 7},
        {"budget": {}},
        {"budget": {"parameters": None}},
    ],
)
def test_damaged_json_is_refused(change: dict[str, object]) -> None:
    fields = {"ranks": {"a": 2}, "parameters": 10, "budget": {"parameters": 12}}
    assert Allocation.from_dict(fields).ranks == {"a": 2}
    with pytest.raises(ValueError, match="allocation"):
        Allocation.from_json(json.dumps({**fields, **change}))
    for name in fields:
        with pytest.raises(ValueError, match=name):
            Allocation.from_dict({k: v for k, v in fields.items() if k != name})


@given(problems())
@settings(max_examples=200)
def test_infeasible_budget_names_a_keep_ratio_that_is_feasible(problem: Problem) -> None:
    layers, ratios, least = problem.layers, problem.ratios, problem.smallest
    with pytest.raises(BudgetError) as caught:
        allocate(ratios, layers, Budget(least - 1), **problem.options)
    stated = float(re.search(r"keep_ratio to at least (\d\.\d+)", str(caught.value))[1])
    found = allocate(ratios, layers, Budget.from_keep_ratio(layers, stated), **problem.options)
    assert found.parameters >= least
    # And it is the smallest at the four digits that are shown.
    lower = stated - 1e-4
    if lower > 0:
        assert lower * dense_parameters(layers) < least


def test_infeasible_budget_says_what_came_and_what_to_do() -> None:
    layers = [spec("a", 40, 40), spec("b", 40, 40)]
    with pytest.raises(BudgetError) as caught:
        allocate(
            {"a": 1.0, "b": 1.0}, layers, Budget(1500), cost=factored, rank_multiple=4, dense=["b"]
        )
    message = str(caught.value)
    for part in ("1_500", "1_920", "2 layers", "1 of them fixed dense", "0.6000", "(4)"):
        assert part in message, part


def test_a_layer_smaller_than_the_step_is_dense() -> None:
    layers = [spec("small", 6, 30), spec("large", 30, 30)]
    ratios = {"small": 0.1, "large": 1.0}
    found = allocate(ratios, layers, Budget(180 + 480), cost=factored, rank_multiple=8)
    assert found.ranks == {"small": None, "large": 8}
    with pytest.raises(BudgetError, match=r"keep_ratio to at least 1\.0000 or lower rank_multiple"):
        allocate(ratios, layers, Budget(1079), cost=factored, rank_multiple=31)


def test_pinned_layers_stay_dense_and_need_no_wish() -> None:
    layers = [spec("a", 20, 20), spec("b", 20, 20), spec("c", 20, 20)]
    found = allocate({"a": 1.0, "c": 3.0}, layers, Budget(900), cost=factored, dense={"b"})
    assert found.ranks["b"] is None
    assert found.parameters <= 900
    # With pinning, the rest of the budget is shared 1 : 3 by the others.
    assert found.ranks == {"a": 3, "b": None, "c": 9}
    assert found.parameters == 120 + 400 + 360


@pytest.mark.parametrize("ratio", [0.0, -0.5, math.nan, math.inf, None])
def test_a_wish_that_is_no_positive_number_is_refused_by_name(ratio: float | None) -> None:
    layers = [spec("good", 8, 8), spec("bad", 8, 8)]
    ratios = {"good": 0.5} if ratio is None else {"good": 0.5, "bad": ratio}
    with pytest.raises(ValueError, match=r"1 layers .* bad: "):
        allocate(ratios, layers, Budget(100), cost=factored)


@given(problems())
def test_smallest_parameters_is_the_border_of_what_can_be_met(problem: Problem) -> None:
    least = problem.smallest
    assert smallest_parameters(problem.layers, **problem.options) == least
    tightest = allocate(problem.ratios, problem.layers, Budget(least), **problem.options)
    assert tightest.parameters == least
    with pytest.raises(BudgetError):
        allocate(problem.ratios, problem.layers, Budget(least - 1), **problem.options)


@given(problems())
def test_rungs_rise_and_end_dense(problem: Problem) -> None:
    for layer in problem.layers:
        steps = rungs(layer, problem.cost, problem.multiple)
        assert steps == reference.ladder(layer, problem.cost, problem.multiple)
        prices = [parameters for _, parameters in steps]
        assert prices == sorted(set(prices))


@given(st.integers(1, 100), st.integers(1, 100), st.booleans())
def test_keep_ratio_of_hundredths_is_exact(percent: int, size: int, has_bias: bool) -> None:
    """0.57 of 100 is 57, although 0.57 * 100 is 56.99999999999999 in binary."""
    layers = [spec("a", size, 10, has_bias)]
    expected = percent * layers[0].parameters // 100
    assert Budget.from_keep_ratio(layers, percent / 100).parameters == expected


@pytest.mark.parametrize("keep_ratio", [0.0, -0.1, 1.0001, math.nan])
def test_keep_ratio_outside_its_range_is_refused(keep_ratio: float) -> None:
    with pytest.raises(ValueError, match=re.escape(f"keep_ratio={keep_ratio}")):
        Budget.from_keep_ratio([spec("a", 4, 4)], keep_ratio)
