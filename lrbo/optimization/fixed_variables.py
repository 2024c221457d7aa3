"""A search space with some variables fixed, bounded or tied to each other."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lrbo.allocation.allocate import Allocation
from lrbo.errors import BudgetError, ConfigError
from lrbo.optimization.space import Limits, LinearConstraint, Point, Space

CLOSE = 0.02  # tolerance around fixed values, for allocations that were not made in the space


@dataclass(frozen=True)
class RestrictedSpace(Space):
    """A space of which only some directions are searched."""

    inside: Space  # the whole of it
    members: Mapping[str, tuple[str, ...]]  # by the first of those tied, which stands for them
    fixed: Mapping[str, float]  # values of variables that are not searched

    @property
    def whole(self) -> Space:
        """The space inside, of the same problem."""
        return self.inside.of(self.problem)

    @property
    def constraint(self) -> LinearConstraint | None:
        """The constraint of the whole space, its bound less the share of fixed variables."""
        whole = self.whole.constraint
        if whole is None:
            return None
        weights = {
            name: sum(whole.weights[member] for member in members)
            for name, members in self.members.items()
        }
        bound = whole.bound - sum(whole.weights[name] * x for name, x in self.fixed.items())
        largest = sum(weights[name] * high for name, (_, high) in self.bounds.items())
        return LinearConstraint(weights, bound, whole.is_equality and bound < largest)

    def allocate(self, point: Point) -> Allocation:
        """Turn a point into options that use the whole budget."""
        return self.whole.allocate(self._expanded(point))

    def analytic_point(self) -> Point:
        """Return the point of least predicted loss, ``{}`` if it is not allowed here."""
        return self._point_of(self.whole.analytic_point())

    def start_point(self) -> Point:
        """Return the configured start, as near as the restrictions let it be."""
        start = self.whole.start_point()
        return start and self.project(self._reduced(start))

    def realised(self, allocation: Allocation, point: Point) -> Point:
        """Return the point that an allocation stands at, for the surrogate."""
        if not point:
            return self._point_of(self.whole.realised(allocation, {}))
        realised = self.whole.realised(allocation, self._expanded(point))
        return realised and self._reduced(realised)

    def _expanded(self, point: Point) -> Point:
        free = {member: point[name] for name, tied in self.members.items() for member in tied}
        return {**free, **self.fixed}

    def _reduced(self, whole: Point) -> Point:
        """Return the point of one of the whole space; of tied values the mean.

        They are weighted by their part in the budget, where that is a constraint, so it is met.
        """
        constraint = self.inside.constraint
        weights = dict.fromkeys(whole, 1.0) if constraint is None else constraint.weights
        return {
            name: sum(weights[m] * whole[m] for m in tied) / sum(weights[m] for m in tied)
            for name, tied in self.members.items()
        }

    def _point_of(self, whole: Point) -> Point:
        """Return the point of one of the whole space, ``{}`` if it is not allowed here."""
        if not whole:
            return {}
        point = self._reduced(whole)
        expanded = self._expanded(point)
        is_allowed = all(
            low - CLOSE <= point[name] <= high + CLOSE for name, (low, high) in self.bounds.items()
        ) and all(abs(expanded[name] - whole[name]) <= CLOSE for name in whole)
        return point if is_allowed else {}


def restrict(
    inside: Space, variables: Mapping[str, float | Limits], tied: Sequence[Sequence[str]]
) -> Space:
    """Fix or bound ``variables``, and give those of each list of ``tied`` one value.

    All are names or patterns (``depth.*``).

    Raises:
        ConfigError: Listing patterns that match no variable, and contradictions; or if nothing
            is left to search.
        BudgetError: If no point within the bounds can use the budget, or all exceed it.
    """
    if not variables and not tied:
        return inside
    problems: list[str] = []
    limits = _limits(inside, variables, problems)
    members = _members(inside, tied, limits, problems)
    fixed = {name: low for name, (low, high) in limits.items() if low == high}
    free = {name: tied for name, tied in members.items() if name not in fixed}
    if not free and not problems:
        problems.append("space.variables: every variable is fixed, nothing is left to search")
    if problems:
        raise ConfigError(problems)
    bounds = {name: limits[name] for name in free}
    space = RestrictedSpace(inside.problem, bounds, inside, free, fixed)
    if (constraint := space.constraint) is not None:
        least, most = (
            sum(constraint.weights[name] * bounds[name][end] for name in free) for end in (0, 1)
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
    inside: Space, variables: Mapping[str, float | Limits], problems: list[str]
) -> dict[str, Limits]:
    limits = dict(inside.bounds)
    patterns: dict[str, str] = {}
    for pattern, value in variables.items():
        low, high = (value, value) if isinstance(value, int | float) else value
        for name in _matching(inside, pattern, f"space.variables.{pattern}", problems):
            if name in patterns and limits[name] != (low, high):
                problems.append(
                    f"space.variables: {patterns[name]} and {pattern} contradict each other about "
                    f"{name}"
                )
            limits[name], patterns[name] = (float(low), float(high)), pattern
    return limits


def _members(
    inside: Space,
    tied: Sequence[Sequence[str]],
    limits: Mapping[str, Limits],
    problems: list[str],
) -> dict[str, tuple[str, ...]]:
    head: dict[str, str] = {}
    for group in tied:
        matching = {
            name
            for pattern in group
            for name in _matching(inside, pattern, f"space.tied: {pattern}", problems)
        }
        together = [name for name in inside.names if name in matching]
        problems += [
            f"space.tied: {name} is in two lists; make them one"
            for name in together
            if name in head
        ]
        for name in together:
            first = together[0]
            if limits[name] != limits[first]:
                problems.append(
                    f"space.tied: {first} and {name} are to have one value, but have bounds "
                    f"{list(limits[first])} and {list(limits[name])}"
                )
            head[name] = first
    members: dict[str, tuple[str, ...]] = {}
    for name in inside.names:
        first = head.get(name, name)
        members[first] = (*members.get(first, ()), name)
    return members


def _matching(inside: Space, pattern: str, where: str, problems: list[str]) -> list[str]:
    """Return the variables that match a name or pattern; none is a problem."""
    names = [name for name in inside.names if fnmatch.fnmatchcase(name, pattern)]
    if not names:
        some = ", ".join(inside.names[:12])
        some += f", ... ({len(inside.names)} in all)" if len(inside.names) > 12 else ""
        problems.append(f"{where} is no variable of the space: {some}")
    return names
