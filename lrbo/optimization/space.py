"""Search variables <-> layer ratios; the budget as a linear constraint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from lrbo.accounting import dense_parameters
from lrbo.allocation import Allocation, Budget, Cost, allocate
from lrbo.errors import ConfigError
from lrbo.optimization.base import (
    LinearConstraint,
    Start,
    WarmStart,
    assign_groups,
    known_starts,
    least_loss,
    project,
    require_feasible,
    sobol_within,
    uniform_ratios,
)
from lrbo.sensitivity import Curves
from lrbo.specs import LayerSpec

Granularity = Literal["kind", "depth", "layer"]
Ratios = Mapping[str, float | Sequence[float]]


@dataclass(frozen=True)
class Variable:
    """One search variable: a keep ratio that some layers share.

    Attributes:
        name: ``"qk"``, ``"qk.2"`` (third depth group) or a layer's name.
        group: Name of the group in the configuration that it comes from.
        depth: Depth group, 0 where there is only one.
        layers: Names of its layers; each gets its own rank.
        dense_parameters: Of these layers.
    """

    name: str
    group: str
    depth: int
    layers: tuple[str, ...]
    dense_parameters: int


@dataclass(frozen=True)
class SearchSpace:
    """What is searched, under which budget, and how a point becomes ranks.

    A point maps each variable to a keep ratio. The budget is linear in it:
    ``sum share_i x_i = room``, where ``share_i`` is the variable's part of the searched
    parameters and ``room`` is what the budget leaves after the layers that stay dense.

    Attributes:
        variables: In a fixed order.
        dense: Layers that no trial of the search compresses.
        layers: All layers that the budget covers.
        budget: The ceiling.
        lower: Smallest keep ratio of a variable.
        upper: Largest keep ratio of a variable; 1 is dense.
        cost: Stored parameters of a layer at a rank.
        rank_multiple: Ranks are multiples of this.
        start: Ratios to begin with, by group; a list gives one ratio per depth group.
        curves: Predicted loss by layer, nats per token; empty if it is not known.
    """

    variables: tuple[Variable, ...]
    dense: tuple[str, ...]
    layers: tuple[LayerSpec, ...]
    budget: Budget
    lower: float
    upper: float
    cost: Cost
    rank_multiple: int
    start: Ratios
    curves: Curves = field(default_factory=dict)

    def at(self, budget: Budget) -> SearchSpace:
        """Return the space under another budget."""
        return replace(self, budget=budget)

    def warm_starts(self, wanted: Sequence[Start]) -> list[WarmStart]:
        """Return the trials that need no search."""
        return known_starts(self, wanted)

    def with_curves(self, curves: Curves) -> SearchSpace:
        """Return the space with the loss curves of the layers."""
        return replace(self, curves=curves)

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the variables, in order."""
        return tuple(variable.name for variable in self.variables)

    @property
    def shares(self) -> list[float]:
        """Return each variable's part of the searched parameters; they sum to 1."""
        total = sum(variable.dense_parameters for variable in self.variables)
        return [variable.dense_parameters / total for variable in self.variables]

    @property
    def room(self) -> float:
        """Return the mean keep ratio that the budget leaves to the searched layers."""
        total = sum(variable.dense_parameters for variable in self.variables)
        pinned = dense_parameters(spec for spec in self.layers if spec.name in self.dense)
        return (self.budget.parameters - pinned) / total

    @property
    def bounds(self) -> Mapping[str, tuple[float, float]]:
        """Return the smallest and largest ratio of each variable."""
        return dict.fromkeys(self.names, (self.lower, self.upper))

    @property
    def constraint(self) -> LinearConstraint:
        """Return the budget.

        Every allocation uses the budget up, so only points that do are ever evaluated. An
        inequality would leave a direction of which nothing is known, and proposals in it.
        """
        weights = dict(zip(self.names, self.shares, strict=True))
        return LinearConstraint(weights, self.room, is_equality=self.room < self.upper)

    def analytic(self) -> tuple[Allocation, Mapping[str, float]] | None:
        """Return the allocation of least predicted loss, if losses are known.

        It stands at no point: layers that share a ratio here have ranks of their own there.
        """
        if not self.curves:
            return None
        allocation = least_loss(
            self.curves,
            self.layers,
            self.budget,
            dense=self.dense,
            cost=self.cost,
            rank_multiple=self.rank_multiple,
        )
        return allocation, {}

    def allocate(self, point: Mapping[str, float]) -> Allocation:
        """Turn a point into ranks that use the whole budget."""
        ratios = {name: point[v.name] for v in self.variables for name in v.layers}
        return allocate(
            ratios,
            self.layers,
            self.budget,
            cost=self.cost,
            rank_multiple=self.rank_multiple,
            dense=self.dense,
        )

    def uniform(self) -> Allocation:
        """Return the baseline: the same wished ratio for every layer that the budget covers."""
        return uniform_ratios(
            self.layers, self.budget, cost=self.cost, rank_multiple=self.rank_multiple
        )

    def realised(
        self, allocation: Allocation, point: Mapping[str, float]
    ) -> dict[str, float] | None:
        """Return the point that an allocation stands at: kept over dense parameters.

        Ranks are integers and the rest of the budget is spent, so it differs from the point
        that was asked for; the surrogate is told this one.

        Returns:
            The point, or ``None`` if the allocation compresses a layer that the space keeps
            dense, so that no point stands for it.
        """
        del point
        if any(allocation.ranks[name] is not None for name in self.dense):
            return None
        specs = {spec.name: spec for spec in self.layers}

        def kept(name: str) -> int:
            rank = allocation.ranks[name]
            return specs[name].parameters if rank is None else self.cost(specs[name], rank)

        return {
            v.name: sum(kept(name) for name in v.layers) / v.dense_parameters
            for v in self.variables
        }

    def start_point(self) -> dict[str, float] | None:
        """Return the configured start ratios, projected onto the budget; ``None`` if none."""
        if not self.start:
            return None
        values = []
        for variable in self.variables:
            given = self.start.get(variable.group, self.room)
            if not isinstance(given, float | int):
                given = given[min(variable.depth, len(given) - 1)]
            values.append(float(given))
        return dict(zip(self.names, self.project(values), strict=True))

    def project(self, values: Sequence[float]) -> list[float]:
        """Return the nearest point (Euclidean) that lies in the bounds and uses the budget.

        More parameters never hurt the search, so the budget is met with equality, unless even
        all upper bounds stay below it.
        """
        return project(values, list(self.bounds.values()), self.constraint)

    def sobol_point(self, index: int, seed: int) -> dict[str, float]:
        """Return a point of a scrambled Sobol sequence, projected onto the budget.

        The point depends on ``index`` and ``seed`` only, so that a resumed search finds the
        same one. Ax's own initial design collapses to near copies under a tight constraint.
        """
        return sobol_within(self, index, seed)


def build_space(
    layers: Sequence[LayerSpec],
    budget: Budget,
    *,
    groups: Mapping[str, Sequence[str]],
    dense: Sequence[str],
    granularity: Granularity,
    depth_groups: int,
    bounds: tuple[float, float],
    start: Ratios,
    cost: Cost,
    rank_multiple: int,
) -> SearchSpace:
    """Build the search space of a model.

    Args:
        layers: The layers that the budget covers.
        budget: The ceiling.
        groups: Group name to patterns; a pattern is a kind (``q_proj``) or a shell pattern on
            the layer's name. The first group that matches takes the layer. Groups without a
            layer in this model are dropped, so that one file serves several families.
        dense: Patterns of layers that stay dense.
        granularity: ``kind``: one variable per group; ``depth``: one per group and depth group;
            ``layer``: one per layer.
        depth_groups: Number of depth groups for ``depth``: consecutive blocks, as equal as can be.
        bounds: Smallest and largest ratio of a variable.
        start: Ratios to begin with, by group name.
        cost: Stored parameters of a layer at a rank.
        rank_multiple: Ranks are multiples of this.

    Raises:
        ConfigError: Listing layers that no group takes, and start values without a group.
        BudgetError: If the budget cannot be met; says the smallest feasible keep ratio.
    """
    pinned, taken, problems = assign_groups(layers, groups, dense)
    blocks = 1 + max((spec.block or 0 for spec in layers), default=0)
    depths = {"kind": 1, "depth": min(depth_groups, blocks), "layer": blocks}[granularity]
    members: dict[tuple[str, str, int], list[LayerSpec]] = {}
    for spec in layers:
        if spec.name not in taken:
            continue
        group, depth = taken[spec.name], (spec.block or 0) * depths // blocks
        name = {"kind": group, "depth": f"{group}.{depth}", "layer": spec.name}[granularity]
        members.setdefault((name, group, depth), []).append(spec)
    unknown = sorted(set(start) - set(groups))
    if unknown:
        problems.append(f"space.start names {unknown}, which are no groups: {sorted(groups)}")
    if not members and not problems:
        problems.append("space: every layer is kept dense, nothing is left to search")
    if problems:
        raise ConfigError(problems)
    space = SearchSpace(
        variables=tuple(
            Variable(name, group, depth, tuple(s.name for s in specs), dense_parameters(specs))
            for (name, group, depth), specs in members.items()
        ),
        dense=pinned,
        layers=tuple(layers),
        budget=budget,
        lower=bounds[0],
        upper=bounds[1],
        cost=cost,
        rank_multiple=rank_multiple,
        start=start,
    )
    require_feasible(
        layers,
        budget,
        pinned,
        cost=cost,
        rank_multiple=rank_multiple,
        lower=bounds[0],
        relief="space.bounds[0] or space.rank_multiple",
    )
    return space
