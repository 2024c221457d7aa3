"""Carry an allocation to another model or budget: by kind of layer and relative depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np

from lrbo.allocation.allocate import Allocation
from lrbo.errors import ConfigError
from lrbo.layers.joint_form import SharedFactored
from lrbo.layers.options import dense_cost
from lrbo.models.specs import LayerSpec, sharing

# By kind: ratios at relative depths, 0 for the first block and 1 for the last.
Profile = Mapping[str, Sequence[Sequence[float]]]


@dataclass(frozen=True)
class DonorTrial:
    """One allocation of another study, without the names of its layers.

    ``keep_ratio`` is of the layers that the budget covers; ``variables`` is its point, or ``{}``.
    """

    keep_ratio: float
    variables: Mapping[str, float]
    profile: Profile


@dataclass(frozen=True)
class Donor:
    """One or more allocations of a study, named as in ``warm_start``."""

    name: str
    trials: tuple[DonorTrial, ...]

    def at(self, keep_ratio: float) -> DonorTrial:
        """Return the largest trial that keeps at most so much, or else the smallest one."""
        size = attrgetter("keep_ratio")
        fitting = [trial for trial in self.trials if size(trial) <= keep_ratio + 1e-9]
        return max(fitting, key=size) if fitting else min(self.trials, key=size)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Donor:
        """Return the donor of these fields, as ``asdict`` gives them."""
        return cls(fields["name"], tuple(DonorTrial(**trial) for trial in fields["trials"]))


def profile_of(layers: Sequence[LayerSpec], allocation: Allocation, itemsize: int) -> Profile:
    """The ratios of an allocation of these layers, in the measure of its budget.

    Of layers that share a factor, which one of them stores, it is the ratio of all together.
    """
    measure = allocation.budget.measure
    dense = {spec.name: dense_cost([spec], itemsize).of(measure) for spec in layers}
    kept = {name: float(cost.of(measure)) for name, cost in allocation.costs.items()}
    for group in sharing(layers):
        if allocation.options[group[0].name].form == SharedFactored.name:
            together = sum(kept[spec.name] for spec in group)
            whole = sum(dense[spec.name] for spec in group)
            kept |= {spec.name: together * dense[spec.name] / whole for spec in group}
    costs: dict[str, dict[float, tuple[float, int]]] = {}
    for spec, depth in zip(layers, _depths(layers), strict=True):
        by_depth = costs.setdefault(spec.kind, {})
        cost, whole = by_depth.get(depth, (0.0, 0))
        by_depth[depth] = cost + kept[spec.name], whole + dense[spec.name]
    return {
        kind: [(depth, cost / whole) for depth, (cost, whole) in sorted(by_depth.items())]
        for kind, by_depth in costs.items()
    }


def transferred_ratios(
    donor: str, profile: Profile, layers: Sequence[LayerSpec]
) -> dict[str, float]:
    """Interpolate the profile of a donor at the depth of each layer of a model.

    The paper transfers between models of one shape (figure 4); depths may differ here.

    Raises:
        ConfigError: If the profile lacks kinds of layers; lists them with a layer of each.
    """
    if missing := {spec.kind: spec.name for spec in reversed(layers) if spec.kind not in profile}:
        examples = ", ".join(f"{kind} ({name})" for kind, name in sorted(missing.items()))
        problem = (
            f"warm_start: {donor} has no layers of kind {examples}; its kinds are "
            f"{', '.join(sorted(profile))}. Take a study of a model of the same family and with "
            "the same budget.include"
        )
        raise ConfigError([problem])
    ratios = {}
    for spec, depth in zip(layers, _depths(layers), strict=True):
        depths, shares = zip(*profile[spec.kind], strict=True)
        ratios[spec.name] = float(np.interp(depth, depths, shares))
    return ratios


def _depths(layers: Sequence[LayerSpec]) -> list[float]:
    """Return the relative depth of each layer: 0 in the first block, 1 in the last."""
    last = max((spec.block or 0 for spec in layers), default=0)
    return [(spec.block or 0) / max(last, 1) for spec in layers]


# Ranks that the paper printed for Llama-2-7B in each quarter of the depth, by keep ratio and kind
# (Bolaco, table 8, 5x4). None is dense, and so is v_proj.
_PRINTED: Mapping[float, Mapping[str, tuple[int | None, ...]]] = {
    0.8: {
        "q_proj": (680, 968, 408, 656),
        "k_proj": (680, 968, 408, 656),
        "o_proj": (1728, 1888, 1488, 496),
        "gate_proj": (2960, 2536, None, 2824),
        "up_proj": (None, 2640, 2272, 2448),
        "down_proj": (None, 2632, 2864, 2280),
    },
    0.7: {
        "q_proj": (1016, 840, 408, 408),
        "k_proj": (1016, 840, 408, 408),
        "o_proj": (1632, 1632, 992, 560),
        "gate_proj": (2376, 2384, 2376, 2384),
        "up_proj": (2384, 2376, 2384, 1896),
        "down_proj": (2384, 2384, 2384, 1792),
    },
}


def _of_the_paper(ranks: Mapping[str, tuple[int | None, ...]]) -> Profile:
    hidden, middle = 4096, 11008
    square, wide = 2 * hidden / (hidden * hidden), (hidden + middle) / (hidden * middle)
    profile = {"v_proj": [(0.0, 1.0)]}
    for kind, printed in ranks.items():
        per_rank = square if kind in ("q_proj", "k_proj", "o_proj") else wide
        ratios = (1.0 if rank is None else rank * per_rank for rank in printed)
        profile[kind] = list(zip((1 / 8, 3 / 8, 5 / 8, 7 / 8), ratios, strict=True))
    return profile


PAPER = Donor(
    "paper", tuple(DonorTrial(keep, {}, _of_the_paper(each)) for keep, each in _PRINTED.items())
)
