"""One choice per layer, relaxed: lower hulls, and steps along them by falling saving."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Layer:
    """Undominated choices of a layer: parameters rise strictly, losses fall strictly."""

    index: Integers
    parameters: Integers
    losses: Floats


@dataclass(frozen=True)
class Relaxed:
    """The relaxed optimum of some layers: steps along their hulls, by falling saving.

    Attributes:
        multiplier: Saving per parameter of the first step that does not fit; 0 if all fit.
        bases: Place of each layer before all steps that save no more than that, which is its
            smallest choice of least ``loss + multiplier * parameters``.
        slack: Parameters that the bases leave unused.
        loss: Summed loss of the bases.
        broken: The layer of the step that does not fit, and the place to which it leads.
    """

    multiplier: float
    bases: list[int]
    slack: int
    loss: float
    broken: tuple[int, int]

    @property
    def bound(self) -> float:
        """Return what no selection's loss is below."""
        return self.loss - self.multiplier * self.slack


def undominated(parameters: Sequence[Integers], losses: Sequence[Floats]) -> list[Layer]:
    """Drop every choice to which another of its layer is equal or better in both respects."""
    if len(parameters) != len(losses):
        raise ValueError(
            f"parameters of {len(parameters)} layers but losses of {len(losses)}; give both for "
            "every layer."
        )
    layers = []
    for number, (sizes, values) in enumerate(zip(parameters, losses, strict=True)):
        if sizes.ndim != 1 or sizes.shape != values.shape or not len(sizes):
            raise ValueError(
                f"layer {number}: parameters of shape {sizes.shape} and losses of shape "
                f"{values.shape}; give one of each per choice, and at least one choice."
            )
        if bad := int((~np.isfinite(values)).sum()):
            raise ValueError(
                f"layer {number}: {bad} of {len(values)} losses are not finite; leave out the "
                "choices that are not on offer."
            )
        order = np.lexsort((values, sizes))
        order = order[falling(values[order])]
        layers.append(Layer(order, sizes[order], values[order]))
    return layers


def falling(losses: Floats) -> npt.NDArray[np.bool_]:
    """Mark the losses that are below all before them."""
    return losses < np.minimum.accumulate(np.append(np.inf, losses))[:-1]


def lower_hull(parameters: Integers, losses: Floats) -> Integers:
    """Return the places of the choices on the lower convex hull (Andrew's monotone chain)."""
    sizes, values = parameters.tolist(), losses.tolist()
    hull: list[int] = []
    slopes: list[float] = []
    for place, (size, value) in enumerate(zip(sizes, values, strict=True)):
        while hull:
            slope = (value - values[hull[-1]]) / (size - sizes[hull[-1]])
            if not slopes or slopes[-1] < slope:
                slopes.append(slope)
                break
            slopes.pop()
            hull.pop()
        hull.append(place)
    return np.array(hull, dtype=np.int64)


def relax(layers: Sequence[Layer], hulls: Sequence[Integers], ceiling: int) -> Relaxed | None:
    """Solve the linear relaxation; ``None`` if even the smallest choices do not fit."""
    least = sum(int(layer.parameters[0]) for layer in layers)
    if least > ceiling:
        return None
    pairs = list(zip(layers, hulls, strict=True))
    steps = [np.diff(layer.parameters[hull]) for layer, hull in pairs]
    savings = [
        -np.diff(a.losses[hull]) / step for (a, hull), step in zip(pairs, steps, strict=True)
    ]
    saving = np.concatenate([np.zeros(0), *savings])
    order = np.argsort(-saving, kind="stable")
    step = np.concatenate([np.zeros(0, dtype=np.int64), *steps])[order]
    fitting = int(np.searchsorted(np.cumsum(step), ceiling - least, side="right"))
    multiplier, broken = 0.0, (0, 0)
    if fitting < len(order):
        multiplier = float(saving[order[fitting]])
        ends = np.cumsum([len(own) for own in savings])
        number = int(np.searchsorted(ends, order[fitting], side="right"))
        place = order[fitting] - ends[number]  # from the hull's end
        broken = number, int(hulls[number][place])
    bases = [
        int(hull[np.count_nonzero(own > multiplier)])
        for hull, own in zip(hulls, savings, strict=True)
    ]
    placed = list(zip(layers, bases, strict=True))
    slack = ceiling - sum(int(layer.parameters[base]) for layer, base in placed)
    loss = math.fsum(float(layer.losses[base]) for layer, base in placed)
    return Relaxed(multiplier, bases, slack, loss, broken)
