"""A problem, and search spaces: points, and the allocations of the problem they stand for."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Any

import torch

from lrbo.allocation.allocate import (
    Allocation,
    allocate,
    allocate_by_loss,
    dense_cost,
    forms_of,
    smallest_cost,
    widest,
)
from lrbo.allocation.transfer import Donor, transferred_ratios
from lrbo.config.choices import KEEP_RATIO
from lrbo.errors import BudgetError
from lrbo.factorization.factors import Curve
from lrbo.factorization.prepared import Prepared
from lrbo.layers.form import DENSE_FORM
from lrbo.layers.options import Budget, Cost, Losses, Menu
from lrbo.models.specs import LayerSpec
from lrbo.trials.records import Origin

Limits = tuple[float, float]
Point = Mapping[str, float]  # {} where an allocation stands at no point
Start = str | Donor
STARTS = ("uniform", "analytic", "start")
LEAST_RATIO = 1e-3


@dataclass(frozen=True)
class Problem:
    """The menus of all units that a budget covers; the search keeps some of the units dense."""

    menus: Mapping[str, Menu]
    budget: Budget
    dense: tuple[str, ...] = ()

    @property
    def units(self) -> tuple[LayerSpec, ...]:
        """All units that the budget covers."""
        return tuple(menu.unit for menu in self.menus.values())

    @cached_property
    def dense_cost(self) -> Cost:
        """The cost of all units while they are dense."""
        return dense_cost(self.menus)

    @property
    def is_predicted(self) -> bool:
        """Whether losses are predicted."""
        return all(menu.losses is not None for menu in self.menus.values())

    @property
    def keep_ratio(self) -> float:
        """The share of the dense cost that the budget keeps."""
        return self.budget.limit / self.dense_cost.of(self.budget.measure)

    def price(self, names: Iterable[str]) -> int:
        """Return the dense cost of some units, in the measure of the budget."""
        return sum(self.menus[name].dense.of(self.budget.measure) for name in names)

    def keeping(self, keep_ratio: float) -> Problem:
        """Return the problem under the budget of a keep ratio, of the same measure."""
        budget = Budget.keeping(keep_ratio, self.dense_cost, self.budget.measure)
        return replace(self, budget=budget)

    def with_losses(self, prepared: Mapping[str, Prepared], curve: Curve = "loss") -> Problem:
        """Return the problem with predicted losses or another curve, or itself if there is none."""
        menus = {}
        for name, menu in self.menus.items():
            if name not in prepared:  # it can only be dense
                menus[name] = menu.only_dense()
                continue
            losses = [prepared[name].losses(section, curve) for section in menu.sections[:-1]]
            known = [each for each in losses if each is not None]
            if len(known) < len(losses):
                return self
            menus[name] = menu.with_losses(known)
        return replace(self, menus=menus)

    def share(self, allocation: Allocation, names: Iterable[str] | None = None) -> float:
        """Return the cost of units over their dense cost; by default of all of them."""
        names = list(self.menus if names is None else names)
        measure = self.budget.measure
        return sum(allocation.costs[name].of(measure) for name in names) / self.price(names)

    def by_ratio(self, ratios: Mapping[str, float]) -> Allocation:
        """Turn ratios that are wished for into options that use the whole budget.

        Of layers that were skipped elsewhere the ratio is 0; they get the least that there is.
        """
        wishes = {name: LEAST_RATIO if ratio == 0 else ratio for name, ratio in ratios.items()}
        return allocate(wishes, self.menus, self.budget, dense=self.dense)

    def by_loss(self, losses: Mapping[str, Losses] | None = None) -> Allocation:
        """Return the options of least summed predicted loss, of the menus or as given."""
        return allocate_by_loss(self.menus, self.budget, losses=losses, dense=self.dense)

    def predicted(self, allocation: Allocation) -> float | None:
        """Return the summed predicted loss of options, ``None`` where nothing is predicted."""
        if not self.is_predicted:
            return None
        return math.fsum(
            float(menu.losses[menu.index(allocation.options[name])])
            for name, menu in self.menus.items()
            if menu.losses is not None
        )

    def uniform(self) -> Allocation:
        """Return the baseline: one choice for all units, also those that a search keeps dense.

        The widest integers that the budget allows everywhere; one wished ratio where it allows
        none, of the first form in which it can be met.

        Raises:
            BudgetError: If no form alone can meet it.
        """
        alike = widest(self.menus, self.budget)
        if alike is not None:
            return alike
        refused: BudgetError | None = None
        for form in forms_of(self.menus) or [DENSE_FORM]:
            menus = {name: menu.of_form(form) for name, menu in self.menus.items()}
            try:
                return allocate(dict.fromkeys(menus, 1.0), menus, self.budget)
            except BudgetError as error:
                refused = refused or error
        assert refused is not None
        raise refused

    def require_feasible(self, lower: float = 0.0, *, relief: str, any_form: bool = False) -> None:
        """Refuse a budget that the cheapest options or the lower bound of ratios exceed.

        With ``any_form`` those of the form that is cheapest for all units, else of the first.

        Raises:
            BudgetError: With the smallest feasible keep ratio, and the keys that give ``relief``.
        """
        budget = self.budget
        total = self.dense_cost.of(budget.measure)
        pinned = self.price(self.dense)
        # Of the decimal that was typed: in binary, 0.07 of 100 is 7.000000000000001.
        at_bounds = pinned + math.ceil(Fraction(str(float(lower))) * (total - pinned))
        needed = max(
            smallest_cost(self.menus, budget.measure, self.dense, any_form=any_form), at_bounds
        )
        if needed > budget.limit:
            raise BudgetError(
                f"budget of {budget} (keep_ratio {self.keep_ratio:.4f}) cannot be met: "
                f"{len(self.dense)} units stay dense with {pinned:_} and the others need at least "
                f"{needed - pinned:_}, at ratio {lower:g} or their cheapest options. The smallest "
                f"feasible budget.keep_ratio is {-(-needed * 10_000 // total) / 10_000:.4f}; or "
                f"lower {relief}."
            )


@dataclass(frozen=True)
class LinearConstraint:
    """A bound on a weighted sum of variables: the sum is at most it, or equal to it."""

    weights: Mapping[str, float]
    bound: float
    is_equality: bool


@dataclass(frozen=True)
class WarmStart:
    """A trial that needs no search."""

    origin: Origin
    point: Point
    allocation: Allocation


@dataclass(frozen=True)
class Space(ABC):
    """The points of a search, and the allocations that they stand for."""

    problem: Problem  # over a range of budgets, under the largest of them
    bounds: Mapping[str, Limits]  # smallest and largest value of each variable, in order

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the variables, in order."""
        return tuple(self.bounds)

    @property
    def constraint(self) -> LinearConstraint | None:
        """The budget, unless every point within the bounds meets it."""
        return None

    def of(self, problem: Problem) -> Space:
        """Return the space of another problem with the same units."""
        return replace(self, problem=problem)

    def with_prepared(self, prepared: Mapping[str, Prepared]) -> Space:
        """Return the space with what it must know of the units beside their losses: nothing."""
        del prepared
        return self

    @abstractmethod
    def allocate(self, point: Point) -> Allocation:
        """Turn a point into options that use the whole budget."""

    @abstractmethod
    def realised(self, allocation: Allocation, point: Point) -> Point:
        """Return the point of an allocation for the surrogate, which may differ from ``point``."""

    def start_point(self) -> Point:
        """Return the configured start, ``{}`` if there is none."""
        return {}

    def analytic_point(self) -> Point:
        """Return the point of the allocation of least predicted loss, ``{}`` if there is none."""
        return {}

    def project(self, point: Point) -> dict[str, float]:
        """Return the nearest point (Euclidean) within the bounds that uses the budget up.

        The constraint, whose weights are positive, is met with equality unless all upper bounds
        stay below it.
        """
        values = torch.tensor([point[name] for name in self.names], dtype=torch.float64)
        lower, upper = torch.tensor([*self.bounds.values()], dtype=torch.float64).T
        constraint = self.constraint
        if constraint is None:
            return dict(zip(self.names, values.clamp(lower, upper).tolist(), strict=True))
        weights = torch.tensor([*constraint.weights.values()], dtype=torch.float64)

        def at(multiplier: float) -> torch.Tensor:
            return (values + multiplier * weights).clamp(lower, upper)

        low, high = -1.0, 1.0
        while float(at(low) @ weights) > constraint.bound and low > -1e9:
            low *= 2
        while float(at(high) @ weights) < constraint.bound and high < 1e9:
            high *= 2
        for _ in range(100):
            middle = (low + high) / 2
            fits = float(at(middle) @ weights) <= constraint.bound
            low, high = (middle, high) if fits else (low, middle)
        return dict(zip(self.names, at(low).tolist(), strict=True))

    def warm_starts(self, starts: Sequence[Start]) -> list[WarmStart]:
        """Return the trials that need no search; ``starts`` are some of ``STARTS``, and donors.

        Donors leave out what a baseline or an earlier donor has; one that has nothing but baselines
        keeps its first trial. Baselines stay, since reports compare with each of them.

        Raises:
            ConfigError: If a donor has no layers of a kind that the model has.
        """
        parts = [self.starts(start) for start in starts]
        baselines = [
            each.allocation.options for part in parts for each in part if each.origin != "transfer"
        ]
        known, trials = list(baselines), list[WarmStart]()
        for start, part in zip(starts, parts, strict=True):
            if isinstance(start, Donor):
                own = [each.allocation.options for each in part]
                is_repeated = any(each in known[len(baselines) :] for each in own)
                new = [part[i] for i, each in enumerate(own) if each not in (*known, *own[:i])]
                part = new or ([] if is_repeated else part[:1])
                known += [each.allocation.options for each in part]
            trials += part
        return trials

    def starts(self, start: Start) -> list[WarmStart]:
        """Return the trials of one warm start, none if the space does not have it."""
        point: Point = {}
        if isinstance(start, Donor):
            origin: Origin = "transfer"
            allocation, point = self._transferred(start)
        elif start == "uniform":
            origin, allocation = "uniform", self.problem.uniform()
        elif start == "analytic":
            if not self.problem.is_predicted:
                return []
            return [WarmStart("analytic", self.analytic_point(), self.problem.by_loss())]
        elif point := self.start_point():
            origin, allocation = "start", self.allocate(point)
        else:
            return []
        return [WarmStart(origin, self.realised(allocation, point), allocation)]

    def _transferred(self, donor: Donor) -> tuple[Allocation, Point]:
        """Take a donor's point where it has these variables, else its ratios."""
        trial = donor.at(self.problem.keep_ratio)
        if trial.variables and set(self.names) == set(trial.variables) - {KEEP_RATIO}:
            point = self.project(trial.variables)
            return self.allocate(point), point
        ratios = transferred_ratios(donor.name, trial.profile, self.problem.units)
        return self.problem.by_ratio(ratios), {}


def sobol_point(space: Space, index: int, seed: int) -> dict[str, float]:
    """Return a point of a scrambled Sobol sequence over the bounds, projected into the space.

    Ax's own initial design collapses to near copies under a tight constraint.
    """
    make: Any = torch.quasirandom.SobolEngine  # untyped in torch
    engine = make(len(space.names), scramble=True, seed=seed)
    unit = engine.fast_forward(index).draw(1, dtype=torch.float64)[0].tolist()
    return space.project(
        {
            name: low + (high - low) * value
            for value, (name, (low, high)) in zip(unit, space.bounds.items(), strict=True)
        }
    )
