"""A space of one budget with the keep ratio as one more variable, for a whole Pareto front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lrbo.accounting import dense_parameters
from lrbo.allocation import Allocation, Budget, Cost, allocate
from lrbo.optimization.base import (
    BudgetSpace,
    LinearConstraint,
    Start,
    WarmStart,
    sobol_within,
    without_repeats,
)
from lrbo.optimization.front import KEEP_RATIO
from lrbo.sensitivity import Curves
from lrbo.specs import LayerSpec

BASELINES = 4  # keep ratios at which the baselines of a front are evaluated


@dataclass(frozen=True)
class FrontSpace:
    """What is searched where the budget is searched too.

    A point is one of the space inside, at the budget that ``keep_ratio`` names. Every allocation
    uses its own budget up.

    Attributes:
        inside: Of any one budget in the range.
        layers: The layers that the budget covers.
        lowest: Smallest keep ratio.
        highest: Largest one: the ceiling.
    """

    inside: BudgetSpace
    layers: tuple[LayerSpec, ...]
    lowest: float
    highest: float

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the variables, the keep ratio last."""
        return (*self.inside.names, KEEP_RATIO)

    @property
    def bounds(self) -> Mapping[str, tuple[float, float]]:
        """Return the smallest and largest value of each variable."""
        return {**self.inside.bounds, KEEP_RATIO: (self.lowest, self.highest)}

    @property
    def constraint(self) -> LinearConstraint | None:
        """Return the constraint of the space inside, whose bound rises with the keep ratio."""
        small, large = (self._at(ratio).constraint for ratio in (self.lowest, self.highest))
        if small is None or large is None:
            return None
        slope = (large.bound - small.bound) / (self.highest - self.lowest)
        return LinearConstraint(
            {**large.weights, KEEP_RATIO: -slope},
            large.bound - slope * self.highest,
            large.is_equality,
        )

    @property
    def budget(self) -> Budget:
        """Return the ceiling."""
        return Budget.from_keep_ratio(self.layers, self.highest)

    @property
    def cost(self) -> Cost:
        """Return the stored parameters of a layer at a rank."""
        return self.inside.cost

    def with_curves(self, curves: Curves) -> FrontSpace:
        """Return the space with the loss curves of the layers."""
        return replace(self, inside=self.inside.with_curves(curves))

    def allocate(self, point: Mapping[str, float]) -> Allocation:
        """Turn a point into ranks that use the budget of its keep ratio up."""
        return self._at(point[KEEP_RATIO]).allocate(_inside(point))

    def uniform(self) -> Allocation:
        """Return the baseline at the ceiling."""
        return self._at(self.highest).uniform()

    def analytic(self) -> tuple[Allocation, Mapping[str, float]] | None:
        """Return the allocation of least predicted loss at the ceiling, with its point."""
        found = self._at(self.highest).analytic()
        return found and (found[0], self._with_ratio(found[1], self.highest))

    def start_point(self) -> Mapping[str, float] | None:
        """Return the configured start at the ceiling, if there is one."""
        found = self._at(self.highest).start_point()
        return found and self._with_ratio(found, self.highest)

    def warm_starts(self, wanted: Sequence[Start]) -> list[WarmStart]:
        """Return what the space inside begins with, at keep ratios from the ceiling down.

        All of one sort come before those of the next: the front that the search has to beat.
        What donors lend is left out where its ranks are there already.
        """
        step = (self.highest - self.lowest) / (BASELINES - 1)
        # Decimals as one would type them, not 0.7666666666666667.
        ratios = [round(self.highest - step * place, 4) for place in range(BASELINES)]
        ratios[0], ratios[-1] = self.highest, self.lowest
        return without_repeats(
            [
                [
                    WarmStart(found.origin, self._place_of(found, ratio), found.allocation)
                    for ratio in ratios
                    for found in self._at(ratio).warm_starts([start])
                ]
                for start in wanted
            ]
        )

    def between(
        self, points: Sequence[Mapping[str, float]], ratio: float
    ) -> dict[str, float] | None:
        """Return the point at a keep ratio on the line between its two neighbours.

        Args:
            points: Of this space.
            ratio: Wanted keep ratio.

        Returns:
            ``None`` if there is no neighbour on one of the sides.
        """
        below = [point for point in points if point[KEEP_RATIO] <= ratio]
        above = [point for point in points if point[KEEP_RATIO] > ratio]
        if not below or not above:
            return None
        small = max(below, key=lambda point: point[KEEP_RATIO])
        large = min(above, key=lambda point: point[KEEP_RATIO])
        share = (ratio - small[KEEP_RATIO]) / (large[KEEP_RATIO] - small[KEEP_RATIO])
        values = [(1 - share) * small[name] + share * large[name] for name in self.names[:-1]]
        return dict(zip(self.names, self.project([*values, ratio]), strict=True))

    def between_allocations(self, small: Allocation, large: Allocation, ratio: float) -> Allocation:
        """Return the ranks at a keep ratio between two allocations, wherever these stand.

        Each layer keeps the mean of what it keeps in both, weighted so that all together keep
        the ratio. Baselines may stand at no point of the space.

        Args:
            small: Keeps less than the ratio.
            large: Keeps more.
            ratio: Wanted keep ratio.
        """
        budget = Budget.from_keep_ratio(self.layers, ratio)
        share = (budget.parameters - small.parameters) / (large.parameters - small.parameters)

        def kept(spec: LayerSpec, allocation: Allocation) -> float:
            rank = allocation.ranks[spec.name]
            return 1.0 if rank is None else self.cost(spec, rank) / spec.parameters

        ratios = {
            spec.name: (1 - share) * kept(spec, small) + share * kept(spec, large)
            for spec in self.layers
        }
        dense = [name for name in ratios if small.ranks[name] is large.ranks[name] is None]
        return allocate(
            ratios,
            self.layers,
            budget,
            cost=self.cost,
            rank_multiple=self.inside.rank_multiple,
            dense=dense,
        )

    def realised(
        self, allocation: Allocation, point: Mapping[str, float]
    ) -> Mapping[str, float] | None:
        """Return the point that an allocation stands at, for the surrogate."""
        found = self.inside.realised(allocation, _inside(point))
        if found is None:
            return None
        # Where the budget is a constraint, the point must meet it with the ratio that was kept.
        if self.inside.constraint is not None or KEEP_RATIO not in point:
            return {**found, KEEP_RATIO: allocation.parameters / dense_parameters(self.layers)}
        return {**found, KEEP_RATIO: point[KEEP_RATIO]}

    def project(self, values: Sequence[float]) -> list[float]:
        """Return the nearest point of this keep ratio, or of the nearest one in the range."""
        ratio = min(max(values[-1], self.lowest), self.highest)
        return [*self._at(ratio).project(values[:-1]), ratio]

    def sobol_point(self, index: int, seed: int) -> dict[str, float]:
        """Return a point of a scrambled Sobol sequence; a function of index and seed alone."""
        return sobol_within(self, index, seed)

    def _at(self, ratio: float) -> BudgetSpace:
        """Return the space inside, at one budget."""
        return self.inside.at(Budget.from_keep_ratio(self.layers, ratio))

    def _place_of(self, start: WarmStart, ratio: float) -> Mapping[str, float]:
        """Return where a start of the space inside stands here; ``{}`` if nowhere."""
        if not start.point:
            return {}
        return self.realised(start.allocation, self._with_ratio(start.point, ratio)) or {}

    def _with_ratio(self, point: Mapping[str, float], ratio: float) -> dict[str, float]:
        """Return a point with its keep ratio; no point stays none."""
        return {**point, KEEP_RATIO: ratio} if point else {}


def _inside(point: Mapping[str, float]) -> dict[str, float]:
    """Return a point without its keep ratio."""
    return {name: value for name, value in point.items() if name != KEEP_RATIO}
