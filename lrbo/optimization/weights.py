"""Search variables that multiply predicted loss curves: every point is an optimal allocation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lrbo.allocation import Allocation, Budget, Cost
from lrbo.errors import ConfigError
from lrbo.optimization.base import (
    LinearConstraint,
    Start,
    WarmStart,
    assign_groups,
    known_starts,
    least_loss,
    require_feasible,
    sobol_within,
    uniform_ratios,
)
from lrbo.sensitivity import Curves
from lrbo.specs import LayerSpec

EXPONENT = "exponent"


@dataclass(frozen=True)
class WeightSpace:
    """What is searched around the analytic allocation, under a budget.

    A point distorts the predicted loss curves ``E_l(r)`` of the layers, and the allocation is
    the one of least summed distorted loss ``exp(kind + depth) * E_l(r) ** exp(exponent)``. At the
    origin that is the analytic allocation; every point uses the budget up, so that there is no
    constraint to keep.

    Attributes:
        groups: Group of each searched layer; a variable ``kind.GROUP`` each.
        knots: Variables ``depth.0``, ``depth.1``, ... at equal distances from the first block to
            the last, linear in between; 0 leaves depth out.
        exponent: Whether ``exponent`` is a variable.
        dense: Layers that no trial of the search compresses.
        layers: All layers that the budget covers.
        budget: The ceiling.
        width: Variables lie in ``[-width, width]``, in natural logarithms.
        cost: Stored parameters of a layer at a rank.
        rank_multiple: Ranks are multiples of this.
        minimum: Smallest rank of a layer.
        curves: Predicted loss by layer, nats per token; empty until calibration is done.
    """

    groups: Mapping[str, str]
    knots: int
    exponent: bool
    dense: tuple[str, ...]
    layers: tuple[LayerSpec, ...]
    budget: Budget
    width: float
    cost: Cost
    rank_multiple: int
    minimum: int = 0
    curves: Curves = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the variables, in order."""
        kinds = [f"kind.{group}" for group in dict.fromkeys(self.groups.values())]
        depths = [f"depth.{knot}" for knot in range(self.knots)]
        return (*kinds, *depths, *([EXPONENT] if self.exponent else []))

    @property
    def bounds(self) -> Mapping[str, tuple[float, float]]:
        """Return the smallest and largest value of each variable."""
        return dict.fromkeys(self.names, (-self.width, self.width))

    @property
    def constraint(self) -> LinearConstraint | None:
        """Return no constraint: every point meets the budget."""
        return None

    def at(self, budget: Budget) -> WeightSpace:
        """Return the space under another budget."""
        return replace(self, budget=budget)

    def warm_starts(self, wanted: Sequence[Start]) -> list[WarmStart]:
        """Return the trials that need no search."""
        return known_starts(self, wanted)

    def with_curves(self, curves: Curves) -> WeightSpace:
        """Return the space with the loss curves of the layers."""
        return replace(self, curves=curves)

    def allocate(self, point: Mapping[str, float]) -> Allocation:
        """Return the allocation of least distorted loss.

        Raises:
            ValueError: If there are no curves yet.
        """
        if not self.curves:
            raise ValueError("the space has no loss curves; calibrate with output gradients first.")
        power = math.exp(point.get(EXPONENT, 0.0))
        blocks = max((spec.block or 0 for spec in self.layers), default=0)
        places = np.linspace(0.0, 1.0, self.knots)
        heights = [point[f"depth.{knot}"] for knot in range(self.knots)]
        distorted = {}
        for spec in self.layers:
            if spec.name in self.dense or spec.name not in self.curves:
                continue
            depth = (spec.block or 0) / max(blocks, 1)
            weight = point[f"kind.{self.groups[spec.name]}"]
            weight += float(np.interp(depth, places, heights)) if self.knots else 0.0
            # Rounding below 0 would have no power, and one of small losses magnifies a rise.
            falling = np.minimum.accumulate(np.maximum(self.curves[spec.name], 0.0))
            distorted[spec.name] = math.exp(weight) * falling**power
        return least_loss(
            distorted,
            self.layers,
            self.budget,
            dense=self.dense,
            cost=self.cost,
            rank_multiple=self.rank_multiple,
            minimum=self.minimum,
        )

    def uniform(self) -> Allocation:
        """Return the baseline: the same wished ratio for every layer that the budget covers."""
        return uniform_ratios(
            self.layers, self.budget, cost=self.cost, rank_multiple=self.rank_multiple
        )

    def analytic(self) -> tuple[Allocation, Mapping[str, float]] | None:
        """Return the allocation at the origin, and the origin."""
        origin = dict.fromkeys(self.names, 0.0)
        return self.allocate(origin), origin

    def start_point(self) -> None:
        """Return no start but the analytic allocation."""

    def realised(
        self, allocation: Allocation, point: Mapping[str, float]
    ) -> Mapping[str, float] | None:
        """Return the point itself, of which the allocation is a function; ``None`` without one."""
        del allocation
        return point or None

    def project(self, values: Sequence[float]) -> list[float]:
        """Return the nearest point in the bounds."""
        return [min(max(value, -self.width), self.width) for value in values]

    def sobol_point(self, index: int, seed: int) -> dict[str, float]:
        """Return a point of a scrambled Sobol sequence; a function of index and seed alone."""
        return sobol_within(self, index, seed)


def build_weight_space(
    layers: Sequence[LayerSpec],
    budget: Budget,
    *,
    groups: Mapping[str, Sequence[str]],
    dense: Sequence[str],
    knots: int,
    exponent: bool,
    width: float,
    cost: Cost,
    rank_multiple: int,
    minimum: int = 0,
) -> WeightSpace:
    """Build the weight space of a model; its curves come later.

    Args:
        layers: The layers that the budget covers.
        budget: The ceiling.
        groups: Group name to patterns, as for ratios; no groups is one per kind.
        dense: Patterns of layers that stay dense.
        knots: Depth variables; at least 2, or 0 for none.
        exponent: Whether the exponent of the curves is a variable.
        width: Variables lie in ``[-width, width]``.
        cost: Stored parameters of a layer at a rank.
        rank_multiple: Ranks are multiples of this.
        minimum: Smallest rank of a layer.

    Raises:
        ConfigError: Listing layers that no group takes.
        BudgetError: If the budget cannot be met; says the smallest feasible keep ratio.
    """
    kinds = {kind: [kind] for kind in dict.fromkeys(spec.kind for spec in layers)}
    pinned, taken, problems = assign_groups(layers, groups or kinds, dense)
    if not taken and not problems:
        problems.append("space: every layer is kept dense, nothing is left to search")
    if problems:
        raise ConfigError(problems)
    smallest = max(-(-minimum // rank_multiple), 1) * rank_multiple
    require_feasible(
        layers,
        budget,
        pinned,
        cost=cost,
        rank_multiple=smallest,
        relief="space.minimum_rank or space.rank_multiple",
    )
    return WeightSpace(
        groups=taken,
        knots=knots,
        exponent=exponent,
        dense=pinned,
        layers=tuple(layers),
        budget=budget,
        width=width,
        cost=cost,
        rank_multiple=rank_multiple,
        minimum=minimum,
    )
