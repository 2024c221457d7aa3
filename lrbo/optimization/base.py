"""What every search space owes, and what spaces share."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol, runtime_checkable

import torch

from lrbo.accounting import dense_parameters
from lrbo.allocation import (
    Allocation,
    Budget,
    Cost,
    allocate,
    allocate_by_loss,
    smallest_parameters,
)
from lrbo.errors import BudgetError
from lrbo.optimization.front import KEEP_RATIO
from lrbo.sensitivity import Curves
from lrbo.specs import LayerSpec
from lrbo.transfer import Donor, transferred_ratios
from lrbo.trial import Origin

Start = str | Donor
STARTS = ("uniform", "analytic", "start")


@dataclass(frozen=True)
class LinearConstraint:
    """A bound on a weighted sum of variables.

    Attributes:
        weights: By name of the variable.
        bound: Of the sum.
        is_equality: Whether the sum must be the bound, or at most it.
    """

    weights: Mapping[str, float]
    bound: float
    is_equality: bool


@dataclass(frozen=True)
class WarmStart:
    """A trial that needs no search.

    Attributes:
        origin: What it is.
        point: Where it stands in the space, ``{}`` if nowhere.
        allocation: Its ranks.
    """

    origin: Origin
    point: Mapping[str, float]
    allocation: Allocation


@runtime_checkable
class Space(Protocol):
    """What a search needs of its space: how points look, and what they mean."""

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the variables, in order."""
        ...

    @property
    def bounds(self) -> Mapping[str, tuple[float, float]]:
        """Return the smallest and largest value of each variable."""
        ...

    @property
    def constraint(self) -> LinearConstraint | None:
        """Return what points must keep beside the bounds."""
        ...

    @property
    def budget(self) -> Budget:
        """Return the ceiling."""
        ...

    @property
    def cost(self) -> Cost:
        """Return the stored parameters of a layer at a rank."""
        ...

    def allocate(self, point: Mapping[str, float]) -> Allocation:
        """Turn a point into ranks that use the whole budget."""
        ...

    def uniform(self) -> Allocation:
        """Return the baseline: the same wished ratio for every layer that the budget covers."""
        ...

    def analytic(self) -> tuple[Allocation, Mapping[str, float]] | None:
        """Return the allocation of least predicted loss, with its point, ``{}`` if none."""
        ...

    def start_point(self) -> Mapping[str, float] | None:
        """Return the configured start, if there is one."""
        ...

    def realised(
        self, allocation: Allocation, point: Mapping[str, float]
    ) -> Mapping[str, float] | None:
        """Return the point that an allocation stands at, for the surrogate."""
        ...

    def project(self, values: Sequence[float]) -> list[float]:
        """Return the nearest point that the space allows."""
        ...

    def sobol_point(self, index: int, seed: int) -> dict[str, float]:
        """Return a point of a scrambled Sobol sequence; a function of index and seed alone."""
        ...

    def warm_starts(self, wanted: Sequence[Start]) -> list[WarmStart]:
        """Return the trials that need no search, in the order that is wanted."""
        ...

    def with_curves(self, curves: Curves) -> Space:
        """Return the space with the loss curves of the layers."""
        ...


@runtime_checkable
class BudgetSpace(Space, Protocol):
    """A space of one budget, which can be had under another one."""

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """Return all layers that the budget covers."""
        ...

    @property
    def dense(self) -> tuple[str, ...]:
        """Return the layers that no trial of the search compresses."""
        ...

    @property
    def rank_multiple(self) -> int:
        """Return what ranks are multiples of."""
        ...

    def at(self, budget: Budget) -> BudgetSpace:
        """Return the space under another budget."""
        ...

    def with_curves(self, curves: Curves) -> BudgetSpace:
        """Return the space with the loss curves of the layers."""
        ...


def known_starts(space: BudgetSpace, wanted: Sequence[Start]) -> list[WarmStart]:
    """Return the trials that a space of one budget knows without a search.

    Args:
        space: The space.
        wanted: ``"uniform"`` for the baseline, ``"analytic"`` for the allocation of least
            predicted loss (none if losses are not predicted), ``"start"`` for the configured
            start (none if there is none), or a donor (left out where an earlier donor lends
            the same ranks).

    Raises:
        ConfigError: If a donor has no layers of a kind that the model has.
    """
    found: list[list[WarmStart]] = []
    for start in wanted:
        one: WarmStart | None = None
        if isinstance(start, Donor):
            one = _transferred(space, start)
        elif start == "uniform":
            uniform = space.uniform()
            one = WarmStart("uniform", space.realised(uniform, {}) or {}, uniform)
        elif start == "analytic" and (analytic := space.analytic()) is not None:
            one = WarmStart("analytic", analytic[1], analytic[0])
        elif start == "start" and (point := space.start_point()) is not None:
            allocation = space.allocate(point)
            one = WarmStart("start", space.realised(allocation, point) or {}, allocation)
        if one is not None:
            found.append([one])
    return without_repeats(found)


def without_repeats(parts: Sequence[Sequence[WarmStart]]) -> list[WarmStart]:
    """Leave out what donors lend where a baseline or an earlier donor has the same ranks.

    Baselines stay whatever their ranks are: reports compare with each of them. So does the first
    that a donor lends if all of it is the baselines': who asks for a donor gets no other point in
    its place.

    Args:
        parts: By what was wanted: a baseline, or a donor.
    """
    starts = [start for part in parts for start in part]
    known = [start.allocation.ranks for start in starts if start.origin != "transfer"]
    lent: list[Mapping[str, int | None]] = []
    found: list[WarmStart] = []
    for part in parts:
        new = []
        for start in part:
            ranks = start.allocation.ranks
            if start.origin != "transfer" or ranks not in (*known, *lent):
                new.append(start)
                lent += [ranks] if start.origin == "transfer" else []
        if not new and not any(start.allocation.ranks in lent for start in part):
            new = list(part[:1])
            lent += [start.allocation.ranks for start in new]
        found += new
    return found


def _transferred(space: BudgetSpace, donor: Donor) -> WarmStart:
    """Return what a donor lends: its point where it has these variables, or else its ratios."""
    trial = donor.at(space.budget.parameters / dense_parameters(space.layers))
    if trial.variables and set(space.names) == set(trial.variables) - {KEEP_RATIO}:
        values = space.project([trial.variables[name] for name in space.names])
        point = dict(zip(space.names, values, strict=True))
        allocation = space.allocate(point)
    else:
        point = {}
        allocation = allocate(
            transferred_ratios(donor.name, trial.profile, space.layers),
            space.layers,
            space.budget,
            cost=space.cost,
            rank_multiple=space.rank_multiple,
            dense=space.dense,
        )
    return WarmStart("transfer", space.realised(allocation, point) or {}, allocation)


def project(
    values: Sequence[float],
    limits: Sequence[tuple[float, float]],
    constraint: LinearConstraint | None,
) -> list[float]:
    """Return the nearest point (Euclidean) within limits that meets a constraint with equality.

    Args:
        values: The point.
        limits: Smallest and largest value of each variable.
        constraint: Of positive weights, in the order of the values. More parameters never hurt a
            search, so its bound is met with equality, unless all upper limits stay below it.
    """
    wanted = torch.tensor(values, dtype=torch.float64)
    lower, upper = torch.tensor(limits, dtype=torch.float64).T
    if constraint is None:
        return [float(value) for value in wanted.clamp(lower, upper)]
    weights = torch.tensor(list(constraint.weights.values()), dtype=torch.float64)

    def at(multiplier: float) -> torch.Tensor:
        return (wanted + multiplier * weights).clamp(lower, upper)

    low, high = -1.0, 1.0
    while float(at(low) @ weights) > constraint.bound and low > -1e9:
        low *= 2
    while float(at(high) @ weights) < constraint.bound and high < 1e9:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        if float(at(middle) @ weights) <= constraint.bound:
            low = middle
        else:
            high = middle
    return [float(value) for value in at(low)]


def sobol_within(space: Space, index: int, seed: int) -> dict[str, float]:
    """Return a point of a scrambled Sobol sequence over the bounds, taken into the space."""
    make: Any = torch.quasirandom.SobolEngine  # untyped in torch
    engine = make(len(space.names), scramble=True, seed=seed)
    unit = engine.fast_forward(index).draw(1, dtype=torch.float64)[0]
    values = [
        low + (high - low) * float(value)
        for value, (low, high) in zip(unit, space.bounds.values(), strict=True)
    ]
    return dict(zip(space.names, space.project(values), strict=True))


def uniform_ratios(
    layers: Sequence[LayerSpec], budget: Budget, *, cost: Cost, rank_multiple: int
) -> Allocation:
    """Return the baseline: the same wished ratio for every layer that the budget covers.

    Layers that a search keeps dense are compressed here too, as in the literature's uniform rows.
    """
    ratios = dict.fromkeys((spec.name for spec in layers), 1.0)
    return allocate(ratios, layers, budget, cost=cost, rank_multiple=rank_multiple)


def least_loss(
    curves: Curves,
    layers: Sequence[LayerSpec],
    budget: Budget,
    *,
    dense: Sequence[str],
    cost: Cost,
    rank_multiple: int,
    minimum: int = 0,
) -> Allocation:
    """Return the allocation of least summed loss; layers without a curve stay dense.

    Those are too small for any low-rank form, and have no factors.
    """
    without = [spec.name for spec in layers if spec.name not in curves]
    return allocate_by_loss(
        curves,
        layers,
        budget,
        cost=cost,
        rank_multiple=rank_multiple,
        dense=sorted({*dense, *without}),
        minimum=minimum,
    )


def assign_groups(
    layers: Sequence[LayerSpec], groups: Mapping[str, Sequence[str]], dense: Sequence[str]
) -> tuple[tuple[str, ...], dict[str, str], list[str]]:
    """Sort layers into those that stay dense and the groups of the others.

    Returns:
        Names of dense layers, group by name of the others, and problems: layers of no group.
    """
    pinned = tuple(spec.name for spec in layers if _matches(spec, dense))
    taken: dict[str, str] = {}
    problems: list[str] = []
    for spec in layers:
        if spec.name in pinned:
            continue
        group = next((name for name, kinds in groups.items() if _matches(spec, kinds)), None)
        if group is None:
            problems.append(
                f"space: no group takes layer {spec.name} (kind {spec.kind}); add its kind to "
                "space.groups or to space.dense"
            )
        else:
            taken[spec.name] = group
    return pinned, taken, problems


def require_feasible(
    layers: Sequence[LayerSpec],
    budget: Budget,
    dense: Sequence[str],
    *,
    cost: Cost,
    rank_multiple: int,
    lower: float = 0.0,
    relief: str = "space.rank_multiple",
) -> None:
    """Refuse a budget that the smallest ranks or the lower bound of ratios exceed.

    Args:
        layers: The layers that the budget covers.
        budget: The ceiling.
        dense: Names of layers that stay dense.
        cost: Stored parameters of a layer at a rank.
        rank_multiple: Smallest rank of the others.
        lower: Smallest mean keep ratio of the others.
        relief: Keys that may be lowered instead, for the message.

    Raises:
        BudgetError: With the smallest feasible keep ratio.
    """
    total = dense_parameters(layers)
    pinned = dense_parameters(spec for spec in layers if spec.name in dense)
    smallest = smallest_parameters(layers, cost=cost, rank_multiple=rank_multiple, dense=dense)
    # Of the decimal that was typed: in binary, 0.07 of 100 is 7.000000000000001.
    at_bounds = pinned + math.ceil(Fraction(str(float(lower))) * (total - pinned))
    needed = max(smallest, at_bounds)
    if needed > budget.parameters:
        raise BudgetError(
            f"budget of {budget.parameters:_} parameters (keep_ratio "
            f"{budget.parameters / total:.4f}) cannot be met: {len(dense)} layers "
            f"stay dense with {pinned:_} parameters and the others need at least "
            f"{needed - pinned:_} at ratio {lower} or rank {rank_multiple}. The "
            f"smallest feasible budget.keep_ratio is {-(-needed * 10_000 // total) / 10_000:.4f}; "
            f"or lower {relief}."
        )


def _matches(spec: LayerSpec, patterns: Sequence[str]) -> bool:
    """Return whether a layer is meant by one of the patterns: a kind, or a name with wildcards."""
    return any(spec.kind == p or fnmatch.fnmatchcase(spec.name, p) for p in patterns)
