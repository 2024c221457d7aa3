"""What the layers of an allocation keep, one by one and over depth."""

from __future__ import annotations

from itertools import pairwise

import pandas as pd

from lrbo.allocation.allocate import Allocation
from lrbo.layers.forms import form_named
from lrbo.layers.frequency_form import FrequencyGroups
from lrbo.layers.joint_form import Neurons, Skip
from lrbo.layers.kronecker_form import Kronecker
from lrbo.layers.options import dense_cost
from lrbo.study.about import About

DEPTHS = 3  # parts of the depth that are told apart
OUTSIDE = "outside"  # of the blocks
NO_RANK = (
    Neurons | Skip | Kronecker | FrequencyGroups
)  # forms whose levels end with another number, if any


def options_frame(about: About, allocation: Allocation) -> pd.DataFrame:
    """Table with one row per layer of an allocation.

    Returns:
        ``name``, ``kind``, ``block``, ``form``, ``option`` (for readers), ``rank`` (missing where
        the option has none), ``stored`` and ``dense`` (in the measure of the budget), and
        ``kept``, their ratio.
    """
    measure = allocation.budget.measure
    rows = []
    for name, option in allocation.options.items():
        spec = about.layers[name]
        has_rank = bool(option.level) and not isinstance(form_named(option.form), NO_RANK)
        rank = option.rank if has_rank else None
        stored = allocation.costs[name].of(measure)
        dense = dense_cost([spec], about.itemsize).of(measure)
        rows.append((name, spec.kind, spec.block, option.form, option.label, rank, stored, dense))
    columns = ["name", "kind", "block", "form", "option", "rank", "stored", "dense"]
    table = pd.DataFrame(rows, columns=columns).astype({"rank": "Int64", "block": "Int64"})
    table["kept"] = table["stored"] / table["dense"]
    return table


def dense_size(about: About) -> dict[str, float]:
    """Size and cost of the whole dense model, by metric."""
    return {
        "model_parameters": about.model_parameters,
        "model_bytes": about.model_parameters * about.itemsize,
        "macs_per_token": dense_cost(about.layers.values(), about.itemsize).macs,
    }


def kept_by_depth(table: pd.DataFrame) -> pd.DataFrame:
    """Return the share of their dense cost that layers keep, by kind and depth.

    Embedding and head have no depth, and are in the last column alone.

    Args:
        table: From :func:`options_frame`.

    Returns:
        A row per kind, and a column per third of the blocks, named after them; missing where the
        kind has no layer. The last row and the last column are ``all``.
    """
    blocks = int(table["block"].max()) + 1
    edges = sorted({-(-part * blocks // DEPTHS) for part in range(DEPTHS + 1)})
    names = [f"block {a}" if b - a == 1 else f"blocks {a}-{b - 1}" for a, b in pairwise(edges)]
    depth = pd.cut(table["block"].astype(float), edges, right=False, labels=names).astype(object)
    depth = depth.fillna(OUTSIDE)
    sums = table.assign(depth=depth).pivot_table(
        ["stored", "dense"], "kind", "depth", "sum", margins=True, margins_name="all", sort=False
    )
    shares: pd.DataFrame = sums["stored"] / sums["dense"]
    return shares[[*(names if len(names) > 1 else ()), "all"]]
