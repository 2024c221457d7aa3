"""Search variables: ratios that units keep, or weights of their predicted losses."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from lrbo.allocation.allocate import Allocation
from lrbo.errors import ConfigError
from lrbo.layers.forms import Based, form_named, is_delta
from lrbo.layers.options import Losses, Option
from lrbo.models.specs import LayerSpec
from lrbo.optimization.space import LinearConstraint, Point, Problem, Space

EXPONENT = "exponent"
REPAIR = "form.repair"  # of what a base leaves, by a low rank


@dataclass(frozen=True)
class RatioSpace(Space):
    """Keep ratios that groups of units share; 1 is dense.

    The budget is linear in them: ``sum share_i x_i = room``, where ``share_i`` is the variable's
    part of the dense cost that is searched, and ``room`` is what the budget leaves after the
    units that stay dense.
    """

    units: Mapping[str, tuple[str, ...]]  # of each variable, by name
    start: Mapping[str, float] | None  # ratios to begin with, the others at room

    @property
    def shares(self) -> dict[str, float]:
        """Each variable's part of the dense cost that is searched; they sum to 1."""
        prices = {name: self.problem.price(units) for name, units in self.units.items()}
        total = sum(prices.values())
        return {name: price / total for name, price in prices.items()}

    @property
    def room(self) -> float:
        """The mean keep ratio that the budget leaves to the units that are searched."""
        pinned = self.problem.price(self.problem.dense)
        searched = sum(map(self.problem.price, self.units.values()))
        return (self.problem.budget.limit - pinned) / searched

    @property
    def constraint(self) -> LinearConstraint:
        """The budget; an inequality would add a direction of which no trial tells anything."""
        room, upper = self.room, max(high for _, high in self.bounds.values())
        return LinearConstraint(self.shares, room, is_equality=room < upper)

    def allocate(self, point: Point) -> Allocation:
        """Turn a point into options that use the whole budget."""
        ratios = {unit: point[name] for name, units in self.units.items() for unit in units}
        return self.problem.by_ratio(ratios)

    def realised(self, allocation: Allocation, point: Point) -> Point:
        """Return compressed over dense cost; ``{}`` if a unit is compressed that stays dense here.

        Options are discrete and the rest of the budget is spent, so it differs from the proposal.
        """
        del point
        if allocation.compressed.keys() & set(self.problem.dense):
            return {}
        return {name: self.problem.share(allocation, units) for name, units in self.units.items()}

    def start_point(self) -> Point:
        """Return the configured start ratios, projected onto the budget; ``{}`` if none."""
        if self.start is None:
            return {}
        return self.project({**dict.fromkeys(self.names, self.room), **self.start})


@dataclass(frozen=True)
class SpaceSettings:
    """What the variables of a space are; bounds are the least and the largest value of each."""

    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)  # patterns of units, by name
    dense: Sequence[str] = ()  # patterns of the units that stay dense
    bounds: Sequence[float] = (0.2, 1.0)
    granularity: str = "kind"  # what a ratio is of; or "depth", or "layer"
    depth_groups: int = 1  # parts of consecutive blocks, each with ratios of its own
    start: Mapping[str, Any] = field(default_factory=dict)  # ratios by group, or one per part
    knots: int = 3  # weights over depth: none, or at least 2
    form_weights: bool = True  # whether families of forms, if several, have variables
    exponent: bool = True  # whether the power of the predicted losses is a variable


def build_ratio_space(problem: Problem, settings: SpaceSettings) -> RatioSpace:
    """Build the space of ratios of a model.

    A pattern is a kind (``q_proj``) or a shell pattern on the unit's name. The first group that
    matches takes the unit; groups without a unit are dropped, so that one file serves several
    families. Variables are groups (``qk``), groups in one of ``depth_groups`` parts of consecutive
    blocks (``qk.2``), or units. ``start`` may have a ratio per depth group.

    Raises:
        ConfigError: Listing units that no group takes, and start values without a group.
        BudgetError: If the budget cannot be met; says the smallest feasible keep ratio.
    """
    problem, groups_of, problems = _grouped(problem, settings.groups, settings.dense)
    blocks = 1 + max((unit.block or 0 for unit in problem.units), default=0)
    parts = {"kind": 1, "depth": min(settings.depth_groups, blocks), "layer": blocks}
    units: dict[str, tuple[str, ...]] = {}
    starts: dict[str, float] = {}
    for unit in problem.units:
        if unit.name not in groups_of:
            continue
        group = groups_of[unit.name]
        depth = (unit.block or 0) * parts[settings.granularity] // blocks
        names = {"kind": group, "depth": f"{group}.{depth}", "layer": unit.name}
        name = names[settings.granularity]
        units[name] = (*units.get(name, ()), unit.name)
        if group in settings.start:
            ratio = settings.start[group]
            if not isinstance(ratio, float | int):
                ratio = ratio[min(depth, len(ratio) - 1)]
            starts[name] = float(ratio)
    if unknown := sorted(set(settings.start) - set(settings.groups)):
        known = sorted(settings.groups)
        problems.append(f"space.start names {unknown}, which are no groups: {known}")
    if problems:
        raise ConfigError(problems)
    low, high = settings.bounds
    problem.require_feasible(low, relief="space.bounds[0] or space.rank_multiple")
    start = starts if settings.start else None
    return RatioSpace(problem, dict.fromkeys(units, (low, high)), units, start)


@dataclass(frozen=True)
class WeightSpace(Space):
    """Distortions of predicted losses around the analytic allocation, under a budget.

    A point distorts the predicted losses ``E_u(o)`` of the options of units, and the allocation is
    the one of least summed distorted loss ``exp(kind + depth + form) * E_u(o) ** exp(exponent)``:
    at the origin, the analytic allocation. Every point uses the budget up.

    There is a variable ``kind.GROUP`` for each group, and ``depth.0``, ``depth.1``, ... for each
    knot, at equal distances from the first block to the last, linear in between. Where forms differ
    in what they are, there is a variable ``form.NAME`` for each, and ``form.repair`` for bases
    with a rank: predictions of different families err differently. What attentions or MLPs
    take as a whole is weighed by kind and depth as the layer that ends them.
    """

    groups: Mapping[str, str]  # by searched unit
    knots: int  # 0 leaves depth out

    def allocate(self, point: Point) -> Allocation:
        """Return the allocation of least distorted loss; ValueError before losses are predicted."""
        if not self.problem.is_predicted:
            raise ValueError("nothing is predicted yet; calibrate with output gradients first.")
        power = math.exp(point.get(EXPONENT, 0.0))
        weights = np.array([0.0 if name == EXPONENT else point[name] for name in self.names])
        distorted: dict[str, Losses] = {}
        for name, own in self._coefficients.items():
            menu = self.problem.menus[name]
            assert menu.losses is not None
            distorted[name] = np.exp(own @ weights) * menu.losses**power
        return self.problem.by_loss(distorted)

    @cached_property
    def _coefficients(self) -> dict[str, Losses]:
        """How the weights of all options depend on the variables, by unit: ``(n, variables)``."""
        columns = {name: index for index, name in enumerate(self.names)}
        blocks = max((unit.block or 0 for unit in self.problem.units), default=0)
        depths = np.linspace(0.0, 1.0, self.knots)
        coefficients = {}
        for name, group in self.groups.items():
            menu = self.problem.menus[name]
            own = np.zeros((len(menu), len(columns)))
            own[:, columns[f"kind.{group}"]] = 1.0
            depth = (menu.unit.block or 0) / max(blocks, 1)
            is_inside = menu.unit.block is not None  # embedding and head have no depth
            for knot, hat in enumerate(np.eye(self.knots) if is_inside else ()):
                own[:, columns[f"depth.{knot}"]] = np.interp(depth, depths, hat)
            start = 0
            for section in menu.sections:
                end = start + len(section.levels)
                family = family_of(section.form)
                if (column := columns.get(f"form.{family}")) is not None:
                    own[start:end, column] = 1.0
                if has_repair(section.form) and REPAIR in columns:
                    own[start:end, columns[REPAIR]] = section.levels[:, -1] > 0
                start = end
            coefficients[name] = own
        return coefficients

    def analytic_point(self) -> Point:
        """Return the origin."""
        return dict.fromkeys(self.names, 0.0)

    def realised(self, allocation: Allocation, point: Point) -> Point:
        """Return the point itself, if there is one."""
        del allocation
        return point


def build_weight_space(problem: Problem, settings: SpaceSettings) -> WeightSpace:
    """Build the weight space of a model; losses are predicted later.

    Groups, and errors about them and the budget, are as for ratios; no groups is one per kind.
    """
    kinds = {kind: [kind] for kind in dict.fromkeys(unit.kind for unit in problem.units)}
    problem, groups_of, problems = _grouped(problem, settings.groups or kinds, settings.dense)
    if problems:
        raise ConfigError(problems)
    problem.require_feasible(relief="space.minimum_rank or space.rank_multiple", any_form=True)
    names = [f"kind.{group}" for group in dict.fromkeys(groups_of.values())]
    names += [f"depth.{knot}" for knot in range(settings.knots)]
    names += [EXPONENT] if settings.exponent else []
    names += form_variables(problem) if settings.form_weights else []
    low, high = settings.bounds
    return WeightSpace(problem, dict.fromkeys(names, (low, high)), groups_of, settings.knots)


def family_of(form: str) -> str:
    """Return the name that forms of one function share: all low-rank forms but deltas are one."""
    return "low_rank" if Option(form).is_low_rank and not is_delta(form) else form


def has_repair(form: str) -> bool:
    """Whether a form is a base and a low rank of what it leaves."""
    return isinstance(form_named(form), Based) and not Option(form).is_low_rank


def form_variables(problem: Problem) -> list[str]:
    """Return a variable per family of forms, if there are several, and one for repair, if any."""
    forms = dict.fromkeys(s.form for menu in problem.menus.values() for s in menu.sections[:-1])
    families = list(dict.fromkeys(map(family_of, forms)))
    if len(families) < 2:
        return []
    repair = [REPAIR] if any(map(has_repair, forms)) else []
    return [*(f"form.{family}" for family in families), *repair]


def _grouped(
    problem: Problem, groups: Mapping[str, Sequence[str]], dense: Sequence[str]
) -> tuple[Problem, dict[str, str], list[str]]:
    """Return the problem with its dense units, the group of each other unit, and mistakes."""
    fixed = pinned(problem, dense)
    groups_of: dict[str, str] = {}
    problems: list[str] = []
    for spec in problem.units:
        if spec.name in fixed:
            continue
        group = next((name for name, kinds in groups.items() if _matches(spec, kinds)), None)
        if group is None:
            problems.append(
                f"space: no group takes layer {spec.name} (kind {spec.kind}); add its kind to "
                "space.groups or to space.dense"
            )
        else:
            groups_of[spec.name] = group
    if not groups_of and not problems:
        problems.append("space: every layer is kept dense, nothing is left to search")
    return replace(problem, dense=fixed), groups_of, problems


def pinned(problem: Problem, dense: Sequence[str]) -> tuple[str, ...]:
    """Return the units that match a pattern of those that stay dense."""
    return tuple(spec.name for spec in problem.units if _matches(spec, dense))


def _matches(spec: LayerSpec, patterns: Sequence[str]) -> bool:
    return any(spec.kind == p or fnmatch.fnmatchcase(spec.name, p) for p in patterns)
