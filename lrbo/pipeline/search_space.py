"""The search space that the configuration asks for."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

from lrbo.accounting import Storage
from lrbo.allocation import Budget
from lrbo.checks import variables
from lrbo.errors import BudgetError
from lrbo.factorization.base import FactorizationMethod
from lrbo.optimization.base import BudgetSpace, Space
from lrbo.optimization.front_space import FrontSpace
from lrbo.optimization.restricted import restrict
from lrbo.optimization.space import build_space
from lrbo.optimization.weights import build_weight_space
from lrbo.options import RANGES
from lrbo.schema import SearchConfig
from lrbo.specs import ModelMap


def build_search_space(
    config: SearchConfig, layers: ModelMap, method: FactorizationMethod
) -> Space:
    """Build the search space under the budget, or over a range of budgets.

    Args:
        config: Checked values.
        layers: The map of the model.
        method: Whose layers are stored.

    Raises:
        ConfigError: Listing what does not fit the model.
        BudgetError: If a budget, the smallest of a range, cannot be met.
    """
    highest, lowest = config.budget.keep_ratio, config.budget.lowest
    if lowest is None:
        return _space_at(highest, config, layers, method)
    try:
        inside = _space_at(lowest, config, layers, method)
    except BudgetError as error:
        raise BudgetError(f"budget.lowest={lowest:g}, as one budget: {error}") from error
    if config.space.variables:  # whose bounds may leave no room at the other end
        _space_at(highest, config, layers, method)
    return FrontSpace(inside, tuple(layers.compressible), lowest, highest)


def _space_at(
    keep_ratio: float, config: SearchConfig, layers: ModelMap, method: FactorizationMethod
) -> BudgetSpace:
    """Build the search space under one budget, without what the configuration takes out."""
    space = config.space
    whole = _whole_space_at(keep_ratio, config, layers, method)
    smallest, largest = RANGES[space.type]
    return restrict(whole, variables(space), space.tied, smallest=smallest, largest=largest)


def _whole_space_at(
    keep_ratio: float, config: SearchConfig, layers: ModelMap, method: FactorizationMethod
) -> BudgetSpace:
    """Build the search space under one budget."""
    space = config.space
    budget = Budget.from_keep_ratio(layers.compressible, keep_ratio)
    cost = partial(method.parameters, storage=cast(Storage, config.budget.storage))
    if space.type == "weights":
        return build_weight_space(
            layers.compressible,
            budget,
            groups=space.groups,
            dense=space.dense,
            knots=space.knots,
            exponent=space.exponent,
            width=space.bounds[1],
            cost=cost,
            rank_multiple=space.rank_multiple,
            minimum=space.minimum_rank,
        )
    return build_space(
        layers.compressible,
        budget,
        groups=space.groups,
        dense=space.dense,
        granularity=cast(Any, space.granularity),
        depth_groups=space.depth_groups,
        bounds=(space.bounds[0], space.bounds[1]),
        start=space.start,
        cost=cost,
        rank_multiple=space.rank_multiple,
    )
