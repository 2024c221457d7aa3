"""A space of one budget with the keep ratio as one more variable, for a whole Pareto front."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lrbo.allocation.allocate import Allocation
from lrbo.config.choices import KEEP_RATIO
from lrbo.layers.options import DENSE
from lrbo.optimization.space import LinearConstraint, Point, Space, Start, WarmStart

BASELINES = 4  # keep ratios at which the baselines of a front are evaluated


@dataclass(frozen=True)
class FrontSpace(Space):
    """A space whose points name their budget too; ``inside`` is the space of one budget."""

    inside: Space

    @property
    def constraint(self) -> LinearConstraint | None:
        """The constraint of the space inside, whose bound rises with the keep ratio."""
        lowest, highest = self.bounds[KEEP_RATIO]
        small, large = self.at(lowest).constraint, self.at(highest).constraint
        if small is None or large is None:
            return None
        slope = (large.bound - small.bound) / (highest - lowest)
        return LinearConstraint(
            {**large.weights, KEEP_RATIO: -slope}, large.bound - slope * highest, large.is_equality
        )

    def at(self, ratio: float) -> Space:
        """Return the space inside, at one budget."""
        return self.inside.of(self.problem.keeping(ratio))

    def allocate(self, point: Point) -> Allocation:
        """Turn a point into options that use the budget of its keep ratio up."""
        return self.at(point[KEEP_RATIO]).allocate(_inside(point))

    def starts(self, start: Start) -> list[WarmStart]:
        """Return the starts inside at keep ratios from the largest down: the front to beat."""
        ratios = baseline_ratios(*self.bounds[KEEP_RATIO])
        return [
            replace(each, point=self.realised(each.allocation, {**each.point, KEEP_RATIO: ratio}))
            if each.point
            else each
            for ratio in ratios
            for each in self.at(ratio).starts(start)
        ]

    def between(self, small: Point, large: Point, ratio: float) -> Point:
        """Interpolate between two points; ``{}`` unless the keep ratio lies between theirs."""
        if not (small and large and small[KEEP_RATIO] <= ratio < large[KEEP_RATIO]):
            return {}
        weight = (ratio - small[KEEP_RATIO]) / (large[KEEP_RATIO] - small[KEEP_RATIO])
        line = {name: (1 - weight) * small[name] + weight * large[name] for name in self.names}
        return self.project({**line, KEEP_RATIO: ratio})

    def between_allocations(self, small: Allocation, large: Allocation, ratio: float) -> Allocation:
        """Allocate by a mean of the ratios of two allocations, weighted for a keep ratio."""
        problem = self.problem.keeping(ratio)
        measure = problem.budget.measure
        least, most = small.cost.of(measure), large.cost.of(measure)
        weight = (problem.budget.limit - least) / (most - least)
        ratios = {
            name: (1 - weight) * problem.share(small, (name,))
            + weight * problem.share(large, (name,))
            for name in problem.menus
        }
        both = [n for n in problem.menus if small.options[n] == large.options[n] == DENSE]
        return replace(problem, dense=tuple(both)).by_ratio(ratios)

    def realised(self, allocation: Allocation, point: Point) -> Point:
        """Return the point that an allocation stands at, for the surrogate."""
        realised = self.inside.of(self.problem).realised(allocation, _inside(point))
        if not realised:
            return {}
        # Where the budget is a constraint, the point must meet it with the realised ratio.
        if self.inside.constraint is None and KEEP_RATIO in point:
            return {**realised, KEEP_RATIO: point[KEEP_RATIO]}
        return {**realised, KEEP_RATIO: self.problem.share(allocation)}

    def project(self, point: Point) -> dict[str, float]:
        """Return the nearest point of this keep ratio, or of the nearest one in the range."""
        lowest, highest = self.bounds[KEEP_RATIO]
        ratio = min(max(point[KEEP_RATIO], lowest), highest)
        return {**self.at(ratio).project(point), KEEP_RATIO: ratio}


def baseline_ratios(lowest: float, highest: float) -> list[float]:
    """Return the keep ratios at which the baselines of a front are evaluated, from the largest."""
    step = (highest - lowest) / (BASELINES - 1)
    # Decimals as one would type them, not 0.7666666666666667.
    ratios = [round(highest - step * index, 4) for index in range(BASELINES)]
    return [highest, *ratios[1:-1], lowest]


def over_budgets(inside: Space, lowest: float, highest: float) -> FrontSpace:
    """Extend a space of one budget to all budgets between two keep ratios."""
    bounds = {**inside.bounds, KEEP_RATIO: (lowest, highest)}
    return FrontSpace(inside.problem.keeping(highest), bounds, inside)


def _inside(point: Point) -> Point:
    return {name: value for name, value in point.items() if name != KEEP_RATIO}
