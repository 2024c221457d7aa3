"""One threshold of output error for all units: of each, the cheapest option within it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from typing_extensions import override

from lrbo.allocation.allocate import Allocation
from lrbo.config.choices import THRESHOLD
from lrbo.errors import ConfigError
from lrbo.factorization.prepared import Prepared
from lrbo.layers.options import Budget, Ladder, Menu
from lrbo.optimization.budgets import baseline_ratios
from lrbo.optimization.space import Limits, Point, Problem, Space, Start, WarmStart
from lrbo.optimization.variables import SpaceSettings, pinned


@dataclass(frozen=True)
class ThresholdSpace(Space):
    """A threshold of the relative output error, whose size is what it gives.

    Each unit becomes the cheapest option that changes its outputs, on its own calibration inputs,
    by at most this share of their norm. Where none does, it is the option that changes them least;
    dense, which changes nothing, is taken only where it is all there is. Errors are those of the
    options as stored, rounded, at every level, so that a smaller rank within the threshold is never
    missed. Thresholds of sizes beyond the budgets are moved to the budgets' own.

    References:
        The rank rule of R. Dyro's article on compressing networks by SVD and quantization
        (rdyro.github.io, ``svd_nn_compression``), which finds each rank by bisection and has no
        budget.
    """

    lowest: float  # keep ratio of the smallest budget; that of the problem is the largest
    graded: Mapping[str, Menu] = field(default_factory=dict)  # whose losses are errors of outputs

    @override
    def with_prepared(self, prepared: Mapping[str, Prepared]) -> ThresholdSpace:
        graded = self.problem.with_losses(prepared, "error").menus
        return replace(self, graded=graded).within_budgets()

    def within_budgets(self) -> ThresholdSpace:
        """Return the space of thresholds between the limits, beyond which they change nothing.

        Raises:
            ConfigError: If the bounds have none of them.
        """
        (least, most), (low, high) = self.limits, self.bounds[THRESHOLD]
        if max(low, least) >= min(high, most):
            raise ConfigError(
                [
                    f"space.bounds={[low, high]}: expected some of the thresholds that give sizes "
                    "between budget.keep_ratio and budget.lowest, which are from "
                    f"{least:.4g} to {most:.4g}"
                ]
            )
        return replace(self, bounds={THRESHOLD: (max(low, least), min(high, most))})

    @cached_property
    def limits(self) -> Limits:
        """The smallest thresholds that the largest and the smallest budget allow."""
        budgets = self.problem.budget, self.problem.keeping(self.lowest).budget
        least, most = map(self.meeting, budgets)
        return least, most

    @override
    def allocate(self, point: Point) -> Allocation:
        return self._at(self._threshold(point), self.problem.budget)

    @override
    def realised(self, allocation: Allocation, point: Point) -> Point:
        """Return the threshold that was in force, ``{}`` of an allocation by other means."""
        del allocation
        return {THRESHOLD: self._threshold(point)} if THRESHOLD in point else {}

    @override
    def starts(self, start: Start) -> list[WarmStart]:
        """Return the starts at keep ratios from the largest down: the front to beat.

        Of this space these are the thresholds that meet these budgets.
        """
        trials: list[WarmStart] = []
        for ratio in baseline_ratios(self.lowest, self.problem.keep_ratio):
            problem = self.problem.keeping(ratio)
            if start == "start":
                threshold = self.meeting(problem.budget)
                allocation = self._at(threshold, problem.budget)
                trials.append(WarmStart("start", {THRESHOLD: threshold}, allocation))
            else:
                trials += Space.starts(self.of(problem), start)
        return trials

    def meeting(self, budget: Budget) -> float:
        """Return the smallest threshold whose options a budget allows.

        It is the error of an option, at which the allocation changes.
        """
        known = [each.losses for each in self.ladders.values() if each.losses is not None]
        steps = np.unique(np.concatenate([np.zeros(1), *known]))
        low, high = 0, len(steps) - 1
        while low < high:
            middle = (low + high) // 2
            fits = self._at(float(steps[middle]), budget).cost.of(budget.measure) <= budget.limit
            low, high = (low, middle) if fits else (middle + 1, high)
        return float(steps[low])

    def _threshold(self, point: Point) -> float:
        """Return the threshold of a point, moved to the budgets."""
        least, most = self.limits
        return min(max(point[THRESHOLD], least), most)

    @cached_property
    def ladders(self) -> dict[str, Ladder]:
        """The options of the searched units that are worth having, by their errors.

        Raises:
            ValueError: Before errors are known.
        """
        if not self.graded:
            raise ValueError("no errors are known yet; prepare the units first.")
        return {
            name: menu.ladder(self.problem.budget.measure, menu.losses)
            for name, menu in self.graded.items()
            if name not in self.problem.dense
        }

    def _at(self, threshold: float, budget: Budget) -> Allocation:
        indices = {name: len(menu) - 1 for name, menu in self.graded.items()}
        for name, ladder in self.ladders.items():
            assert ladder.losses is not None
            within = int((ladder.losses > threshold).sum())
            # The last rung is dense, the one below it the closest.
            indices[name] = int(ladder.indices[min(within, max(len(ladder) - 2, 0))])
        return Allocation(
            {name: menu.option(indices[name]) for name, menu in self.graded.items()},
            {name: menu.cost(indices[name]) for name, menu in self.graded.items()},
            budget,
        )


def build_threshold_space(
    problem: Problem, settings: SpaceSettings, lowest: float
) -> ThresholdSpace:
    """Build the space of thresholds between two budgets, that of the problem the larger one.

    Raises:
        ConfigError: If every unit is kept dense.
        BudgetError: If the smaller budget cannot be met.
    """
    problem = replace(problem, dense=pinned(problem, settings.dense))
    if len(problem.dense) == len(problem.menus):
        raise ConfigError(["space: every layer is kept dense, nothing is left to search"])
    problem.keeping(lowest).require_feasible(
        relief="space.minimum_rank or space.rank_multiple", any_form=True
    )
    low, high = settings.bounds
    return ThresholdSpace(problem, {THRESHOLD: (low, high)}, lowest)
