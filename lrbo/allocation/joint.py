"""Layers that become something together, as one choice: a joint option, or one option per layer."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lrbo.allocation import knapsack
from lrbo.layers.form import Integers
from lrbo.layers.forms import is_joint
from lrbo.layers.joint_form import WHOLE_PARTS
from lrbo.layers.options import MEASURES, Ladder, Losses, Measure, Menu

Choices = tuple[Integers, Losses]  # prices and losses


@dataclass(frozen=True)
class Part:
    """The joint options of some layers, with prices and losses of all of them together.

    ``indices``, ``(options, layers)``, are those of each option on the menus of the layers.
    """

    names: tuple[str, ...]
    indices: Integers
    prices: Integers
    losses: Losses


def joint_choices(
    menus: Mapping[str, Menu],
    losses: Mapping[str, Losses],
    measure: Measure,
    ladders: Mapping[str, Ladder],
    ceiling: int,
) -> Iterator[dict[str, int]]:
    """Decide which layers take joint options, and yield the indices of these on the menus.

    Beside its joint options a part offers the combinations of its layers' options that are best at
    some price per cost: the sum of their lower convex hulls. Where layers that read the same input
    have joint options within attentions and MLPs that have some too, a part offers combinations
    of what these layers offer and of its other layers. There are decisions about whole parts alone,
    about those layers alone, and about both, so that no form is worse than none.

    ``losses`` are of some of the menus, by name: units without any are decided already.
    """
    wholes = list(_parts(menus, losses, measure, is_whole=True))
    groups = list(_parts(menus, losses, measure, is_whole=False))
    choices = {
        name: (ladder.prices, ladder.losses)
        for name, ladder in ladders.items()
        if ladder.losses is not None
    }
    for parts in filter(None, (wholes, groups)):
        taken, _ = _taken(parts, choices, ceiling)
        yield taken
    if wholes and groups:
        nested = dict(choices)
        for group in groups:
            first, *others = group.names
            nested[first] = _offered(group, choices)
            for other in others:
                nested[other] = np.zeros(1, dtype=np.int64), np.zeros(1)
        taken, room = _taken(wholes, nested, ceiling)
        left = {name: own for name, own in choices.items() if name not in taken}
        groups = [group for group in groups if group.names[0] not in taken]
        yield taken | _taken(groups, left, room)[0]


def _parts(
    menus: Mapping[str, Menu], losses: Mapping[str, Losses], measure: Measure, *, is_whole: bool
) -> Iterator[Part]:
    """Yield attentions and MLPs, or else layers that read the same input, that all have options."""
    members: dict[Hashable, list[str]] = {}
    column = MEASURES.index(measure)
    for name, menu in menus.items():
        unit = menu.unit
        if unit.closing is not None or not is_whole:
            part = unit.closing if is_whole else (unit.closing, unit.site)
            members.setdefault(part, []).append(name)
    for names in members.values():
        if not all(name in losses for name in names):
            continue
        indices = [_joint_indices(menus[name], is_whole) for name in names]
        if not len(indices[0]) or any(len(each) != len(indices[0]) for each in indices):
            continue
        pairs = list(zip(names, indices, strict=True))
        prices = np.sum([menus[name].costs[own, column] for name, own in pairs], 0)
        lost = np.sum([losses[name][own] for name, own in pairs], 0)
        yield Part(tuple(names), np.column_stack(indices), prices, lost)


def _joint_indices(menu: Menu, is_whole: bool) -> Integers:
    start, indices = 0, [np.zeros(0, dtype=np.int64)]
    for section in menu.sections:
        if is_joint(section.form) and (section.form in WHOLE_PARTS) == is_whole:
            indices.append(np.arange(start, start + len(section.levels)))
        start += len(section.levels)
    return np.concatenate(indices)


def _taken(
    parts: Sequence[Part], choices: Mapping[str, Choices], ceiling: int
) -> tuple[dict[str, int], int]:
    """Return the joint options of least loss by layer, and what they leave of the ceiling."""
    together = {name for part in parts for name in part.names}
    offered = [_offered(part, choices) for part in parts]
    offered += [own for name, own in choices.items() if name not in together]
    prices, losses = [each for each, _ in offered], [each for _, each in offered]
    solved, taken = knapsack.solve(prices, losses, ceiling), dict[str, int]()
    for part, choice in zip(parts, solved.choices, strict=False):
        if choice < len(part.prices):
            taken |= {n: int(i) for n, i in zip(part.names, part.indices[choice], strict=True)}
            ceiling -= int(part.prices[choice])
    return taken, ceiling


def _offered(part: Part, choices: Mapping[str, Choices]) -> Choices:
    """Return the joint options of a part, then the combinations of its layers' options."""
    path = knapsack.sum_of_hulls([choices[name] for name in part.names])
    return np.concatenate([part.prices, path[0]]), np.concatenate([part.losses, path[1]])
