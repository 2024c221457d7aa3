"""Ratios -> ranks under a hard parameter budget; integers only, no tensors."""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction

from lrbo.accounting import dense_parameters
from lrbo.errors import BudgetError
from lrbo.model import LayerSpec

Cost = Callable[[LayerSpec, int], int]


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


def rungs(spec: LayerSpec, cost: Cost, rank_multiple: int) -> list[tuple[int | None, int]]:
    """List what a layer may hold, from least to most: (rank, parameters), dense last.

    A rank is a multiple of ``rank_multiple``; a rank whose form is not smaller than the dense
    layer is no choice, because dense is then both smaller and exact.
    """
    steps: list[tuple[int | None, int]] = []
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
    """Return the smallest budget that any allocation can meet."""
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
    room = budget.parameters - smallest
    if room < 0:
        needed = -(-smallest * 10_000 // dense_parameters(layers)) / 10_000  # rounded up
        raise BudgetError(
            f"budget of {budget.parameters:_} parameters is below the {smallest:_} that "
            f"{len(layers)} layers need at their smallest ranks ({len(layers) - len(searched)} "
            f"of them fixed dense); raise keep_ratio to at least "
            f"{needed:.4f} or lower rank_multiple "
            f"({rank_multiple})."
        )
    wishes = {spec.name: ratios[spec.name] * spec.parameters for spec in searched}

    def next_step(name: str) -> tuple[float, str] | None:
        """Return the scale at which a layer asks for its next step, with its name."""
        position = place[name] + 1
        return (
            (ladders[name][position][1] / wishes[name], name)
            if position < len(ladders[name])
            else None
        )

    queue = [step for name in ladders if (step := next_step(name)) is not None]
    heapq.heapify(queue)
    while queue:
        _, name = heapq.heappop(queue)
        position = place[name]
        price = ladders[name][position + 1][1] - ladders[name][position][1]
        if price <= room:
            room -= price
            place[name] = position + 1
            if (step := next_step(name)) is not None:
                heapq.heappush(queue, step)
    ranks = {
        spec.name: None if spec.name in dense else ladders[spec.name][place[spec.name]][0]
        for spec in layers
    }
    return Allocation(ranks, budget.parameters - room, budget)
