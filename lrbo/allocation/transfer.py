"""Carry an allocation to another model or budget: by kind of layer and relative depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from lrbo.accounting import dense_parameters
from lrbo.allocation import Allocation, Cost
from lrbo.errors import ConfigError
from lrbo.specs import LayerSpec

# By kind: kept shares at relative depths, 0 for the first block and 1 for the last.
Profile = Mapping[str, Sequence[tuple[float, float]]]


@dataclass(frozen=True)
class DonorTrial:
    """One allocation of another study, without the names of its layers.

    Attributes:
        keep_ratio: Of the layers that the budget covers.
        variables: The point of its search space, ``{}`` if it stands at none.
        profile: What it keeps of each layer.
    """

    keep_ratio: float
    variables: Mapping[str, float]
    profile: Profile


@dataclass(frozen=True)
class Donor:
    """Allocations that a search may begin with, of which it takes the one nearest in size.

    Attributes:
        name: As it is written in ``warm_start``.
        trials: At least one.
    """

    name: str
    trials: tuple[DonorTrial, ...]

    def at(self, keep_ratio: float) -> DonorTrial:
        """Return the largest trial that keeps at most so much, or else the smallest one."""
        fitting = [t for t in self.trials if t.keep_ratio <= keep_ratio + 1e-9]
        if fitting:
            return max(fitting, key=lambda trial: trial.keep_ratio)
        return min(self.trials, key=lambda trial: trial.keep_ratio)

    def to_dict(self) -> dict[str, object]:
        """Return the donor as what JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, object]) -> Donor:
        """Return the donor that :meth:`to_dict` wrote."""
        trials = fields["trials"]
        assert isinstance(trials, list)
        return cls(
            str(fields["name"]),
            tuple(
                DonorTrial(
                    trial["keep_ratio"],
                    trial["variables"],
                    {kind: [(x, y) for x, y in found] for kind, found in trial["profile"].items()},
                )
                for trial in trials
            ),
        )


def profile_of(layers: Sequence[LayerSpec], allocation: Allocation, cost: Cost) -> Profile:
    """Return what an allocation keeps of each kind of layer over relative depth.

    Args:
        layers: Those that the budget of the allocation covers.
        allocation: Their ranks.
        cost: Stored parameters of a layer at a rank.
    """
    found: dict[str, dict[float, list[LayerSpec]]] = {}
    for spec, depth in zip(layers, _depths(layers), strict=True):
        found.setdefault(spec.kind, {}).setdefault(depth, []).append(spec)

    def kept(spec: LayerSpec) -> int:
        rank = allocation.ranks[spec.name]
        return spec.parameters if rank is None else cost(spec, rank)

    return {
        kind: [
            (depth, sum(map(kept, specs)) / dense_parameters(specs))
            for depth, specs in sorted(places.items())
        ]
        for kind, places in found.items()
    }


def transferred_ratios(
    donor: str, profile: Profile, layers: Sequence[LayerSpec]
) -> dict[str, float]:
    """Return the ratio that a profile wishes for each layer of a model.

    Between the depths of the profile ratios are interpolated, so that models of different depth
    can lend to each other (the paper transfers between models of one shape, figure 4).

    Args:
        donor: Its name, for the message.
        profile: Of the other model.
        layers: Those of this model that the budget covers.

    Raises:
        ConfigError: If the profile lacks kinds of layers; lists them with a layer of each.
    """
    missing = {spec.kind: spec.name for spec in reversed(layers) if spec.kind not in profile}
    if missing:
        examples = ", ".join(f"{kind} ({name})" for kind, name in sorted(missing.items()))
        raise ConfigError(
            [
                f"warm_start: {donor} has no layers of kind {examples}; its kinds are "
                f"{', '.join(sorted(profile))}. Take a study of a model of the same family"
            ]
        )
    ratios = {}
    for spec, depth in zip(layers, _depths(layers), strict=True):
        places, kept = zip(*profile[spec.kind], strict=True)
        ratios[spec.name] = float(np.interp(depth, places, kept))
    return ratios


def _depths(layers: Sequence[LayerSpec]) -> list[float]:
    """Return the place of each layer between the first block and the last."""
    last = max((spec.block or 0 for spec in layers), default=0)
    return [(spec.block or 0) / max(last, 1) for spec in layers]


def _paper() -> Donor:
    """Return the ranks that the paper printed for Llama-2-7B, by kind and quarter of the depth.

    Bolaco, table 8, 5x4: ranks of q and k, o, gate, up and down in each quarter; values are dense,
    and so is what the table leaves out.
    """
    hidden, middle = 4096, 11008
    square, wide = hidden * hidden, hidden * middle
    shares = {
        "qk": 2 * hidden / square, "o": 2 * hidden / square,
        "gate": (hidden + middle) / wide, "up": (hidden + middle) / wide,
        "down": (hidden + middle) / wide,
    }  # fmt: skip
    kinds = {
        "qk": ("q_proj", "k_proj"), "o": ("o_proj",), "gate": ("gate_proj",), "up": ("up_proj",),
        "down": ("down_proj",),
    }  # fmt: skip
    tables: dict[float, dict[str, tuple[int | None, ...]]] = {
        0.8: {
            "qk": (680, 968, 408, 656),
            "o": (1728, 1888, 1488, 496),
            "gate": (2960, 2536, None, 2824),
            "up": (None, 2640, 2272, 2448),
            "down": (None, 2632, 2864, 2280),
        },
        0.7: {
            "qk": (1016, 840, 408, 408),
            "o": (1632, 1632, 992, 560),
            "gate": (2376, 2384, 2376, 2384),
            "up": (2384, 2376, 2384, 1896),
            "down": (2384, 2384, 2384, 1792),
        },
    }
    centres = (1 / 8, 3 / 8, 5 / 8, 7 / 8)
    trials = []
    for keep_ratio, ranks in tables.items():
        profile: dict[str, list[tuple[float, float]]] = {"v_proj": [(0.0, 1.0)]}
        for group, found in ranks.items():
            kept = [1.0 if rank is None else rank * shares[group] for rank in found]
            for kind in kinds[group]:
                profile[kind] = list(zip(centres, kept, strict=True))
        trials.append(DonorTrial(keep_ratio, {}, profile))
    return Donor("paper", tuple(trials))


PAPER = _paper()
