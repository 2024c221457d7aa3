"""The search space that the configuration asks for, and the trials that a search begins with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import cast

import torch

from lrbo.allocation.allocate import dense_cost
from lrbo.allocation.transfer import PAPER, Donor, DonorTrial, profile_of, transferred_ratios
from lrbo.config.choices import KEEP_RATIO
from lrbo.config.options import flatten
from lrbo.config.schema import SearchConfig
from lrbo.errors import BudgetError, Collecting, ConfigError, StudyError
from lrbo.factorization.base import FactorizationMethod
from lrbo.factorization.options import BaseOptions
from lrbo.layers.forms import Based, form_named, is_joint
from lrbo.layers.frequency_form import FrequencyGroups
from lrbo.layers.joint_form import Joint
from lrbo.layers.kronecker_form import Kronecker
from lrbo.layers.options import MEASURES, UNITS, Budget, Measure, Menu, Option
from lrbo.models.specs import LayerSpec, sharing
from lrbo.optimization.budgets import over_budgets
from lrbo.optimization.fixed_variables import restrict
from lrbo.optimization.space import STARTS, Problem, Space, Start
from lrbo.optimization.thresholds import build_threshold_space
from lrbo.optimization.variables import SpaceSettings, build_ratio_space, build_weight_space
from lrbo.pipeline.feasibility import donor_records


def build_search_space(
    config: SearchConfig,
    units: tuple[LayerSpec, ...],
    method: FactorizationMethod,
    dtype: torch.dtype,
) -> Space:
    """Build the space of the units under the budget, or over a range of budgets.

    Bytes are counted in ``dtype``.

    Raises:
        ConfigError: Listing what does not fit the model.
        BudgetError: If a budget, the smallest of a range, cannot be met.
    """
    space = config.space
    options = base_options(config)
    problems = without_bases(units, space.forms, options) + without_parts(units, space.forms)
    if problems:
        raise ConfigError(problems)
    measure = cast(Measure, config.budget.measure)
    menus = menus_of(
        units,
        space.forms,
        method,
        dtype,
        multiple=space.rank_multiple,
        minimum=space.minimum_rank,
        options=options,
        measure=measure,
    )
    dense = dense_cost(menus)
    if free := [name for name, menu in menus.items() if not menu.dense.of(measure)]:
        raise ConfigError(
            [
                f"budget.include: {free[0]} only looks rows up, and costs no {UNITS[measure]}; "
                "leave embedding out, or take budget.measure=bytes or parameters"
            ]
        )
    names = [each.name for each in fields(SpaceSettings)]
    settings = SpaceSettings(**{name: getattr(space, name) for name in names})

    def at(keep_ratio: float) -> Space:
        budget = Budget.keeping(keep_ratio, dense, measure)
        build = build_weight_space if space.type == "weights" else build_ratio_space
        variables = flatten(space.variables) if space.variables else {}  # nested, as typed
        return restrict(build(Problem(menus, budget), settings), variables, space.tied)

    highest, lowest = config.budget.kept(dtype.itemsize), config.budget.lowest
    if highest > 1:
        bits, most = config.budget.bits_per_parameter, 8 * dtype.itemsize
        raise ConfigError(
            [f"budget.bits_per_parameter={bits:g}: expected at most {most}, those of the model"]
        )
    if lowest is None:
        return at(highest)
    if space.type == "thresholds":
        budget = Budget.keeping(highest, dense, measure)
        return build_threshold_space(Problem(menus, budget), settings, lowest)
    try:
        inside = at(lowest)
    except BudgetError as error:
        raise BudgetError(f"budget.lowest={lowest:g}, as one budget: {error}") from error
    if space.variables:  # whose bounds may leave no room at the other end
        at(highest)
    return over_budgets(inside, lowest, highest)


def base_options(config: SearchConfig) -> BaseOptions:
    """Return how bases are made, as configured."""
    own = config.bases
    blocks = tuple((rows, columns) for rows, columns in own.blocks)
    bands = tuple((eight, three) for eight, three in own.bands)
    return BaseOptions(
        own.method,
        tuple(own.group_sizes),
        tuple(own.percentages),
        tuple(own.row_percentages),
        blocks,
        tuple(own.frequency_groups),
        bands,
        own.damping,
        own.sweeps,
    )


def without_bases(
    units: Iterable[LayerSpec], forms: Iterable[str], options: BaseOptions
) -> list[str]:
    """Report units that cannot have any level of a form, one of each width."""
    grid = options.grid()
    lacking: dict[str, tuple[str, dict[str, None]]] = {}
    for unit in units:
        for form in map(form_named, forms):
            if not form.suits(unit):
                continue
            if isinstance(form, Based) and not form.levels(unit, grid):
                base = form.bases(grid)[0]
                needs = form.base_problem(unit.out_features, unit.in_features, base)
                _, names = lacking.setdefault(f"expected {needs}, got {[*base]}", (unit.name, {}))
                names[form.name] = None
            elif isinstance(form, Kronecker) and not form.levels(unit, grid):
                shape = f"{unit.out_features} x {unit.in_features}"
                blocks = [list(block) for block in grid.blocks]
                needs = f"expected blocks of which one divides {shape}, got {blocks}"
                lacking.setdefault(needs, (unit.name, {form.name: None}))
            elif isinstance(form, FrequencyGroups) and not form.levels(unit, grid):
                rows, numbers = unit.out_features, list(grid.frequency_groups)
                needs = (
                    f"expected numbers of groups that all have some of {rows} rows, got {numbers}"
                )
                lacking.setdefault(needs, (unit.name, {form.name: None}))
    return [
        f"space.forms: {', '.join(names)} of {unit}: {needs}; change those of bases or leave "
        "the forms out"
        for needs, (unit, names) in lacking.items()
    ]


def without_parts(units: Sequence[LayerSpec], forms: Iterable[str]) -> list[str]:
    """Report joint forms that no unit can have: of parts that are not known, or of one layer."""
    problems = []
    for form in map(form_named, forms):
        if not isinstance(form, Joint):
            continue
        if form.is_whole and not any(unit.closing for unit in units):
            problems.append(
                f"space.forms: {form.name}: no layer of this model belongs to an attention or MLP "
                "that lrbo knows; leave it out"
            )
        elif not form.is_whole and not sharing(units):
            problems.append(
                f"space.forms: {form.name}: no two layers of this model read the same input, such "
                "as q_proj, k_proj and v_proj, which here may be one layer; leave it out"
            )
    return problems


def menus_of(
    units: Sequence[LayerSpec],
    forms: Sequence[str],
    method: FactorizationMethod,
    dtype: torch.dtype,
    *,
    multiple: int = 1,
    minimum: int = 0,
    options: BaseOptions | None = None,
    measure: Measure | None = None,
) -> dict[str, Menu]:
    """The menus of units by name, as :meth:`Menu.of` makes them, without losses."""
    grid = (options or BaseOptions()).grid(multiple, minimum)
    shared = {
        spec.name: sum(each.out_features for each in group)
        for group in sharing(units)
        for spec in group
    }
    return {
        unit.name: Menu.of(
            unit,
            forms,
            bias=unit.is_biased(method.adds_bias),
            itemsize=dtype.itemsize,
            measure=measure,
            **vars(replace(grid, shared_outputs=shared.get(unit.name, 0))),
        )
        for unit in units
    }


def largest_ranks(menus: Mapping[str, Menu], measure: Measure) -> dict[str, dict[Option, int]]:
    """Return the largest rank (or level) of each unit and family that costs less than dense.

    Of what several units become together it is the largest on the menu.
    """
    column = MEASURES.index(measure)
    ranks: dict[str, dict[Option, int]] = {}
    for name, menu in menus.items():
        dense = menu.dense.of(measure)
        cheaper = [
            s.levels if is_joint(s.form) else s.levels[s.costs[:, column] < dense]
            for s in menu.sections
        ]
        ranks[name] = {
            section.family: int(levels[:, -1:].max(initial=0))
            for section, levels in zip(menu.sections[:-1], cheaper, strict=False)
            if len(levels)
        }
    return ranks


def build_starts(
    names: Sequence[str],
    layers: Sequence[LayerSpec],
    studies: str,
    begun_with: Sequence[Donor] = (),
) -> tuple[Start, ...]:
    """Build what a search over these layers begins with, by the names in ``warm_start``.

    ``begun_with`` are the donors as they were when the study was begun: their studies may have
    gone on since, or be gone.

    Raises:
        ConfigError: Listing donors that do not exist, have no trial with a value, or lack kinds
            of layers.
    """
    donors = {donor.name: donor for donor in begun_with} | {"paper": PAPER}
    starts: list[Start] = []
    problems: list[str] = []
    for name in names:
        if name in STARTS:
            starts.append(name)
            continue
        with Collecting(problems, ConfigError, StudyError):
            if name not in donors:
                study, records = donor_records(name, studies)
                units, itemsize = list(study.about.units.values()), study.about.itemsize
                trials = (
                    DonorTrial(
                        record.metrics[KEEP_RATIO],
                        record.request.variables,
                        profile_of(units, record.request.allocation, itemsize),
                    )
                    for record in records
                )
                donors[name] = Donor(name, tuple(trials))
            donor = donors[name]
            for trial in donor.trials:
                transferred_ratios(name, trial.profile, layers)
            starts.append(donor)
    if problems:
        raise ConfigError(problems)
    return tuple(starts)
