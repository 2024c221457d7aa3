"""One unit -> all that its options are made of: factors, bases, integers, and their curves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lrbo.calibration.statistics import Statistic
from lrbo.errors import StatisticsError
from lrbo.factorization.base import FactorizationMethod, Statistics, Weight, factor_layer
from lrbo.factorization.base_plan import BasePlan
from lrbo.factorization.factors import LowRankFactors
from lrbo.factorization.kronecker import KroneckerSum
from lrbo.factorization.prediction import (
    ERROR_NEEDS,
    input_moment,
    predicted_loss,
    relative_error,
    squared_errors,
    with_rounding,
)
from lrbo.factorization.prepared import BasedWeight, Prepared, UnitFactors, is_rounded_once
from lrbo.layers.based import Factors
from lrbo.layers.forms import Delta, KeptRows, QuantizedFactors
from lrbo.layers.low_rank import Bias
from lrbo.layers.options import Option
from lrbo.linalg import float64_device
from lrbo.models.model_map import linear_bias, linear_weight

CPU, SINGLE, DOUBLE = torch.device("cpu"), torch.float32, torch.float64


def prepared_unit(
    module: nn.Module,
    method: FactorizationMethod,
    given: Statistics,
    device: torch.device | None,
    *,
    bases: BasePlan | None,
    errors: bool,
    shared: Weight | None = None,
) -> Prepared:
    """Factor a layer at full rank, and what each base of its weight leaves.

    With ``shared``, the weight of a base model, the change of that is factored. Everything else is
    as of :func:`lrbo.factorization.cache.factor_model`.

    Raises:
        StatisticsError: If a statistic is missing, or does not suit.
    """
    stored, bias = linear_weight(module), linear_bias(module)
    work = float64_device(stored.device if device is None else device)
    statistics = {statistic: tensor.to(work) for statistic, tensor in given.items()}
    if errors and (missing := sorted(need.value for need in ERROR_NEEDS - set(statistics))):
        raise StatisticsError(
            f"errors of outputs need the statistics {', '.join(missing)}; calibrate with them."
        )
    weight = stored.to(work, DOUBLE)
    unit = _Unit(weight, None if bias is None else bias.to(work), statistics, errors)
    if shared is not None:  # as it is where layers are made
        weight = weight - shared.to(stored.dtype).to(work, DOUBLE)

    full = factor_layer(method, weight, unit.bias, statistics)
    # Of a method that predicts losses itself they are exact: nothing was made monotone.
    whole = None if full.loss is None else 2 * full.loss[0]
    if full.loss is None and Statistic.OUTPUT_GRADIENT in statistics:
        full = replace(full, loss=predicted_loss(full, statistics))
    full = unit.with_error(full, weight, (full.left, full.right))
    low_rank = full.to(dtype=SINGLE, device=CPU, max_rank=min(weight.shape) - 1)
    if bases is None:
        return low_rank
    based: dict[Option, BasedWeight | KroneckerSum] = {}
    remainder = method.remainders(unit.bias, statistics)
    # Products of integers and scales of 16 bits are exact in float32.
    exact = SINGLE if stored.dtype.itemsize == 2 else DOUBLE
    given_weight = weight.to(exact)
    metric = bases.metric(statistics)
    for base in bases.make(weight, statistics, stored.dtype, full, metric):
        form, codes = base.form, None
        most = min(form.largest_rank(*base.shape), low_rank.max_rank)
        if isinstance(form, QuantizedFactors | Delta):
            rest, factors = weight, full.leading(most)
            given_to = weight, statistics, stored.dtype, base.level, metric
            codes = bases.factors(form, factors, remainder, *given_to)
            wide = codes.wide(DOUBLE)
            loss = with_rounding(factors, wide, weight, statistics, whole)
            factors = unit.with_error(replace(factors, loss=loss), weight, wide)
        else:
            rest = given_weight - base.weight(exact)
            factors = remainder(rest, most)
            if errors or isinstance(form, KeptRows):
                rest = rest.to(DOUBLE)
                sides, floats = (factors.left.float(), factors.right.float()), form.has_floats
                wide = Factors.of(*sides, stored.dtype, floats=floats).wide(DOUBLE)
                if isinstance(form, KeptRows):  # the low rank is most of the weight
                    factors = replace(factors, loss=with_rounding(factors, wide, rest, statistics))
                factors = unit.with_error(factors, rest, wide)
        # Of 8 bits they are rounded again where a layer is made.
        codes = None if codes is None or not is_rounded_once(form) else codes.to(CPU, stored.dtype)
        factors = factors.to(dtype=SINGLE, device=CPU)
        based[base.family] = BasedWeight(base.to(CPU), factors, codes)
    for family, terms in bases.sums(weight, full, statistics).items():
        based[family] = unit.with_errors(terms).to(dtype=SINGLE, device=CPU)
    return UnitFactors(low_rank, based)


@dataclass(frozen=True)
class _Unit:
    """A layer, and what is known of its inputs; ``errors`` says whether those of outputs are."""

    weight: Weight
    bias: Bias
    statistics: Mapping[Statistic, Tensor]
    errors: bool

    def with_error(
        self, factors: LowRankFactors, target: Weight, rounded: tuple[Tensor, Tensor]
    ) -> LowRankFactors:
        """Add the errors of the output with ``rounded`` factors of a ``target``, if asked for."""
        if not self.errors:
            return factors
        moment = input_moment(factors, self.statistics)
        squared = squared_errors(target, *rounded, moment)
        error = relative_error(squared, self.weight, self.bias, self.statistics)
        return replace(factors, error=error)

    def with_errors(self, terms: KroneckerSum) -> KroneckerSum:
        """Add the errors of the output with the first terms, if asked for."""
        if not self.errors:
            return terms
        moment = input_moment(replace(terms.rest, center=terms.center), self.statistics)
        changes = [self.weight, *(self.weight - each for each in terms.weights())]
        squared = torch.stack([(each @ moment * each).sum() for each in changes])
        squared = torch.cummin(squared.clamp_min(0.0), 0).values  # as of squared_errors
        error = relative_error(squared, self.weight, self.bias, self.statistics)
        return replace(terms, rest=replace(terms.rest, error=error))
