"""Attentions and MLPs as one choice each: a joint option, or one option per layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lrbo.allocation import knapsack
from lrbo.layers.form import Integers
from lrbo.layers.forms import is_joint
from lrbo.layers.options import MEASURES, Ladder, Losses, Measure, Menu


@dataclass(frozen=True)
class Part:
    """The joint options of an attention or MLP, with prices and losses of all its layers together.

    ``indices``, ``(options, layers)``, are those of each option on the menus of the layers.
    """

    names: tuple[str, ...]
    indices: Integers
    prices: Integers
    losses: Losses


def parts_of(
    menus: Mapping[str, Menu], losses: Mapping[str, Losses], measure: Measure
) -> list[Part]:
    """Return the parts of which all layers have joint options and losses.

    ``losses`` are of some of the menus, by name: units without any are decided already.
    """
    members: dict[str, list[str]] = {}
    for name, menu in menus.items():
        if menu.unit.closing is not None:
            members.setdefault(menu.unit.closing, []).append(name)
    parts, column = [], MEASURES.index(measure)
    for names in members.values():
        if not all(name in losses for name in names):
            continue
        indices = [_joint_indices(menus[name]) for name in names]
        if not len(indices[0]) or any(len(each) != len(indices[0]) for each in indices):
            continue
        pairs = list(zip(names, indices, strict=True))
        prices = np.sum([menus[name].costs[own, column] for name, own in pairs], 0)
        lost = np.sum([losses[name][own] for name, own in pairs], 0)
        parts.append(Part(tuple(names), np.column_stack(indices), prices, lost))
    return parts


def _joint_indices(menu: Menu) -> Integers:
    start, indices = 0, []
    for section in menu.sections:
        if is_joint(section.form):
            indices.append(np.arange(start, start + len(section.levels)))
        start += len(section.levels)
    return np.concatenate(indices) if indices else np.zeros(0, dtype=np.int64)


def joint_choices(parts: list[Part], ladders: Mapping[str, Ladder], ceiling: int) -> dict[str, int]:
    """Decide which parts take a joint option, and return the indices of these on the menus.

    Beside its joint options a part offers the combinations of its layers' options that are best at
    some price per cost: the sum of their lower convex hulls.
    """
    prices, losses, together = [], [], {name for part in parts for name in part.names}
    for part in parts:
        members = [ladders[name] for name in part.names]
        path = knapsack.sum_of_hulls(
            [(each.prices, each.losses) for each in members if each.losses is not None]
        )
        prices.append(np.concatenate([part.prices, path[0]]))
        losses.append(np.concatenate([part.losses, path[1]]))
    for name, ladder in ladders.items():
        if name not in together and ladder.losses is not None:
            prices.append(ladder.prices)
            losses.append(ladder.losses)
    solved = knapsack.solve(prices, losses, ceiling)
    return {
        name: int(index)
        for part, choice in zip(parts, solved.choices, strict=False)
        if choice < len(part.prices)
        for name, index in zip(part.names, part.indices[choice], strict=True)
    }
