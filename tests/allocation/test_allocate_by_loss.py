"""Ranks of least predicted loss: against every allocation there is, and never over budget."""

import itertools
import logging
import math
import re
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrbo import knapsack
from lrbo.accounting import STORAGES, Storage, dense_parameters, low_rank_parameters
from lrbo.allocation import Allocation, Budget, allocate_by_loss
from lrbo.errors import BudgetError
from lrbo.specs import LayerSpec
from tests import reference

# No tolerances: parameters are integers, and so are losses where allocations are compared.


def spec(name: str, out_features: int, in_features: int, has_bias: bool = False) -> LayerSpec:
    return LayerSpec(name, "kind", 0, out_features, in_features, has_bias, site=name)


def factored(layer: LayerSpec, rank: int) -> int:
    return low_rank_parameters(layer, rank, bias=layer.has_bias, storage="factored")


@dataclass(frozen=True)
class Problem:
    """Layers with whole-number loss curves, flat, convex or neither.

    ``fullness`` places the budget between the smallest ranks and dense.
    """

    layers: list[LayerSpec]
    curves: dict[str, list[float]]
    storage: Storage
    multiple: int
    dense: set[str]
    minimum: dict[str, int] | int
    fullness: float

    def cost(self, layer: LayerSpec, rank: int) -> int:
        return low_rank_parameters(layer, rank, bias=layer.has_bias, storage=self.storage)

    def ladder(self, layer: LayerSpec) -> list[tuple[int | None, int]]:
        """Return what the layer may hold: below its curve's end, from its minimum on, or dense."""
        if layer.name in self.dense:
            return [(None, layer.parameters)]
        floor = self.minimum
        floor = floor if isinstance(floor, int) else floor.get(layer.name, 0)
        known = len(self.curves[layer.name])
        steps = reference.ladder(layer, self.cost, self.multiple)
        return [(rank, price) for rank, price in steps if rank is None or floor <= rank < known]

    @property
    def smallest(self) -> int:
        return sum(self.ladder(layer)[0][1] for layer in self.layers)

    @property
    def budget(self) -> Budget:
        whole = dense_parameters(self.layers)
        return Budget(self.smallest + round(self.fullness * (whole + 5 - self.smallest)))

    def allocate(self, budget: Budget | None = None) -> Allocation:
        return allocate_by_loss(
            self.curves,
            self.layers,
            self.budget if budget is None else budget,
            cost=self.cost,
            rank_multiple=self.multiple,
            dense=self.dense,
            minimum=self.minimum,
        )

    def loss(self, ranks: dict[str, int | None]) -> float:
        return sum(0.0 if rank is None else self.curves[name][rank] for name, rank in ranks.items())

    def least_loss(self) -> float:
        """Return the least loss of all allocations, each tried."""
        ladders = [self.ladder(layer) for layer in self.layers]
        names = [layer.name for layer in self.layers]
        return min(
            self.loss({name: rank for name, (rank, _) in zip(names, chosen, strict=True)})
            for chosen in itertools.product(*ladders)
            if sum(price for _, price in chosen) <= self.budget.parameters
        )


@st.composite
def problems(draw) -> Problem:
    shapes = draw(
        st.lists(
            st.tuples(st.integers(1, 11), st.integers(1, 11), st.booleans()),
            min_size=1,
            max_size=4,
        )
    )
    layers = [spec(f"layer{index}", *shape) for index, shape in enumerate(shapes)]
    names = [layer.name for layer in layers]
    multiple = draw(st.integers(1, 4))
    minimum = draw(
        st.one_of(st.integers(0, 5), st.dictionaries(st.sampled_from(names), st.integers(0, 5)))
    )
    curves = {}
    for layer in layers:
        floor = minimum if isinstance(minimum, int) else minimum.get(layer.name, 0)
        full = min(layer.out_features, layer.in_features)
        first = max(-(-floor // multiple) * multiple, multiple)
        length = draw(st.integers(min(first, full) + 1, full + 1))
        drop = st.sampled_from([0, 0, 1, 2, 7]) if draw(st.booleans()) else st.integers(0, 1000)
        drops = draw(st.lists(drop, min_size=length, max_size=length))
        curves[layer.name] = [float(sum(drops[rank:])) for rank in range(length)]
    return Problem(
        layers=layers,
        curves=curves,
        storage=draw(st.sampled_from(STORAGES)),
        multiple=multiple,
        dense=draw(st.sets(st.sampled_from(names), max_size=2)),
        minimum=minimum,
        fullness=draw(st.one_of(st.just(0.0), st.just(1.0), st.floats(0.0, 1.0))),
    )


@given(problems())
@settings(max_examples=150)
def test_equals_every_allocation_tried(problem: Problem) -> None:
    found = problem.allocate()
    assert problem.loss(found.ranks) == problem.least_loss()
    assert list(found.ranks) == [layer.name for layer in problem.layers]
    assert Allocation.from_json(found.to_json()) == found


@given(problems())
@settings(max_examples=150)
def test_keeps_the_promises(problem: Problem) -> None:
    layers, budget = problem.layers, problem.budget
    found = problem.allocate()
    counted = sum(dict(problem.ladder(layer))[found.ranks[layer.name]] for layer in layers)
    assert found.parameters == counted <= budget.parameters
    assert found.budget == budget
    for layer in layers:
        steps = problem.ladder(layer)
        place = [rank for rank, _ in steps].index(found.ranks[layer.name])  # on offer at all
        if place + 1 < len(steps):
            price = steps[place + 1][1] - steps[place][1]
            assert found.parameters + price > budget.parameters, layer.name


@given(problems(), st.randoms(use_true_random=False))
def test_order_of_layers_is_irrelevant(problem: Problem, chooser) -> None:
    found = problem.allocate()
    shuffled = replace(
        problem,
        layers=chooser.sample(problem.layers, len(problem.layers)),
        curves=dict(reversed(problem.curves.items())),
    )
    assert dict(shuffled.allocate().ranks) == dict(found.ranks)


@given(problems(), st.sampled_from([0.5, 3.0, 1000.0]))
def test_only_proportions_of_the_losses_decide(problem: Problem, factor: float) -> None:
    scaled = {name: [factor * loss for loss in curve] for name, curve in problem.curves.items()}
    found, other = problem.allocate(), replace(problem, curves=scaled).allocate()
    assert problem.loss(other.ranks) == problem.loss(found.ranks)


@given(problems(), st.integers(1, 60))
def test_a_larger_budget_never_loses_more(problem: Problem, more: int) -> None:
    small = problem.allocate()
    large = problem.allocate(Budget(problem.budget.parameters + more))
    assert problem.loss(large.ranks) <= problem.loss(small.ranks)


@given(problems())
def test_the_border_of_what_can_be_met(problem: Problem) -> None:
    least = problem.smallest
    assert problem.allocate(Budget(least)).parameters == least
    with pytest.raises(BudgetError) as caught:
        problem.allocate(Budget(least - 1))
    stated = float(re.search(r"keep_ratio to at least (\d\.\d+)", str(caught.value))[1])
    found = problem.allocate(Budget.from_keep_ratio(problem.layers, stated))
    assert found.parameters >= least


def by_loss(curve: object, layer: LayerSpec | None = None, budget: int = 10**6, **options):
    layer = layer or spec("a", 8, 8)
    curves = {} if curve is None else {"a": curve}
    return allocate_by_loss(curves, [layer], Budget(budget), cost=factored, **options)


def test_one_layer_of_each_kind() -> None:
    """The steep curve gets the ranks, the flat one the least, the pinned one is dense."""
    layers = [spec("steep", 20, 20), spec("flat", 20, 20), spec("pinned", 20, 20)]
    curves = {
        "steep": [10.0 * (1 - rank / 21) ** 2 for rank in range(21)],
        "flat": [1e-3 * (1 - rank / 21) ** 2 for rank in range(21)],
    }
    budget = Budget(400 + 40 * 9)
    found = allocate_by_loss(curves, layers, budget, cost=factored, dense=["pinned"])
    assert found.ranks == {"steep": 8, "flat": 1, "pinned": None}
    found = allocate_by_loss(
        curves, layers, budget, cost=factored, dense=["pinned"], minimum={"flat": 3}
    )
    assert found.ranks == {"steep": 6, "flat": 3, "pinned": None}


def test_spends_the_rest_where_curves_are_flat() -> None:
    """Nothing is gained beyond rank 2, so equal layers step up in the order of their names."""
    layers = [spec(name, 20, 20) for name in ("b", "a", "c")]
    curves = {name: [2.0, 1.0, *[0.0] * 19] for name in "abc"}
    found = allocate_by_loss(curves, layers, Budget(3 * 80 + 50), cost=factored)
    assert found.ranks == {"b": 2, "a": 3, "c": 2}


def test_a_layer_smaller_than_the_step_is_dense() -> None:
    layers = [spec("small", 6, 30), spec("large", 30, 30)]
    curves = {"small": [5.0], "large": [3.0 - 0.1 * rank for rank in range(31)]}
    found = allocate_by_loss(curves, layers, Budget(180 + 480), cost=factored, rank_multiple=8)
    assert found.ranks == {"small": None, "large": 8}


def test_minimum_is_rounded_up_and_may_leave_only_dense() -> None:
    layer = spec("a", 20, 20)  # ranks up to 9 are smaller than dense
    curve = [0.0] * 21
    assert by_loss(curve, layer, 200, rank_multiple=4, minimum=3).ranks == {"a": 4}
    with pytest.raises(BudgetError, match=r"lower rank_multiple \(4\) or the minimum ranks"):
        by_loss(curve, layer, 200, rank_multiple=4, minimum=5)
    assert by_loss(curve, layer, 400, rank_multiple=4, minimum=9).ranks == {"a": None}


def test_infeasible_budget_says_what_came_and_what_to_do() -> None:
    layers = [spec("a", 40, 40), spec("b", 40, 40)]
    with pytest.raises(BudgetError) as caught:
        allocate_by_loss(
            {"a": [0.0] * 41}, layers, Budget(1700), cost=factored, dense=["b"], minimum=3
        )
    message = str(caught.value)
    for part in ("1_700", "1_840", "2 layers", "1 of them fixed dense", "0.5750", "minimum ranks"):
        assert part in message, part


def test_ranks_beyond_the_curve_are_not_on_offer() -> None:
    layer = spec("a", 20, 20)
    assert by_loss([3.0, 2.0, 1.0], layer, 399).ranks == {"a": 2}
    assert by_loss([3.0, 2.0, 1.0], layer, 400).ranks == {"a": None}


@pytest.mark.parametrize("dtype", [np.float32, np.float64, list])
def test_rounding_of_a_curve_is_flattened(dtype) -> None:
    values = np.array([1.0, 0.5, 0.5 + 1e-7, 0.2, -1e-7, 1e-8, 0.0, 0.0, 0.0])
    curve = values.tolist() if dtype is list else values.astype(dtype)
    assert by_loss(curve, budget=48).ranks == {"a": 3}


@pytest.mark.parametrize(
    ("curve", "message"),
    [
        (None, r"a: there is none"),
        ([1.0, math.nan, 0.5, math.inf], r"a: 2 of 4 values are not finite, .* rank 1: nan"),
        ([1.0, 0.5, -0.25, -0.5], r"a: 2 of 4 values are negative, .* rank 2: -0.25"),
        ([1.0, 0.5, 0.7, 0.5, 0.6], r"a: 2 of 5 values are above .* rank 2: 0.7 after 0.5"),
        ([-1.0, -2.0], r"a: 2 of 2 values are negative, .* rank 0: -1.0"),
        ([1.0], r"a: a shape of \(1,\); expected .* at most 9, and its smallest rank .* is 1\."),
        ([1.0] * 10, r"a: a shape of \(10,\); expected .* at most 9"),
        (np.ones((9, 1)), r"a: a shape of \(9, 1\)"),
        ([], r"a: a shape of \(0,\)"),
    ],
)
def test_refuses_what_is_no_loss_curve(curve: object, message: str) -> None:
    with pytest.raises(ValueError, match="1 of 1 layers have no usable loss curve.*" + message):
        by_loss(curve)


def test_refuses_a_minimum_of_unknown_layers() -> None:
    with pytest.raises(ValueError, match=r"minimum names 1 layers .* the first is b;"):
        by_loss([1.0] * 9, minimum={"a": 2, "b": 2})


def test_pinned_layers_need_no_curve() -> None:
    assert by_loss(None, budget=64, dense={"a"}).ranks == {"a": None}


def test_says_when_a_proof_would_take_too_long(monkeypatch, caplog) -> None:
    solve = knapsack.solve
    curve = [float(8 - rank) for rank in range(9)]
    with caplog.at_level(logging.WARNING):
        by_loss(curve, budget=33)
        assert not caplog.text
        monkeypatch.setattr(
            knapsack, "solve", lambda *problem: replace(solve(*problem), bound=5.75)
        )
        assert by_loss(curve, budget=33).ranks == {"a": 2}
    assert "loss of 6 nats per token may be 0.25 above the least possible" in caplog.text
