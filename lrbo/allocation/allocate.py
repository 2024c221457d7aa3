"""Ratios or loss curves -> ranks under a hard parameter budget; integers only, no tensors."""

from __future__ import annotations

import heapq
import json
import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from lrbo import knapsack
from lrbo.accounting import dense_parameters
from lrbo.errors import BudgetError
from lrbo.specs import LayerSpec

logger = logging.getLogger(__name__)

Cost = Callable[[LayerSpec, int], int]
Rung = tuple[int | None, int]
Curve = Sequence[float] | npt.NDArray[np.float32] | npt.NDArray[np.float64]

# Tail sums in float32 rise by about 1e-7 of the curve's largest value. What rises or is negative
# by more than this share of it is not rounding, and is refused.
CURVE_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Budget:
    """A ceiling on the parameters of the layers that may be compressed.

    Attributes:
        parameters: The ceiling.
    """

    parameters: int

    @classmethod
    def from_keep_ratio(cls, layers: Sequence[LayerSpec], keep_ratio: float) -> Budget:
        """Return the budget that keeps a share of the dense parameters, rounded down.

        Args:
            layers: The compressible layers.
            keep_ratio: In (0, 1].

        Raises:
            ValueError: If ``keep_ratio`` is not in (0, 1].
        """
        if not 0.0 < keep_ratio <= 1.0:
            raise ValueError(f"keep_ratio={keep_ratio} is outside (0, 1].")
        exact = Fraction(str(float(keep_ratio)))  # 0.57 of 100 is 57; in binary it is 56.99...
        return cls(math.floor(exact * dense_parameters(layers)))


@dataclass(frozen=True)
class Allocation:
    """The decision of a trial; ``None`` keeps a layer dense. Replayable from its JSON.

    Attributes:
        ranks: Layer name to rank.
        parameters: Stored parameters of these layers, added biases included.
        budget: The ceiling that was met.
    """

    ranks: Mapping[str, int | None]
    parameters: int
    budget: Budget

    def to_json(self) -> str:
        """Return the allocation as one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Allocation:
        """Return the allocation that :meth:`to_json` wrote."""
        return cls.from_dict(json.loads(text))

    @classmethod
    def from_dict(cls, fields: Mapping[str, object]) -> Allocation:
        """Return the allocation from the fields of its JSON.

        Raises:
            ValueError: If a field is missing or of another type.
        """
        try:
            ranks, parameters, budget = fields["ranks"], fields["parameters"], fields["budget"]
        except KeyError as error:
            raise ValueError(f"the allocation has no field {error}.") from error
        if not (
            isinstance(ranks, dict)
            and all(rank is None or isinstance(rank, int) for rank in ranks.values())
            and isinstance(parameters, int)
            and isinstance(budget, dict)
            and isinstance(budget.get("parameters"), int)
        ):
            raise ValueError(f"the allocation has fields of wrong types: {dict(fields)}.")
        return cls(dict(ranks), parameters, Budget(budget["parameters"]))


def rungs(spec: LayerSpec, cost: Cost, rank_multiple: int) -> list[Rung]:
    """List what a layer may hold, from least to most: (rank, parameters), dense last.

    A rank is a multiple of ``rank_multiple``; a rank whose form is not smaller than the dense
    layer is no choice, because dense is then both smaller and exact. A layer whose smaller side
    is below ``rank_multiple`` can only be dense.

    Args:
        spec: The layer.
        cost: Stored parameters of a layer at a rank.
        rank_multiple: Ranks are multiples of this.

    Returns:
        At least one step; the last has rank ``None`` and the dense parameters.
    """
    steps: list[Rung] = []
    for rank in range(rank_multiple, min(spec.out_features, spec.in_features) + 1, rank_multiple):
        parameters = cost(spec, rank)
        if parameters >= spec.parameters:
            break
        steps.append((rank, parameters))
    return [*steps, (None, spec.parameters)]


def smallest_parameters(
    layers: Sequence[LayerSpec],
    *,
    cost: Cost,
    rank_multiple: int = 1,
    dense: Collection[str] = (),
) -> int:
    """Return the smallest budget that any allocation can meet.

    Args:
        layers: The layers that the budget covers.
        cost: Stored parameters of a layer at a rank.
        rank_multiple: Ranks are multiples of this; the smallest one is the least rank.
        dense: Names of layers that stay dense.
    """
    return sum(
        spec.parameters if spec.name in dense else rungs(spec, cost, rank_multiple)[0][1]
        for spec in layers
    )


def allocate(
    ratios: Mapping[str, float],
    layers: Sequence[LayerSpec],
    budget: Budget,
    *,
    cost: Cost,
    rank_multiple: int = 1,
    dense: Collection[str] = (),
) -> Allocation:
    """Turn wished ratios into ranks that use the whole budget.

    Every layer starts at its smallest rank. All wishes are then scaled up together from
    nothing, ``scale * ratio * dense parameters``, and whenever a layer's wish reaches its next
    step, the step is taken if it still fits; a layer whose step does not fit stays where it is.
    So the scale passes 1 where the wishes leave room, and stops below 1 where they ask for too
    much. It holds that

    - (a) ``parameters <= budget``;
    - (b) no layer that is not dense can take its next step without breaking (a): what did not
      fit once cannot fit later, because the rest only shrinks;
    - (c) a layer is dense as soon as a low-rank form would not be smaller;
    - (d) the same input gives the same output, in any order of ``layers``;
    - a larger budget never gives fewer parameters: where one more parameter first changes a
      decision, the step taken fits exactly and uses up the whole budget.

    Args:
        ratios: Wished share of its dense parameters per layer name, positive; only proportions
            and the budget decide.
        layers: The layers that the budget covers.
        budget: The ceiling.
        cost: Stored parameters of a layer at a rank, a method's ``parameters``.
        rank_multiple: Ranks are multiples of this.
        dense: Names of layers that stay dense whatever the wishes.

    Returns:
        The allocation; its ranks are in the order of ``layers``.

    Raises:
        BudgetError: If even the smallest ranks exceed the budget; says the smallest feasible
            keep ratio.
        ValueError: If a layer has no ratio, or one that is not positive and finite.
    """
    searched = [spec for spec in layers if spec.name not in dense]
    bad = [s.name for s in searched if not 0.0 < ratios.get(s.name, math.nan) < math.inf]
    if bad:
        raise ValueError(
            f"{len(bad)} layers have no positive ratio, the first is {bad[0]}: "
            f"{ratios.get(bad[0])!r}."
        )
    ladders = {spec.name: rungs(spec, cost, rank_multiple) for spec in searched}
    place = dict.fromkeys(ladders, 0)
    fixed = dense_parameters(spec for spec in layers if spec.name in dense)
    smallest = fixed + sum(ladder[0][1] for ladder in ladders.values())
    room = _room(budget, smallest, layers, dense, f"rank_multiple ({rank_multiple})")
    wishes = {spec.name: ratios[spec.name] * spec.parameters for spec in searched}

    def scale(name: str, position: int) -> float:
        """Return the scale at which a layer asks for a step."""
        return ladders[name][position][1] / wishes[name]

    room = _climb(ladders, place, room, scale)
    return _allocation(layers, ladders, place, budget, room)


def allocate_by_loss(
    curves: Mapping[str, Curve],
    layers: Sequence[LayerSpec],
    budget: Budget,
    *,
    cost: Cost,
    rank_multiple: int = 1,
    dense: Collection[str] = (),
    minimum: Mapping[str, int] | int = 0,
) -> Allocation:
    """Choose the ranks of least summed predicted loss within the budget.

    The minimum over all layers at once is found with a proof (:func:`lrbo.knapsack.solve`);
    should a proof ever take too long, a warning states by how much the loss may miss the minimum,
    if it is more than 1e-6 of it. What the minimum leaves of the budget buys further steps, which
    happens where curves are flat: the one with the largest predicted gain per parameter first, in
    order of the layers' names where they are equal, until none fits. So (a) to (d) of
    :func:`allocate` hold here too.

    Args:
        curves: Predicted loss of each layer in nats per token at rank 0, 1, ..., relative to
            dense, which has 0: ``(ranks,)``, never rising. Ranks beyond its end are not on
            offer. Rises and negative values up to 1e-6 of the curve's largest value are taken
            for rounding and flattened. Curves of layers that stay dense are not read.
        layers: The layers that the budget covers.
        budget: The ceiling.
        cost: Stored parameters of a layer at a rank, a method's ``parameters``.
        rank_multiple: Ranks are multiples of this.
        dense: Names of layers that stay dense whatever their curves.
        minimum: Smallest rank of every layer, or of the layers that it names; rounded up to
            ``rank_multiple``. A layer without a low-rank form that large stays dense.

    Returns:
        The allocation; its ranks are in the order of ``layers``.

    Raises:
        BudgetError: If even the smallest ranks exceed the budget; says the smallest feasible
            keep ratio.
        ValueError: If a layer has no curve, or one that is not finite, negative, rising, longer
            than the layer's ranks, or too short for its smallest rank; or if ``minimum`` names
            an unknown layer.

    Note:
        A larger budget never predicts a larger loss, but may leave more parameters unused.
    """
    names = {spec.name for spec in layers}
    if isinstance(minimum, Mapping) and (unknown := sorted(set(minimum) - names)):
        raise ValueError(
            f"minimum names {len(unknown)} layers that are not among the {len(names)} of the "
            f"budget, the first is {unknown[0]}; use the names of the layers."
        )
    ladders: dict[str, list[Rung]] = {}
    losses: dict[str, npt.NDArray[np.float64]] = {}
    problems: list[str] = []
    for spec in sorted(layers, key=lambda layer: layer.name):  # ties must not depend on the order
        if spec.name in dense:
            continue
        floor = minimum if isinstance(minimum, int) else minimum.get(spec.name, 0)
        steps = [
            (rank, price)
            for rank, price in rungs(spec, cost, rank_multiple)
            if rank is None or rank >= floor
        ]
        try:
            curve = _checked_curve(curves.get(spec.name), spec, steps[0][0])
        except ValueError as problem:
            problems.append(f"{spec.name}: {problem}")
            continue
        known = [(rank, price) for rank, price in steps if rank is None or rank < len(curve)]
        ladders[spec.name] = known
        losses[spec.name] = np.append(curve[[rank for rank, _ in known if rank is not None]], 0.0)
    if problems:
        raise ValueError(
            f"{len(problems)} of {len(names)} layers have no usable loss curve, the first is "
            f"{problems[0]}"
        )
    fixed = dense_parameters(spec for spec in layers if spec.name in dense)
    smallest = fixed + sum(ladder[0][1] for ladder in ladders.values())
    ways = f"rank_multiple ({rank_multiple}) or the minimum ranks"
    _room(budget, smallest, layers, dense, ways)
    best = knapsack.solve(
        [np.array([price for _, price in ladder]) for ladder in ladders.values()],
        list(losses.values()),
        budget.parameters - fixed,
    )
    if best.gap > knapsack.SMALL_GAP * best.loss:
        logger.warning(
            "the predicted loss of %g nats per token may be %g above the least possible: too many "
            "allocations lie that close for all to be searched.",
            best.loss,
            best.gap,
        )
    place = dict(zip(ladders, best.choices, strict=True))

    def gain(name: str, position: int) -> float:
        """Return what a step gains per parameter, negative so that the largest comes first."""
        (_, before), (_, after) = ladders[name][position - 1 : position + 1]
        return float(losses[name][position] - losses[name][position - 1]) / (after - before)

    room = _climb(ladders, place, budget.parameters - fixed - best.parameters, gain)
    return _allocation(layers, ladders, place, budget, room)


def _checked_curve(
    curve: Curve | None, spec: LayerSpec, smallest: int | None
) -> npt.NDArray[np.float64]:
    """Return a curve in float64, free of rounding, or refuse it."""
    if curve is None:
        raise ValueError("there is none; give the loss at rank 0, 1, ...")
    values = np.asarray(curve, dtype=np.float64)
    most = min(spec.out_features, spec.in_features) + 1
    if values.ndim != 1 or not (0 if smallest is None else smallest) < len(values) <= most:
        raise ValueError(
            f"a shape of {values.shape}; expected one value per rank from 0 on, at most {most}, "
            f"and its smallest rank on offer is {smallest}."
        )
    if len(bad := np.flatnonzero(~np.isfinite(values))):
        raise ValueError(
            f"{len(bad)} of {len(values)} values are not finite, the first at rank {bad[0]}: "
            f"{values[bad[0]]}; see how the curve was made."
        )
    tolerance = CURVE_TOLERANCE * float(np.abs(values).max())
    if len(bad := np.flatnonzero(values < -tolerance)):
        raise ValueError(
            f"{len(bad)} of {len(values)} values are negative, the first at rank {bad[0]}: "
            f"{values[bad[0]]}; losses are relative to dense, which has 0."
        )
    falling = np.minimum.accumulate(np.maximum(values, 0.0))
    if len(bad := np.flatnonzero(values - falling > tolerance)):
        raise ValueError(
            f"{len(bad)} of {len(values)} values are above one at a lower rank, the first at rank "
            f"{bad[0]}: {values[bad[0]]} after {falling[bad[0]]}; a larger rank must not predict "
            "a larger loss."
        )
    return falling


def _room(
    budget: Budget, smallest: int, layers: Sequence[LayerSpec], dense: Collection[str], ways: str
) -> int:
    """Return what the smallest ranks leave of the budget, or refuse one that they exceed."""
    room = budget.parameters - smallest
    if room < 0:
        needed = -(-smallest * 10_000 // dense_parameters(layers)) / 10_000  # rounded up
        pinned = sum(spec.name in dense for spec in layers)
        raise BudgetError(
            f"budget of {budget.parameters:_} parameters is below the {smallest:_} that "
            f"{len(layers)} layers need at their smallest ranks ({pinned} of them fixed dense); "
            f"raise keep_ratio to at least {needed:.4f} or lower {ways}."
        )
    return room


def _climb(
    ladders: Mapping[str, Sequence[Rung]],
    place: dict[str, int],
    room: int,
    urgency: Callable[[str, int], float],
) -> int:
    """Take steps in order of urgency, lowest first, while they fit; return the room left.

    A layer whose step does not fit stays where it is. ``place`` is changed.
    """
    queue = [
        (urgency(name, place[name] + 1), name)
        for name, ladder in ladders.items()
        if place[name] + 1 < len(ladder)
    ]
    heapq.heapify(queue)
    while queue:
        _, name = heapq.heappop(queue)
        position = place[name] + 1
        price = ladders[name][position][1] - ladders[name][position - 1][1]
        if price <= room:
            room -= price
            place[name] = position
            if position + 1 < len(ladders[name]):
                heapq.heappush(queue, (urgency(name, position + 1), name))
    return room


def _allocation(
    layers: Sequence[LayerSpec],
    ladders: Mapping[str, Sequence[Rung]],
    place: Mapping[str, int],
    budget: Budget,
    room: int,
) -> Allocation:
    """Return the ranks where the layers stand; a layer without a ladder is dense."""
    ranks = {
        spec.name: ladders[spec.name][place[spec.name]][0] if spec.name in ladders else None
        for spec in layers
    }
    return Allocation(ranks, budget.parameters - room, budget)
