"""One choice per layer, least summed loss, within a ceiling on parameters; solved to optimality."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lrbo.relaxation import (
    Floats,
    Integers,
    Layer,
    Relaxed,
    falling,
    lower_hull,
    relax,
    undominated,
)

# Alternatives in the first core; it doubles until it is large enough for a proof.
FIRST_CORE = 32
# Parts that are searched before a gap is accepted, whatever it is.
PARTS = 32
# A gap that is accepted as soon as a search had to be cut short, as a share of the loss: no
# predicted loss is that accurate.
SMALL_GAP = 1e-6
# Rounding of a sum of two float64 products, in units of their magnitude, with room to spare.
ROUNDING = 2.0**-50


@dataclass(frozen=True)
class Solution:
    """The choice of every layer, with the proof of how good the whole is.

    Attributes:
        choices: Index of the choice of each layer, in the caller's order.
        loss: Summed loss of the choices.
        parameters: Summed parameters of the choices.
        bound: No selection within the ceiling has a smaller summed loss.
        multiplier: Loss that one more parameter saves in the relaxed problem; at least 0.
    """

    choices: tuple[int, ...]
    loss: float
    parameters: int
    bound: float
    multiplier: float

    @property
    def gap(self) -> float:
        """Return by how much the loss may exceed the optimum; 0 where it is proven optimal."""
        return self.loss - self.bound


@dataclass(frozen=True)
class _Core:
    """A problem seen from its relaxed optimum, as differences from each layer's base choice.

    A selection that differs from the bases by ``(parameters, loss)`` in a layer has there the
    excess ``loss + multiplier * parameters``, which is never negative. Its distance from the
    relaxed bound is the sum of its excesses and ``multiplier`` times what it leaves unused.
    """

    relaxed: Relaxed
    parameters: list[Integers]
    losses: list[Floats]
    excess: list[Floats]
    rounding: list[Floats]

    @classmethod
    def of(cls, layers: Sequence[Layer], relaxed: Relaxed) -> _Core:
        """Measure every choice against the relaxed optimum."""
        placed = list(zip(layers, relaxed.bases, strict=True))
        more = [layer.parameters - layer.parameters[base] for layer, base in placed]
        loss = [layer.losses - layer.losses[base] for layer, base in placed]
        terms = [(v, relaxed.multiplier * m) for m, v in zip(more, loss, strict=True)]
        return cls(
            relaxed,
            more,
            loss,
            excess=[np.maximum(v + w, 0.0) for v, w in terms],
            rounding=[ROUNDING * (np.abs(v) + np.abs(w)) for v, w in terms],
        )


def solve(
    parameters: Sequence[Integers],
    losses: Sequence[Floats],
    ceiling: int,
    *,
    states: int = 1 << 25,
) -> Solution:
    """Choose for every layer so that the summed loss is least within the ceiling.

    This is the multiple-choice knapsack problem. Its linear relaxation, read from the lower
    convex hulls, gives a multiplier and a bound, and from them an excess for every choice; a
    selection within a distance of the bound has no choice of larger excess. So the choices up
    to some excess are searched exhaustively, by dynamic programming over undominated
    (parameters, loss) states whose own relaxed bound is still within that distance. What is
    found within it is optimal; if nothing is, the distance grows. Where it grows too far, the
    step that the relaxed optimum takes half of splits the problem into two parts, with and
    without it, and the part of the lowest bound is searched next.

    Among selections of equal loss one with fewest parameters is taken, and among those always
    the same one for the same input.

    Args:
        parameters: Per layer ``(choices,)``, parameters of each choice, in any order.
        losses: Per layer ``(choices,)``, loss of each choice, finite.
        ceiling: Largest sum of parameters.
        states: Partial selections looked at, about, which bounds time (150 ns each) and memory.
            If more are needed, the most promising are followed and the gap states what that may
            have cost; one of up to 1e-6 of the loss ends the search.

    Returns:
        The selection. Its gap is 0 where it is proven optimal, which is to rounding: about
        1e-15 of the losses between which the choice was open.

    Raises:
        ValueError: If the numbers of layers or choices differ, a layer has no choice, a loss is
            not finite, or even the smallest choices exceed the ceiling.

    Note:
        Losses and parameters of real layers are so varied that a few hundred choices remain
        open, and the time is that of reading all choices. Adversarial cases, such as subset sums
        of large random numbers, reach the limit of ``states``: some seconds for hundreds of
        layers, up to a minute for thousands.

    References:
        Sinha and Zoltners, *The Multiple-Choice Knapsack Problem*, Operations Research 27, 1979
        (dominance, relaxation); Pisinger, *A minimal algorithm for the multiple-choice knapsack
        problem*, European Journal of Operational Research 83, 1995 (a core that grows). There
        the core grows by whole layers, here by choices of rising excess.

    Example:
        >>> parameters = [np.array([1, 3, 5]), np.array([2, 4, 6])]
        >>> losses = [np.array([9.0, 4.0, 0.0]), np.array([5.0, 1.0, 0.0])]
        >>> found = solve(parameters, losses, 9)
        >>> found.choices, found.loss, found.parameters, found.gap
        ((2, 1), 1.0, 9, 0.0)
    """
    layers = undominated(parameters, losses)
    least = sum(int(layer.parameters[0]) for layer in layers)
    if least > ceiling:
        raise ValueError(
            f"the smallest choices of {len(layers)} layers sum to {least:_} parameters, above the "
            f"ceiling of {ceiling:_}; raise the ceiling or offer smaller choices."
        )
    # Only multiples of a common divisor can be used, and the bound is the closer for it.
    unit = math.gcd(*(int(np.gcd.reduce(np.diff(layer.parameters))) for layer in layers))
    return _branch(layers, ceiling - (ceiling - least) % unit if unit else least, states)


def _branch(layers: Sequence[Layer], ceiling: int, states: int) -> Solution:
    """Search the whole problem, then parts of what is left of it, lowest bound first."""
    hulls = [lower_hull(layer.parameters, layer.losses) for layer in layers]
    whole = relax(layers, hulls, ceiling)
    assert whole is not None  # the smallest choices fit
    rounding = 4 * ROUNDING * (abs(whole.loss) + whole.multiplier * whole.slack)
    best = _selection(layers, whole.bases)
    parts = [(whole.bound, 0, layers, hulls, whole)]
    given_up, made = math.inf, 1
    while parts and parts[0][0] <= best[0] + rounding:
        bound, _, layers, hulls, relaxed = heapq.heappop(parts)
        core = _Core.of(layers, relaxed)
        # Mostly the whole is proven at once, if it is given the time.
        share = states // (PARTS if made > 1 else 4)
        places, cleared = _search(core, best[0] - relaxed.bound + rounding, share)
        best = min(best, _selection(layers, places))
        if cleared == math.inf:
            continue
        bound = max(bound, relaxed.bound + cleared)
        if made >= 2 * PARTS or best[0] - bound <= SMALL_GAP * abs(best[0]):
            given_up = min(given_up, bound)
            continue
        number, place = relaxed.broken
        for half in (slice(None, place), slice(place, None)):
            own = layers[number]
            own = Layer(own.index[half], own.parameters[half], own.losses[half])
            fewer = [*layers[:number], own, *layers[number + 1 :]]
            hull = lower_hull(own.parameters, own.losses)
            halved = [*hulls[:number], hull, *hulls[number + 1 :]]
            part = relax(fewer, halved, ceiling)
            if part is not None:
                heapq.heappush(parts, (max(bound, part.bound), made, fewer, halved, part))
                made += 1
    loss, parameters, choices = best
    return Solution(choices, loss, parameters, min(loss, given_up), whole.multiplier)


def _selection(
    layers: Sequence[Layer], places: Sequence[int]
) -> tuple[float, int, tuple[int, ...]]:
    """Return loss, parameters and choices of a selection, in the order in which they count."""
    placed = list(zip(layers, places, strict=True))
    return (
        math.fsum(float(layer.losses[place]) for layer, place in placed),
        sum(int(layer.parameters[place]) for layer, place in placed),
        tuple(int(layer.index[place]) for layer, place in placed),
    )


def _search(core: _Core, cutoff: float, states: int) -> tuple[list[int], float]:
    """Search what lies within a distance of the bound.

    Returns:
        The places of the best selection found, and the distance up to which all were searched,
        infinite if there can be no better one.
    """
    relaxed = core.relaxed
    if not relaxed.multiplier:  # everything fits, so the bases are the choices of least loss
        return relaxed.bases, math.inf
    # Sorted; each base has the excess 0 and is no alternative.
    alternatives = np.sort(np.concatenate(core.excess))[len(relaxed.bases) :]
    best, best_over = relaxed.bases, min(relaxed.multiplier * relaxed.slack, cutoff)
    size, cleared = FIRST_CORE, 0.0
    while True:
        grown = float(alternatives[size - 1]) if size < len(alternatives) else math.inf
        within = min(best_over, grown)
        found, over, complete, margin = _programme(core, within, states)
        cleared = max(cleared, complete)
        if over <= best_over + margin:  # of equals this one has fewest parameters
            best, best_over = found, over
        if best_over <= cleared + margin:
            return best, math.inf
        if complete == within:
            size *= 2
        elif grown < math.inf and within == grown:
            size = len(alternatives)  # once more, for a good selection if not for a proof
        else:
            return best, cleared


@dataclass(frozen=True)
class _Rest:
    """The layers that partial selections have still to come to, relaxed.

    Attributes:
        least: ``(stages + 1,)``, parameters of the smallest choices from a stage on.
        most: ``(stages + 1,)``, loss of those.
        stage: ``(steps,)``, the stage of each step along a hull, by falling saving.
        steps: ``(steps,)``, parameters of it.
        gains: ``(steps,)``, loss that it saves.
    """

    least: Integers
    most: Floats
    stage: Integers
    steps: Integers
    gains: Floats

    @classmethod
    def of(cls, choices: Sequence[tuple[Integers, Floats]]) -> _Rest:
        """Relax the choices of every stage."""
        hulls = [lower_hull(sizes, losses) for sizes, losses in choices]
        steps = [np.diff(sizes[hull]) for (sizes, _), hull in zip(choices, hulls, strict=True)]
        gains = [-np.diff(losses[hull]) for (_, losses), hull in zip(choices, hulls, strict=True)]
        stage = np.repeat(np.arange(len(choices)), [len(own) for own in steps])
        step = np.concatenate([np.zeros(0, dtype=np.int64), *steps])
        gain = np.concatenate([np.zeros(0), *gains])
        order = np.argsort(-gain / step, kind="stable")
        least = np.array([0, *(sizes[0] for sizes, _ in reversed(choices))], dtype=np.int64)
        most = np.array([0.0, *(losses[0] for _, losses in reversed(choices))])
        return cls(
            np.cumsum(least)[::-1], np.cumsum(most)[::-1], stage[order], step[order], gain[order]
        )

    def least_loss(self, stage: int, room: Integers) -> Floats:
        """Return a bound on the loss from a stage on, per room; infinite where none fits."""
        ahead = self.stage >= stage
        used = np.append(0, np.cumsum(self.steps[ahead]))
        gained = np.append(0.0, np.cumsum(self.gains[ahead]))
        free = room - self.least[stage]
        bound = self.most[stage] - np.interp(free, used, gained)
        return np.where(free < 0, np.inf, bound)


def _programme(core: _Core, within: float, states: int) -> tuple[list[int], float, float, float]:
    """Search all selections within a distance of the bound.

    Returns:
        The places of the best selection and its distance, infinite if there is none; the
        distance up to which nothing was left out; and the rounding of these distances.
    """
    kept = [
        np.flatnonzero(e <= within + r) for e, r in zip(core.excess, core.rounding, strict=True)
    ]
    # Large steps first, so that the small ones are left to fill the room: fewer states live on.
    stages = sorted(
        (number for number, places in enumerate(kept) if len(places) > 1),
        key=lambda number: -_nearest_step(core, number),
    )
    rest = _Rest.of([(core.parameters[n][kept[n]], core.losses[n][kept[n]]) for n in stages])
    price = core.relaxed.multiplier * core.relaxed.slack
    spread = math.fsum(float(core.rounding[n][kept[n]].max()) for n in stages)
    margin = (spread + ROUNDING * price) * (1 + len(stages) / 4)  # sums of so many terms
    limit = max(states // (1 + sum(len(kept[number]) for number in stages)), 1)
    parameters, losses = np.zeros(1, dtype=np.int64), np.zeros(1)
    history: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]] = []
    cleared = within
    for stage, number in enumerate(stages):
        places, before = kept[number], len(parameters)
        parameters = (core.parameters[number][places][:, None] + parameters).ravel()
        losses = (core.losses[number][places][:, None] + losses).ravel()
        over = losses + rest.least_loss(stage + 1, core.relaxed.slack - parameters) + price
        alive = np.flatnonzero(over <= within + margin)
        alive = alive[np.lexsort((losses[alive], parameters[alive]))]
        alive = alive[falling(losses[alive])]
        if len(alive) > limit:
            ranked = np.argsort(over[alive], kind="stable")
            cleared = min(cleared, float(over[alive[ranked[limit]]]))
            alive = alive[np.sort(ranked[:limit])]
        if not len(alive):
            return core.relaxed.bases, math.inf, cleared, margin
        history.append(
            (places[alive // before].astype(np.int32), (alive % before).astype(np.int32))
        )
        parameters, losses = parameters[alive], losses[alive]
    state = len(parameters) - 1  # most parameters, so least loss
    distance = float(losses[state]) + price
    found = list(core.relaxed.bases)
    for number, (place, parent) in zip(reversed(stages), reversed(history), strict=True):
        found[number] = int(place[state])
        state = int(parent[state])
    return found, distance, cleared, margin


def _nearest_step(core: _Core, number: int) -> int:
    """Return the parameters between the two choices of a layer that have the least excess."""
    nearest = np.argsort(core.excess[number], kind="stable")[:2]
    return int(np.ptp(core.parameters[number][nearest]))
