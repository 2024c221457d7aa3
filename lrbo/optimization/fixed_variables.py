"""A search space with some variables fixed, bounded or tied to each other."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lrbo.allocation import Allocation, Budget, Cost
from lrbo.errors import BudgetError, ConfigError
from lrbo.optimization.base import (
    BudgetSpace,
    LinearConstraint,
    Start,
    WarmStart,
    known_starts,
    project,
    sobol_within,
)
from lrbo.sensitivity import Curves
from lrbo.specs import LayerSpec

Limits = tuple[float, float]

# A ratio of an allocation that was not made in the space may differ so much from a fixed one.
CLOSE = 0.02


@dataclass(frozen=True)
class RestrictedSpace:
    """A space of which only some directions are searched.

    Attributes:
        inside: The whole space.
        members: Variables of the space inside by the variable that stands for them here: the
            first of those that are tied, or the variable itself.
        limits: Smallest and largest value of each variable here.
        fixed: Values of the variables inside that are not searched.
    """

    inside: BudgetSpace
    members: Mapping[str, tuple[str, ...]]
    limits: Mapping[str, Limits]
    fixed: Mapping[str, float]

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the variables, in order."""
        return tuple(self.members)

    @property
    def bounds(self) -> Mapping[str, tuple[float, float]]:
        """Return the smallest and largest value of each variable."""
        return self.limits

    @property
    def constraint(self) -> LinearConstraint | None:
        """Return the constraint of the space inside, with what is fixed taken off its bound."""
        whole = self.inside.constraint
        if whole is None:
            return None
        weights = {
            name: sum(whole.weights[member] for member in members)
            for name, members in self.members.items()
        }
        bound = whole.bound - sum(whole.weights[name] * x for name, x in self.fixed.items())
        largest = sum(weights[name] * high for name, (_, high) in self.limits.items())
        return LinearConstraint(weights, bound, whole.is_equality and bound < largest)

    @property
    def budget(self) -> Budget:
        """Return the ceiling."""
        return self.inside.budget

    @property
    def cost(self) -> Cost:
        """Return the stored parameters of a layer at a rank."""
        return self.inside.cost

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """Return all layers that the budget covers."""
        return self.inside.layers

    @property
    def dense(self) -> tuple[str, ...]:
        """Return the layers that no trial of the search compresses."""
        return self.inside.dense

    @property
    def rank_multiple(self) -> int:
        """Return what ranks are multiples of."""
        return self.inside.rank_multiple

    def at(self, budget: Budget) -> RestrictedSpace:
        """Return the space under another budget."""
        return replace(self, inside=self.inside.at(budget))

    def with_curves(self, curves: Curves) -> RestrictedSpace:
        """Return the space with the loss curves of the layers."""
        return replace(self, inside=self.inside.with_curves(curves))

    def warm_starts(self, wanted: Sequence[Start]) -> list[WarmStart]:
        """Return the trials that need no search."""
        return known_starts(self, wanted)

    def allocate(self, point: Mapping[str, float]) -> Allocation:
        """Turn a point into ranks that use the whole budget."""
        return self.inside.allocate(self._whole(point))

    def uniform(self) -> Allocation:
        """Return the baseline: the same wished ratio for every layer that the budget covers."""
        return self.inside.uniform()

    def analytic(self) -> tuple[Allocation, Mapping[str, float]] | None:
        """Return the allocation of least predicted loss, with its point, ``{}`` if none."""
        found = self.inside.analytic()
        return found and (found[0], self._point_of(found[1]) or {})

    def start_point(self) -> Mapping[str, float] | None:
        """Return the configured start, as near as the restrictions let it be."""
        start = self.inside.start_point()
        if start is None:
            return None
        return dict(zip(self.names, self.project(list(self._means(start).values())), strict=True))

    def realised(
        self, allocation: Allocation, point: Mapping[str, float]
    ) -> Mapping[str, float] | None:
        """Return the point that an allocation stands at, for the surrogate."""
        if point:
            found = self.inside.realised(allocation, self._whole(point))
            return found and self._means(found)
        return self._point_of(self.inside.realised(allocation, {}) or {})

    def project(self, values: Sequence[float]) -> list[float]:
        """Return the nearest point that the restrictions and the budget allow."""
        return project(values, list(self.limits.values()), self.constraint)

    def sobol_point(self, index: int, seed: int) -> dict[str, float]:
        """Return a point of a scrambled Sobol sequence; a function of index and seed alone."""
        return sobol_within(self, index, seed)

    def _whole(self, point: Mapping[str, float]) -> dict[str, float]:
        """Return the point of the space inside."""
        free = {member: point[name] for name, found in self.members.items() for member in found}
        whole = {**free, **self.fixed}
        return {name: whole[name] for name in self.inside.names}

    def _means(self, whole: Mapping[str, float]) -> dict[str, float]:
        """Return the values of a point of the space inside; of tied ones their mean.

        Where the budget is a constraint, they are weighted by their part in it, so that it is met.
        """
        constraint = self.inside.constraint
        weights = dict.fromkeys(whole, 1.0) if constraint is None else constraint.weights
        return {
            name: sum(weights[m] * whole[m] for m in found) / sum(weights[m] for m in found)
            for name, found in self.members.items()
        }

    def _point_of(self, whole: Mapping[str, float]) -> dict[str, float] | None:
        """Return the point of a point of the space inside, ``None`` if it is not one of these."""
        if not whole:
            return None
        point = self._means(whole)
        inside = self._whole(point)
        allowed = all(
            low - CLOSE <= point[name] <= high + CLOSE for name, (low, high) in self.limits.items()
        )
        if not allowed or any(abs(inside[name] - whole[name]) > CLOSE for name in whole):
            return None
        return point


def restrict(
    inside: BudgetSpace,
    variables: Mapping[str, float | Limits],
    tied: Sequence[Sequence[str]],
    *,
    largest: float,
    smallest: float,
) -> BudgetSpace:
    """Return a space with some of its variables fixed, bounded or tied.

    Args:
        inside: The whole space; returned as it is where nothing is restricted.
        variables: A value or bounds, by name or pattern (``depth.*``) of variables.
        tied: Names or patterns of variables that have one value; the first of them names it.
        largest: That a variable may be.
        smallest: That a variable may be.

    Raises:
        ConfigError: Listing patterns that match no variable, contradictions, and values out of
            range; or if nothing is left to search.
        BudgetError: If no point within the bounds can use the budget, or all exceed it.
    """
    if not variables and not tied:
        return inside
    limits, problems = _limits(inside, variables, (smallest, largest))
    members, more = _ties(inside, tied, limits)
    problems += more
    fixed = {name: low for name, (low, high) in limits.items() if low == high}
    free = {name: found for name, found in members.items() if name not in fixed}
    if not free and not problems:
        problems.append("space.variables: every variable is fixed, nothing is left to search")
    if problems:
        raise ConfigError(problems)
    space = RestrictedSpace(inside, free, {name: limits[name] for name in free}, fixed)
    if (constraint := space.constraint) is not None:
        least, most = (
            sum(constraint.weights[name] * space.limits[name][end] for name in free)
            for end in (0, 1)
        )
        if not least <= constraint.bound <= most:
            share = 1 / max(sum(constraint.weights.values()), 1e-12)
            raise BudgetError(
                f"space.variables: what is searched would have to keep "
                f"{constraint.bound * share:.4f} of its parameters to use the budget up, but its "
                f"bounds let it keep {least * share:.4f} to {most * share:.4f}; change bounds, "
                "fixed values or the budget"
            )
    return space


def _limits(
    inside: BudgetSpace, variables: Mapping[str, float | Limits], allowed: Limits
) -> tuple[dict[str, Limits], list[str]]:
    """Return the limits of every variable of a space, and problems."""
    problems: list[str] = []
    limits = dict(inside.bounds)
    given: dict[str, str] = {}
    for pattern, value in variables.items():
        low, high = (value, value) if isinstance(value, int | float) else value
        if not allowed[0] <= low <= high <= allowed[1]:
            problems.append(
                f"space.variables.{pattern}={value}: expected values from {allowed[0]:g} to "
                f"{allowed[1]:g}"
            )
        found = _matching(inside, pattern)
        if not found:
            problems.append(_unknown(inside, f"space.variables.{pattern}"))
        for name in found:
            if name in given and limits[name] != (low, high):
                problems.append(
                    f"space.variables: {given[name]} and {pattern} contradict each other about "
                    f"{name}"
                )
            limits[name], given[name] = (float(low), float(high)), pattern
    return limits, problems


def _ties(
    inside: BudgetSpace, tied: Sequence[Sequence[str]], limits: Mapping[str, Limits]
) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """Return the variables that each variable stands for, and problems."""
    problems: list[str] = []
    head = {name: name for name in inside.names}
    taken: set[str] = set()
    for group in tied:
        problems += [
            _unknown(inside, f"space.tied: {pattern}")
            for pattern in group
            if not _matching(inside, pattern)
        ]
        found = {name for pattern in group for name in _matching(inside, pattern)}
        together = [name for name in inside.names if name in found]
        for name in together:
            first = together[0]
            if limits[name] != limits[first]:
                problems.append(
                    f"space.tied: {first} and {name} are to have one value, but have bounds "
                    f"{list(limits[first])} and {list(limits[name])}"
                )
            if name in taken:
                problems.append(f"space.tied: {name} is in two lists; make them one")
            head[name] = first
        taken |= found
    members: dict[str, tuple[str, ...]] = {}
    for name in inside.names:
        members[head[name]] = (*members.get(head[name], ()), name)
    return members, problems


def _matching(inside: BudgetSpace, pattern: str) -> list[str]:
    """Return the variables that a name or pattern means."""
    return [name for name in inside.names if fnmatch.fnmatchcase(name, pattern)]


def _unknown(inside: BudgetSpace, what: str) -> str:
    """Return the message about a pattern that means no variable."""
    names = inside.names
    some = ", ".join(names[:12]) + (f", ... ({len(names)} in all)" if len(names) > 12 else "")
    return f"{what} is no variable of the space: {some}"
