"""Search variables <-> layer ratios; the budget as a linear constraint."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import torch

from lrbo.accounting import dense_parameters
from lrbo.allocation import Allocation, Budget, Cost, allocate, smallest_parameters
from lrbo.errors import BudgetError, ConfigError
from lrbo.model import LayerSpec

Granularity = Literal["kind", "depth", "layer"]
Start = Mapping[str, float | Sequence[float]]


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
    """

    variables: tuple[Variable, ...]
    dense: tuple[str, ...]
    layers: tuple[LayerSpec, ...]
    budget: Budget
    lower: float
    upper: float
    cost: Cost
    rank_multiple: int
    start: Start

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
        """Return the baseline: the same wished ratio for every layer that the budget covers.

        Layers that the search keeps dense are compressed here too, as in the literature's
        uniform rows.
        """
        return allocate(
            dict.fromkeys((spec.name for spec in self.layers), 1.0),
            self.layers,
            self.budget,
            cost=self.cost,
            rank_multiple=self.rank_multiple,
        )

    def realised(self, allocation: Allocation) -> dict[str, float] | None:
        """Return the point that an allocation stands at: kept over dense parameters.

        Ranks are integers and the rest of the budget is spent, so it differs from the point
        that was asked for; the surrogate is told this one.

        Returns:
            The point, or ``None`` if the allocation compresses a layer that the space keeps
            dense, so that no point stands for it.
        """
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
        wanted = torch.tensor(values, dtype=torch.float64)
        shares = torch.tensor(self.shares, dtype=torch.float64)

        def at(multiplier: float) -> torch.Tensor:
            return (wanted + multiplier * shares).clamp(self.lower, self.upper)

        low, high = -1.0, 1.0
        while float(at(low) @ shares) > self.room and low > -1e9:
            low *= 2
        while float(at(high) @ shares) < self.room and high < 1e9:
            high *= 2
        for _ in range(100):
            middle = (low + high) / 2
            if float(at(middle) @ shares) <= self.room:
                low = middle
            else:
                high = middle
        return [float(value) for value in at(low)]

    def sobol_point(self, index: int, seed: int) -> dict[str, float]:
        """Return a point of a scrambled Sobol sequence, projected onto the budget.

        The point depends on ``index`` and ``seed`` only, so that a resumed search finds the
        same one. Ax's own initial design collapses to near copies under a tight constraint.
        """
        make: Any = torch.quasirandom.SobolEngine  # untyped in torch
        engine = make(len(self.variables), scramble=True, seed=seed)
        unit = engine.fast_forward(index).draw(1, dtype=torch.float64)[0]
        values = self.lower + (self.upper - self.lower) * unit
        return dict(zip(self.names, self.project(values.tolist()), strict=True))


def build_space(
    layers: Sequence[LayerSpec],
    budget: Budget,
    *,
    groups: Mapping[str, Sequence[str]],
    dense: Sequence[str],
    granularity: Granularity,
    depth_groups: int,
    bounds: tuple[float, float],
    start: Start,
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
    problems: list[str] = []
    pinned = tuple(spec.name for spec in layers if _matches(spec, dense))
    blocks = 1 + max((spec.block or 0 for spec in layers), default=0)
    depths = {"kind": 1, "depth": min(depth_groups, blocks), "layer": blocks}[granularity]
    members: dict[tuple[str, str, int], list[LayerSpec]] = {}
    for spec in layers:
        if spec.name in pinned:
            continue
        group = next((name for name, kinds in groups.items() if _matches(spec, kinds)), None)
        if group is None:
            problems.append(
                f"space: no group takes layer {spec.name} (kind {spec.kind}); add its kind to "
                "space.groups or to space.dense"
            )
            continue
        depth = (spec.block or 0) * depths // blocks
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
    _require_feasible(space)
    return space


def _require_feasible(space: SearchSpace) -> None:
    """Refuse a budget that the smallest ranks or the lower bounds exceed."""
    total = dense_parameters(space.layers)
    pinned = dense_parameters(spec for spec in space.layers if spec.name in space.dense)
    smallest = smallest_parameters(
        space.layers, cost=space.cost, rank_multiple=space.rank_multiple, dense=space.dense
    )
    # Of the decimal that was typed: in binary, 0.07 of 100 is 7.000000000000001.
    at_bounds = pinned + math.ceil(Fraction(str(float(space.lower))) * (total - pinned))
    needed = max(smallest, at_bounds)
    if needed > space.budget.parameters:
        raise BudgetError(
            f"budget of {space.budget.parameters:_} parameters (keep_ratio "
            f"{space.budget.parameters / total:.4f}) cannot be met: {len(space.dense)} layers "
            f"stay dense with {pinned:_} parameters and the others need at least "
            f"{needed - pinned:_} at ratio {space.lower} or rank {space.rank_multiple}. The "
            f"smallest feasible budget.keep_ratio is {-(-needed * 10_000 // total) / 10_000:.4f}; "
            "or lower space.bounds[0] or space.rank_multiple."
        )


def _matches(spec: LayerSpec, patterns: Sequence[str]) -> bool:
    """Return whether a layer is meant by one of the patterns: a kind, or a name with wildcards."""
    return any(spec.kind == p or fnmatch.fnmatchcase(spec.name, p) for p in patterns)
