"""A base made again, and in turns the low rank over it: each of what the other one leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lrbo.calibration.statistics import Statistic
from lrbo.errors import StatisticsError
from lrbo.factorization.base import FactorizationMethod, Remainders, Weight
from lrbo.factorization.base_plan import BasePlan
from lrbo.factorization.bases import Base
from lrbo.factorization.factors import LowRankFactors
from lrbo.factorization.prediction import moments
from lrbo.factorization.prepared import BasedWeight
from lrbo.factorization.tables import TableMetric
from lrbo.layers.forms import Based, Delta, Quantized, QuantizedFactors, form_named
from lrbo.layers.options import Option
from lrbo.linalg import float64_device
from lrbo.models.model_map import linear_bias, linear_weight
from lrbo.models.specs import LayerSpec

CPU = torch.device("cpu")


def is_repaired(option: Option) -> bool:
    """Whether an option has a base, and a low rank of what that leaves."""
    form = form_named(option.form)
    has_base = isinstance(form, Based) and not isinstance(form, QuantizedFactors | Delta)
    return has_base and option.rank > 0


def is_integer(option: Option) -> bool:
    """Whether an option has a base in integers, with a low rank over it or without."""
    return isinstance(form_named(option.form), Quantized)


@dataclass(frozen=True)
class Parts:
    """How base and low rank of one weight are made, and what a change of it costs.

    Attributes:
        weight: ``(out, in)``, where all is worked out.
        base: Makes the base of a weight.
        low_rank: Factors what a base leaves.
        loss: Predicted increase of the loss by a change of the weight, nats per token.
    """

    weight: Weight
    base: Callable[[Weight], Base]
    low_rank: Remainders
    loss: Callable[[Weight], float]

    @classmethod
    def of(
        cls,
        spec: LayerSpec,
        module: nn.Module,
        unit: BasedWeight,
        method: FactorizationMethod,
        statistics: Mapping[Statistic, Tensor],
        plan: BasePlan,
        device: torch.device | None = None,
    ) -> Parts:
        """Return those of a unit as it was prepared: the same method, metric and statistics.

        Bases are made as the ``plan`` says, which may be another one than before.

        Raises:
            StatisticsError: If a statistic is missing.
        """
        stored, bias = linear_weight(module), linear_bias(module)
        work = float64_device(stored.device if device is None else device)
        own = plan.only(unit.base.family)
        if spec.block is None:
            metric = TableMetric.of(spec, statistics, work)
            weight = stored.to(work, torch.promote_types(stored.dtype, torch.float32))
            offset = None if bias is None else bias.to(weight)
            none = weight.new_zeros(len(weight), 0), weight.new_zeros(0, weight.shape[1])
            return cls(
                weight,
                lambda target: metric.bases(target, own, stored.dtype)[0],
                lambda rest, rank: metric.factor(rest, offset, rank),
                lambda change: float(metric.with_rounding(change.double(), *none)[0]),
            )
        if Statistic.OUTPUT_GRADIENT not in statistics:
            raise StatisticsError(
                "bases made again are judged by gradients of outputs, which were not gathered; "
                "calibrate with loss curves."
            )
        given = {statistic: tensor.to(work) for statistic, tensor in statistics.items()}
        weight, inputs = stored.to(work, torch.float64), own.metric(given)
        gradient, moment = (each.to(work) for each in moments(unit.rest, statistics))
        return cls(
            weight,
            lambda target: own.make(target, given, stored.dtype, metric=inputs)[0],
            method.for_kind(spec.kind).remainders(None if bias is None else bias.to(work), given),
            lambda change: float((gradient @ change @ moment * change).sum()) / 2,
        )


@dataclass(frozen=True)
class Refined:
    """A base with a low rank of exactly one rank, and its predicted losses, nats per token.

    ``turn`` is the one that it is of, 0 where none was better than what there was.
    """

    unit: BasedWeight
    before: float
    after: float
    turn: int


def refine(unit: BasedWeight, rank: int, parts: Parts, turns: int = 1) -> Refined:
    """Make the base of what the low rank leaves, and the low rank of what that leaves, in turns.

    A turn begins with the low rank as it is stored, in integers. The iterate of least predicted
    loss is returned, the first one among them: it is never worse than before, and it has the form,
    the level and the rank of before, so it costs the same.

    Args:
        unit: A base and what it leaves, of which ``rank`` directions are used.
        rank: At least 0; without any, the base is that of the weight, and one turn is all.
        parts: How both are made.
        turns: How often, at least 1.

    References:
        Saha et al., *Compressing Large Language Models using Low Rank and Low Precision
        Decomposition* (CALDERA), NeurIPS 2024, algorithm 1, from its base on. Its inner loop, which
        solves one factor again for the rounding of the other, is left out: with factors of 8 bits
        rounding changes the predicted loss by about a thousandth.
    """
    weight, dtype = parts.weight, unit.base.dtype

    def stored(each: BasedWeight) -> Weight:
        """Return the low rank as a layer of it has it."""
        factors = each.module(rank).factors
        if factors is None:
            return torch.zeros_like(weight)
        left, right = factors.to(weight.device, dtype).wide(weight.dtype)
        return left @ right

    def left_by(base: Base) -> Weight:
        return weight - base.to(weight.device).weight(weight.dtype)

    def rest_of(base: Base) -> LowRankFactors:
        if rank == 0 and unit.rest.center is None:
            return unit.rest.leading(0)  # a bias, which no base changes
        return parts.low_rank(left_by(base), rank).to(dtype=torch.float32, device=CPU)

    product = stored(unit)
    before = after = parts.loss(left_by(unit.base) - product)
    best, taken = unit, 0
    for turn in range(1, turns + 1 if rank else 2):
        base = parts.base(weight - product)
        each = BasedWeight(base.to(CPU), rest_of(base))
        product = stored(each)
        loss = parts.loss(left_by(base) - product)
        if loss < after:
            after, best, taken = loss, each, turn
    return Refined(best.to(dtype=dtype, device=CPU, max_rank=rank), before, after, taken)
