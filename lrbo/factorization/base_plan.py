"""Which bases are made of every weight, and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lrbo.calibration.statistics import Statistic
from lrbo.errors import StatisticsError
from lrbo.factorization.base import Remainders
from lrbo.factorization.bases import Base
from lrbo.factorization.factors import LowRankFactors
from lrbo.factorization.options import BaseOptions
from lrbo.factorization.prediction import PREDICTION_SHRINKAGE, input_moment, shrunk
from lrbo.factorization.quantized_factors import round_factors
from lrbo.factorization.rounding import round_gptq, round_nearest, round_to_codebook
from lrbo.factorization.sparsity import sparsify
from lrbo.layers.based import Factors
from lrbo.layers.form import Grid
from lrbo.layers.forms import (
    Based,
    Codebook,
    Quantized,
    QuantizedFactors,
    SemiStructured,
    Sparse,
    form_named,
)

EIGHT_BITS = QuantizedFactors(8)  # rounded to the nearest, whatever the errors weigh
# What errors are weighed with.
NEEDS = frozenset({Statistic.INPUT_MEAN, Statistic.INPUT_COVARIANCE})


@dataclass(frozen=True)
class BasePlan:
    """The forms of the bases, by name, and how they are made; others have none."""

    forms: tuple[str, ...]
    options: BaseOptions

    @classmethod
    def of(cls, forms: Sequence[str], options: BaseOptions) -> BasePlan | None:
        """Return the plan of those of some forms that have a base; ``None`` if none have."""
        names = tuple(name for name in forms if isinstance(form_named(name), Based))
        return cls(names, options) if names else None

    @property
    def needs(self) -> frozenset[Statistic]:
        """The statistics that are read."""
        weighed = any(form_named(name) != EIGHT_BITS for name in self.forms)
        return NEEDS if weighed and self.options.method == "gptq" else frozenset()

    def make(
        self,
        weight: Float[Tensor, "out in"],
        statistics: Mapping[Statistic, Tensor],
        dtype: torch.dtype,
    ) -> list[Base]:
        """Make every base of a weight, in float64; their numbers are stored in ``dtype``.

        Raises:
            StatisticsError: If a statistic is missing, or does not suit.
        """
        moment, damping = None, self.options.damping
        if self.needs:
            if missing := sorted(need.value for need in self.needs - set(statistics)):
                raise StatisticsError(
                    f"bases by gptq need the statistics {', '.join(missing)}. Calibrate with a "
                    "method that needs them or with loss curves, or take the nearest."
                )
            mean = statistics[Statistic.INPUT_MEAN].double()
            moment = statistics[Statistic.INPUT_COVARIANCE].double() + mean.outer(mean)
            if not bool(moment.any()):  # no input weighs more than another, as of factor_layer
                moment = torch.eye(len(moment)).to(moment)
        made, grids, shape = [], [], (weight.shape[0], weight.shape[1])
        grid = Grid(group_sizes=self.options.group_sizes, percentages=self.options.percentages)
        for form in map(form_named, self.forms):
            if not isinstance(form, Based):
                continue
            for level in form.bases(grid):
                if form.base_problem(*shape, level) is not None:
                    continue
                match form:
                    case Quantized():
                        grids.append((form, level[0]))
                    case QuantizedFactors():
                        made.append(Base(form, (), shape, {}, dtype))
                    case Codebook():
                        made.append(
                            round_to_codebook(
                                weight, form, dtype=dtype, moment=moment, damping=damping
                            )
                        )
                    case SemiStructured() | Sparse():
                        percent = level[0] if level else None
                        made.append(
                            sparsify(
                                weight, form, percent, dtype=dtype, moment=moment, damping=damping
                            )
                        )
        if not grids:
            return made
        if moment is None:
            return [*made, *round_nearest(weight, grids, dtype=dtype)]
        return [*made, *round_gptq(weight, moment, grids, dtype=dtype, damping=damping)]

    def factors(
        self,
        form: QuantizedFactors,
        factors: LowRankFactors,
        remainder: Remainders,
        weight: Float[Tensor, "out in"],
        statistics: Mapping[Statistic, Tensor],
        dtype: torch.dtype,
    ) -> Factors:
        """Round factors of a weight, with scales in ``dtype``; ``remainder`` factors what is left.

        Raises:
            StatisticsError: If a metric is not positive definite.
        """
        if form == EIGHT_BITS:
            return Factors.of(factors.left.float(), factors.right.float(), dtype)
        moment = gradient = None
        if self.needs:
            moment = input_moment(factors, statistics)
            if not bool(moment.any()):
                moment = torch.eye(len(moment)).to(moment)
            gradient = statistics.get(Statistic.OUTPUT_GRADIENT)
            if gradient is not None:
                gradient = gradient.to(moment) if bool(gradient.any()) else None
        if gradient is not None:
            gradient = shrunk(gradient, PREDICTION_SHRINKAGE)
        damping = self.options.damping
        return round_factors(
            factors, remainder, weight, moment, gradient, dtype=dtype, damping=damping
        )
