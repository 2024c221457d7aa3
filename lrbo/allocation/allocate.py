"""Ratios or predicted losses -> one option per unit under a hard budget; no tensors."""

from __future__ import annotations

import heapq
import logging
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lrbo.allocation import knapsack
from lrbo.allocation.joint import joint_choices
from lrbo.errors import BudgetError
from lrbo.layers.form import DENSE_FORM
from lrbo.layers.forms import Codebook, Quantized, form_named, is_joint
from lrbo.layers.options import DENSE, Budget, Cost, Ladder, Losses, Measure, Menu, Option

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Allocation:
    """An option per unit, with its cost as its form counts it, and the budget that was met."""

    options: Mapping[str, Option]
    costs: Mapping[str, Cost]
    budget: Budget

    @cached_property
    def cost(self) -> Cost:
        """The cost of all units together."""
        return Cost.total(self.costs.values())

    @property
    def compressed(self) -> dict[str, Option]:
        """The options that are not dense, by unit."""
        return {name: option for name, option in self.options.items() if option != DENSE}

    @property
    def ranks(self) -> dict[str, dict[Option, int]]:
        """The families of the units that are not dense, with the rank of each."""
        return {n: {each.family: each.rank} for n, each in self.compressed.items()}


def dense_cost(menus: Mapping[str, Menu]) -> Cost:
    """Return the cost of all units while they are dense."""
    return Cost.total(menu.dense for menu in menus.values())


def smallest_cost(
    menus: Mapping[str, Menu],
    measure: Measure,
    dense: Collection[str] = (),
    *,
    any_form: bool = False,
) -> int:
    """Return the smallest budget that one form for all units can meet, which baselines have.

    It is the first form, as of ratios, or with ``any_form`` the cheapest; joint forms are none.
    Units of ``dense`` stay dense.
    """
    forms = forms_of(menus) or [DENSE_FORM]

    def needed(form: str) -> int:
        return sum(
            menu.dense.of(measure)
            if name in dense
            else int(menu.of_form(form).ladder(measure, None).prices[0])
            for name, menu in menus.items()
        )

    return min(map(needed, forms if any_form else forms[:1]))


def forms_of(menus: Mapping[str, Menu]) -> list[str]:
    """List the forms on some menus but dense and joint ones, in the order of preference."""
    sections = (section for menu in menus.values() for section in menu.sections[:-1])
    return list(dict.fromkeys(s.form for s in sections if not is_joint(s.form)))


def widest(menus: Mapping[str, Menu], budget: Budget) -> Allocation | None:
    """Return the dearest integers that all units can be within the budget; ``None`` if none are.

    Where integers of several families cost the same, it is the first. Units that cannot have them
    stay dense.
    """
    families = dict.fromkeys(
        section.family
        for menu in menus.values()
        for section in menu.sections
        if isinstance(form_named(section.form), Quantized | Codebook) and len(section.levels)
    )
    best: Allocation | None = None
    for family in families:
        indices = {name: menu.index(family.at(0)) for name, menu in menus.items()}
        alike = _allocation(menus, indices, budget)
        spent = alike.cost.of(budget.measure)
        is_cheaper = spent < dense_cost(menus).of(budget.measure)
        if (
            is_cheaper
            and spent <= budget.limit
            and (best is None or spent > best.cost.of(budget.measure))
        ):
            best = alike
    return best


def allocate(
    ratios: Mapping[str, float],
    menus: Mapping[str, Menu],
    budget: Budget,
    *,
    dense: Collection[str] = (),
) -> Allocation:
    """Turn wished ratios into options that use the whole budget.

    Each unit has the options of its first form, and dense, and starts at the cheapest. All wishes,
    ``scale * ratio * dense cost``, rise together; where a unit's wish reaches its next option, that
    is taken if it still fits, else the unit stays where it is. So

    - (a) the cost is at most the budget;
    - (b) no unit that is not dense can take its next option without breaking (a);
    - (c) a unit is dense as soon as its form would not be cheaper;
    - (d) the same input gives the same output, in any order of units;
    - (e) a larger budget never buys less: where one unit more of it first changes a decision, the
      option taken fits exactly and uses up the whole budget.

    Only the proportions of ``ratios`` count. Units of ``dense`` stay dense and need none.

    Raises:
        BudgetError: If even the cheapest options exceed the budget, naming one that would do.
        ValueError: If a unit has no ratio, or one that is not positive and finite.
    """
    measure = budget.measure
    ladders = {n: menu.ladder(measure, None) for n, menu in menus.items() if n not in dense}
    if bad := [name for name in ladders if not 0.0 < ratios.get(name, math.nan) < math.inf]:
        raise ValueError(
            f"{len(bad)} units have no positive ratio, the first is {bad[0]}: "
            f"{ratios.get(bad[0])!r}."
        )
    wishes = {name: ratios[name] * menus[name].dense.of(measure) for name in ladders}

    def scale(name: str, rung: int) -> float:
        return float(ladders[name].prices[rung] / wishes[name])

    room = _room(budget, ladders, menus)
    return _climb(menus, ladders, dict.fromkeys(ladders, 0), room, scale, budget, {})


def allocate_by_loss(
    menus: Mapping[str, Menu],
    budget: Budget,
    *,
    losses: Mapping[str, Losses] | None = None,
    dense: Collection[str] = (),
) -> Allocation:
    """Choose the options of least summed predicted loss within the budget.

    The minimum comes with a proof (:func:`lrbo.allocation.knapsack.solve`); where that takes too
    long, a warning states by how much the loss may exceed it, if by more than 1e-6 of it. Where
    losses are flat, the rest of the budget buys further options: the one with the largest predicted
    gain per cost first, ties by name, until none fits. So (a) to (d) of :func:`allocate` hold too.
    A larger budget never predicts a larger loss, but may leave more of it unused.

    Joint options, which several layers take together, are weighed against the combinations of
    their own options that are best at some price per cost; then the other layers are solved as
    above within what is left. So the result is optimal among those with the same joint options, is
    never worse than without any, and is not proven to be the best of all: a larger budget may then
    predict a larger loss.

    ``losses`` replace those of the menus. Units that they lack stay dense, and those of
    ``dense`` too.

    Raises:
        BudgetError: If even the cheapest options exceed the budget, naming one that would do.
        ValueError: If nothing is predicted of a unit.
    """
    given = {name: menu.losses for name, menu in menus.items()} if losses is None else losses
    names = sorted((menus.keys() & given.keys()) - set(dense))  # ties must not depend on order
    ladders = {name: menus[name].ladder(budget.measure, given[name]) for name in names}
    curves = {name: each.losses for name, each in ladders.items() if each.losses is not None}
    if unknown := [name for name in menus if name in ladders and name not in curves]:
        raise ValueError(
            f"{len(unknown)} of {len(menus)} units have no predicted losses, the first is "
            f"{unknown[0]}; calibrate with output gradients first."
        )

    def solved(left: Mapping[str, Ladder], ceiling: int) -> knapsack.Solution:
        prices = [ladder.prices for ladder in left.values()]
        return knapsack.solve(prices, [curves[name] for name in left], ceiling)

    ceiling = _room(budget, ladders, menus)
    ceiling += sum(int(ladder.prices[0]) for ladder in ladders.values())
    every, whole = ladders, ceiling
    best, joint = solved(ladders, ceiling), dict[str, int]()
    least = best.loss
    known = {name: np.asarray(given[name]) for name in curves}
    for taken in filter(None, joint_choices(menus, known, budget.measure, every, whole)):
        left = {name: ladder for name, ladder in every.items() if name not in taken}
        spent = sum(menus[n].cost(index).of(budget.measure) for n, index in taken.items())
        lost = math.fsum(float(known[name][index]) for name, index in taken.items())
        others = solved(left, whole - spent)
        if lost + others.loss < least:
            least = lost + others.loss
            best, joint, ladders, ceiling = others, taken, left, whole - spent
    if best.gap > knapsack.SMALL_GAP * best.loss:
        logger.warning(
            "the predicted loss of %g nats per token may be %g above the least possible: too many "
            "allocations lie that close for all to be searched.",
            best.loss,
            best.gap,
        )

    def rise(name: str, rung: int) -> float:
        before, after = ladders[name].prices[rung - 1 : rung + 1]
        return float((curves[name][rung] - curves[name][rung - 1]) / (after - before))

    start = dict(zip(ladders, best.choices, strict=True))
    return _climb(menus, ladders, start, ceiling - best.cost, rise, budget, joint)


def _room(budget: Budget, ladders: Mapping[str, Ladder], menus: Mapping[str, Menu]) -> int:
    """The budget less the cheapest options, or BudgetError; units without a ladder are dense."""
    measure = budget.measure
    smallest = sum(
        int(ladders[name].prices[0]) if name in ladders else menu.dense.of(measure)
        for name, menu in menus.items()
    )
    if smallest > budget.limit:
        needed = -(-smallest * 10_000 // dense_cost(menus).of(measure)) / 10_000  # rounded up
        raise BudgetError(
            f"budget of {budget} is below the {smallest:_} that {len(menus)} units need at their "
            f"cheapest options ({len(menus) - len(ladders)} of them fixed dense); raise "
            f"keep_ratio to at least {needed:.4f}, or offer cheaper options: lower rank_multiple "
            "or the minimum rank."
        )
    return budget.limit - smallest


def _climb(
    menus: Mapping[str, Menu],
    ladders: Mapping[str, Ladder],
    start: Mapping[str, int],
    room: int,
    urgency: Callable[[str, int], float],
    budget: Budget,
    joint: Mapping[str, int],
) -> Allocation:
    """Take rungs in order of urgency, lowest first; units without one are dense, or ``joint``."""
    rungs = dict(start)
    queue: list[tuple[float, str]] = []

    def enqueue(name: str) -> None:
        if rungs[name] + 1 < len(ladders[name]):
            heapq.heappush(queue, (urgency(name, rungs[name] + 1), name))

    for name in ladders:
        enqueue(name)
    while queue:
        _, name = heapq.heappop(queue)
        rung, prices = rungs[name] + 1, ladders[name].prices
        price = int(prices[rung] - prices[rung - 1])
        if price <= room:
            room -= price
            rungs[name] = rung
            enqueue(name)
    indices = {
        name: int(ladders[name].indices[rungs[name]])
        if name in ladders
        else joint.get(name, len(menu) - 1)
        for name, menu in menus.items()
    }
    return _allocation(menus, indices, budget)


def _allocation(
    menus: Mapping[str, Menu], indices: Mapping[str, int], budget: Budget
) -> Allocation:
    return Allocation(
        {name: menu.option(indices[name]) for name, menu in menus.items()},
        {name: menu.cost(indices[name]) for name, menu in menus.items()},
        budget,
    )
