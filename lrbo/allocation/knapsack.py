"""One choice per layer, least summed loss, within a ceiling on the cost; solved to optimality."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

FIRST_CORE = 32  # alternatives in the first core; it doubles until it is large enough for a proof
PARTS = 32  # searched before a gap is accepted, whatever it is
SMALL_GAP = 1e-6  # of the loss: accepted once a search was cut short; no prediction is as accurate
ROUNDING = 2.0**-50  # of a sum of two float64 products, relative, with a margin


@dataclass(frozen=True)
class Solution:
    """The choice of every layer by its index, with summed loss and cost."""

    choices: tuple[int, ...]
    loss: float
    cost: int
    bound: float  # no selection within the ceiling has a smaller summed loss
    multiplier: float  # loss that one more unit of cost saves in the relaxed problem, at least 0

    @property
    def gap(self) -> float:
        """The most by which the loss exceeds the optimum; 0 where it is proven optimal."""
        return self.loss - self.bound


@dataclass(frozen=True)
class _Layer:
    """Undominated choices of a layer: costs rise strictly, losses fall strictly."""

    index: Integers
    costs: Integers
    losses: Floats


@dataclass(frozen=True)
class _Relaxed:
    """The relaxed optimum of some layers, and their choices as differences from its bases.

    A selection that differs from the bases by ``(cost, loss)`` in a layer has there the excess
    ``loss + multiplier * cost``, never negative. Its distance from the relaxed bound is the sum of
    its excesses and ``multiplier`` times what it leaves unused.
    """

    layers: Sequence[_Layer]
    multiplier: float  # saving per cost of the first step that does not fit; 0 if all fit
    bases: list[int]  # the cheapest choice of least loss + multiplier * cost, of each layer
    slack: int  # what the bases leave of the ceiling
    loss: float  # of the bases together
    broken: tuple[int, int]  # the layer of the step that does not fit, and where it leads

    @property
    def bound(self) -> float:
        """A lower bound on the loss of all selections."""
        return self.loss - self.multiplier * self.slack

    @cached_property
    def costs(self) -> list[Integers]:
        return [x.costs - x.costs[base] for x, base in zip(self.layers, self.bases, strict=True)]

    @cached_property
    def losses(self) -> list[Floats]:
        return [x.losses - x.losses[base] for x, base in zip(self.layers, self.bases, strict=True)]

    @cached_property
    def excess(self) -> list[Floats]:
        pairs = zip(self.losses, self.costs, strict=True)
        return [np.maximum(loss + self.multiplier * cost, 0.0) for loss, cost in pairs]

    @cached_property
    def rounding(self) -> list[Floats]:
        pairs = zip(self.losses, self.costs, strict=True)
        return [ROUNDING * (np.abs(v) + np.abs(self.multiplier * cost)) for v, cost in pairs]


def solve(
    costs: Sequence[Integers], losses: Sequence[Floats], ceiling: int, *, states: int = 1 << 25
) -> Solution:
    """Choose for every layer so that the summed loss is least within the ceiling.

    This is the multiple-choice knapsack problem. Its linear relaxation, read from the lower convex
    hulls, gives a bound and an excess for every choice; a selection within a distance of the bound
    has no choice of larger excess. So the choices up to some excess are searched exhaustively, by
    dynamic programming over undominated (cost, loss) states whose own relaxed bound is within that
    distance. The best selection within it is optimal; if there is none, the distance grows. Where
    it grows too far, the step that does not fit splits the problem into two parts, with and without
    it, and the part of the lowest bound is searched next. Ties go to the least cost.

    Args:
        costs: Per layer ``(choices,)``, in any order.
        losses: Per layer ``(choices,)``.
        ceiling: Largest summed cost.
        states: Approximate number of partial selections, which bounds time (150 ns each) and
            memory: some seconds for hundreds of layers, up to a minute for thousands. If more are
            needed, as for subset sums of large random numbers, the most promising are followed and
            the gap bounds the excess loss; one of up to 1e-6 of the loss ends the search.

    Returns:
        The selection. Its gap is 0 where it is proven optimal, to rounding: about 1e-15 of the
        losses between which the choice was open.

    Raises:
        ValueError: If a loss is not finite, or even the cheapest choices exceed the ceiling.

    References:
        Sinha and Zoltners, *The Multiple-Choice Knapsack Problem*, Operations Research 27, 1979
        (dominance, relaxation); Pisinger, *A minimal algorithm for the multiple-choice knapsack
        problem*, European Journal of Operational Research 83, 1995 (a core that grows; here by
        choices of rising excess instead of whole layers).

    Example:
        >>> costs = [np.array([1, 3, 5]), np.array([2, 4, 6])]
        >>> losses = [np.array([9.0, 4.0, 0.0]), np.array([5.0, 1.0, 0.0])]
        >>> best = solve(costs, losses, 9)
        >>> best.choices, best.loss, best.cost, best.gap
        ((2, 1), 1.0, 9, 0.0)
    """
    layers = _undominated(costs, losses)
    least = sum(int(layer.costs[0]) for layer in layers)
    if least > ceiling:
        raise ValueError(
            f"the cheapest choices of {len(layers)} layers cost {least:_}, above the ceiling of "
            f"{ceiling:_}; raise the ceiling or offer cheaper choices."
        )
    # Only multiples of a common divisor can be used, and the bound is the closer for it.
    unit = math.gcd(*(int(np.gcd.reduce(np.diff(layer.costs))) for layer in layers))
    return _branch(layers, ceiling - (ceiling - least) % unit if unit else least, states)


def _branch(layers: Sequence[_Layer], ceiling: int, states: int) -> Solution:
    """Search the whole problem, then parts of what is left of it, lowest bound first."""
    hulls = [_lower_hull(layer.costs, layer.losses) for layer in layers]
    whole = _relax(layers, hulls, ceiling)
    assert whole is not None  # the cheapest choices fit
    rounding = 4 * ROUNDING * (abs(whole.loss) + whole.multiplier * whole.slack)
    best = _selection(layers, whole.bases)
    parts = [(whole.bound, 0, hulls, whole)]
    given_up, made = math.inf, 1
    while parts and parts[0][0] <= best[0] + rounding:
        bound, _, hulls, relaxed = heapq.heappop(parts)
        share = states // (PARTS if made > 1 else 4)  # the whole is mostly proven at once
        indices, cleared = _search(relaxed, best[0] - relaxed.bound + rounding, share)
        best = min(best, _selection(relaxed.layers, indices))
        if cleared == math.inf:
            continue
        bound = max(bound, relaxed.bound + cleared)
        if made >= 2 * PARTS or best[0] - bound <= SMALL_GAP * abs(best[0]):
            given_up = min(given_up, bound)
            continue
        number, split = relaxed.broken
        own = relaxed.layers[number]
        for half in (slice(None, split), slice(split, None)):
            part = _Layer(own.index[half], own.costs[half], own.losses[half])
            fewer = [*relaxed.layers[:number], part, *relaxed.layers[number + 1 :]]
            hull = _lower_hull(part.costs, part.losses)
            halved = [*hulls[:number], hull, *hulls[number + 1 :]]
            if (smaller := _relax(fewer, halved, ceiling)) is not None:
                heapq.heappush(parts, (max(bound, smaller.bound), made, halved, smaller))
                made += 1
    loss, cost, choices = best
    return Solution(choices, loss, cost, min(loss, given_up), whole.multiplier)


def _selection(
    layers: Sequence[_Layer], choices: Sequence[int]
) -> tuple[float, int, tuple[int, ...]]:
    """Return loss, cost and the caller's choices of a selection, by priority."""
    pairs = list(zip(layers, choices, strict=True))
    return (
        math.fsum(float(layer.losses[choice]) for layer, choice in pairs),
        sum(int(layer.costs[choice]) for layer, choice in pairs),
        tuple(int(layer.index[choice]) for layer, choice in pairs),
    )


def _search(relaxed: _Relaxed, cutoff: float, states: int) -> tuple[list[int], float]:
    """The best selection, and the distance searched whole, infinite if there can be no better."""
    if not relaxed.multiplier:  # everything fits, so the bases are the choices of least loss
        return relaxed.bases, math.inf
    # Sorted; each base has the excess 0 and is no alternative.
    alternatives = np.sort(np.concatenate(relaxed.excess))[len(relaxed.bases) :]
    best, best_over = relaxed.bases, min(relaxed.multiplier * relaxed.slack, cutoff)
    size, cleared = FIRST_CORE, 0.0
    while True:
        grown = float(alternatives[size - 1]) if size < len(alternatives) else math.inf
        within = min(best_over, grown)
        choices, over, complete, margin = _programme(relaxed, within, states)
        cleared = max(cleared, complete)
        if over <= best_over + margin:  # of equals this one costs least
            best, best_over = choices, over
        if best_over <= cleared + margin:
            return best, math.inf
        if complete == within:
            size *= 2
        elif grown < math.inf and within == grown:
            size = len(alternatives)  # once more, for a good selection if not for a proof
        else:
            return best, cleared


def _least_losses(choices: Sequence[tuple[Integers, Floats]]) -> Callable[[int, Integers], Floats]:
    """Make a bound on the loss from a stage on, per room; infinite where nothing fits."""
    hulls = [_lower_hull(costs, losses) for costs, losses in choices]
    cheapest = [(costs[0], losses[0]) for costs, losses in reversed(choices)]
    least = np.cumsum(np.array([0, *(cost for cost, _ in cheapest)], dtype=np.int64))[::-1]
    most = np.cumsum(np.array([0.0, *(loss for _, loss in cheapest)]))[::-1]
    stages, steps, gains = _hull_steps(choices, hulls)

    def least_loss(stage: int, room: Integers) -> Floats:
        ahead = stages >= stage
        used = np.append(0, np.cumsum(steps[ahead]))
        gained = np.append(0.0, np.cumsum(gains[ahead]))
        free = room - least[stage]
        return np.where(free < 0, np.inf, most[stage] - np.interp(free, used, gained))

    return least_loss


def _programme(core: _Relaxed, within: float, states: int) -> tuple[list[int], float, float, float]:
    """Search all selections within a distance of the bound.

    Returns:
        The best selection and its distance, infinite if there is none; the distance up to which
        nothing was left out; and the rounding of these distances.
    """
    open_choices = [
        np.flatnonzero(e <= within + r) for e, r in zip(core.excess, core.rounding, strict=True)
    ]

    def nearest_step(number: int) -> int:
        """Return the cost between the two choices of a layer of least excess."""
        nearest = np.argsort(core.excess[number], kind="stable")[:2]
        return int(np.ptp(core.costs[number][nearest]))

    # Large steps first: the small ones fill the room, and fewer states survive.
    stages = [number for number, choices in enumerate(open_choices) if len(choices) > 1]
    stages.sort(key=nearest_step, reverse=True)
    options = [(core.costs[n][open_choices[n]], core.losses[n][open_choices[n]]) for n in stages]
    least_loss = _least_losses(options)
    unused = core.multiplier * core.slack
    spread = math.fsum(float(core.rounding[n][open_choices[n]].max()) for n in stages)
    margin = (spread + ROUNDING * unused) * (1 + len(stages) / 4)  # sums of so many terms
    limit = max(states // (1 + sum(len(prices) for prices, _ in options)), 1)
    costs, losses = np.zeros(1, dtype=np.int64), np.zeros(1)
    history: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]] = []
    cleared = within
    for stage, (prices, values) in enumerate(options):
        before = len(costs)
        costs = (prices[:, None] + costs).ravel()
        losses = (values[:, None] + losses).ravel()
        over = losses + least_loss(stage + 1, core.slack - costs) + unused
        alive = np.flatnonzero(over <= within + margin)
        alive = alive[np.lexsort((losses[alive], costs[alive]))]
        alive = alive[_falling(losses[alive])]
        if len(alive) > limit:
            ranked = np.argsort(over[alive], kind="stable")
            cleared = min(cleared, float(over[alive[ranked[limit]]]))
            alive = alive[np.sort(ranked[:limit])]
        if not len(alive):
            return core.bases, math.inf, cleared, margin
        latest = open_choices[stages[stage]][alive // before]
        history.append((latest.astype(np.int32), (alive % before).astype(np.int32)))
        costs, losses = costs[alive], losses[alive]
    state = len(costs) - 1  # the dearest, so of least loss
    distance = float(losses[state]) + unused
    best = list(core.bases)
    for number, (indices, parents) in zip(reversed(stages), reversed(history), strict=True):
        best[number] = int(indices[state])
        state = int(parents[state])
    return best, distance, cleared, margin


def _undominated(costs: Sequence[Integers], losses: Sequence[Floats]) -> list[_Layer]:
    """Drop every choice to which another of its layer is equal or better in both respects."""
    layers = []
    for number, (prices, values) in enumerate(zip(costs, losses, strict=True)):
        if bad := int((~np.isfinite(values)).sum()):
            raise ValueError(f"layer {number}: {bad} of {len(values)} losses are not finite.")
        order = np.lexsort((values, prices))
        order = order[_falling(values[order])]
        layers.append(_Layer(order, prices[order], values[order]))
    return layers


def _falling(losses: Floats) -> npt.NDArray[np.bool_]:
    """Mark the losses that are below all before them."""
    return losses < np.minimum.accumulate(np.append(np.inf, losses))[:-1]


def _lower_hull(costs: Integers, losses: Floats) -> Integers:
    """Return the indices on the lower convex hull (Andrew's monotone chain)."""
    prices, values = costs.tolist(), losses.tolist()
    hull: list[int] = []
    slopes: list[float] = []
    for index, (price, value) in enumerate(zip(prices, values, strict=True)):
        while hull:
            slope = (value - values[hull[-1]]) / (price - prices[hull[-1]])
            if not slopes or slopes[-1] < slope:
                slopes.append(slope)
                break
            slopes.pop()
            hull.pop()
        hull.append(index)
    return np.array(hull, dtype=np.int64)


def _hull_steps(
    choices: Sequence[tuple[Integers, Floats]], hulls: Sequence[Integers]
) -> tuple[Integers, Integers, Floats]:
    """Return layer, cost and saved loss of each step along the hulls, by falling saving."""
    pairs = list(zip(choices, hulls, strict=True))
    steps = [np.diff(costs[hull]) for (costs, _), hull in pairs]
    layer = np.repeat(np.arange(len(pairs)), [len(own) for own in steps])
    step = np.concatenate([np.zeros(0, dtype=np.int64), *steps])
    gain = np.concatenate([np.zeros(0), *(-np.diff(losses[hull]) for (_, losses), hull in pairs)])
    order = np.argsort(-gain / step, kind="stable")
    return layer[order], step[order], gain[order]


def sum_of_hulls(choices: Sequence[tuple[Integers, Floats]]) -> tuple[Integers, Floats]:
    """Return summed costs and losses of several layers along the hull of all their combinations.

    Each point follows from the one before by the step of one layer along its own hull that saves
    most per cost. ``choices`` are costs and losses of each layer, in any order.
    """
    layers = _undominated(*zip(*choices, strict=True))
    choices = [(each.costs, each.losses) for each in layers]
    hulls = [_lower_hull(costs, losses) for costs, losses in choices]
    _, steps, gains = _hull_steps(choices, hulls)
    first = sum(int(costs[0]) for costs, _ in choices), sum(float(loss[0]) for _, loss in choices)
    costs = first[0] + np.append(0, np.cumsum(steps))
    return costs, np.maximum(first[1] - np.append(0.0, np.cumsum(gains)), 0.0)


def _relax(layers: Sequence[_Layer], hulls: Sequence[Integers], ceiling: int) -> _Relaxed | None:
    """Solve the linear relaxation; ``None`` if even the cheapest choices do not fit."""
    least = sum(int(layer.costs[0]) for layer in layers)
    if least > ceiling:
        return None
    number, step, gain = _hull_steps([(each.costs, each.losses) for each in layers], hulls)
    saving = gain / step
    fitting = int(np.searchsorted(np.cumsum(step), ceiling - least, side="right"))
    multiplier, broken = 0.0, (0, 0)
    if fitting < len(step):
        multiplier, layer = float(saving[fitting]), int(number[fitting])
        before = np.count_nonzero(number[:fitting] == layer)
        broken = layer, int(hulls[layer][before + 1])
    positions = np.bincount(number[saving > multiplier], minlength=len(layers))
    bases = [int(hull[position]) for hull, position in zip(hulls, positions, strict=True)]
    pairs = list(zip(layers, bases, strict=True))
    slack = ceiling - sum(int(each.costs[base]) for each, base in pairs)
    loss = math.fsum(float(each.losses[base]) for each, base in pairs)
    return _Relaxed(layers, multiplier, bases, slack, loss, broken)
