"""Which bases, Kronecker sums and frequency groups are made of every weight, and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from lrbo.calibration.statistics import Statistic
from lrbo.errors import StatisticsError
from lrbo.factorization.base import Remainders
from lrbo.factorization.bases import Base
from lrbo.factorization.factors import LowRankFactors
from lrbo.factorization.kronecker import KroneckerSum, kronecker_terms
from lrbo.factorization.options import BaseOptions
from lrbo.factorization.prediction import (
    PREDICTION_SHRINKAGE,
    input_moment,
    shrunk,
)
from lrbo.factorization.quantized_factors import round_factors
from lrbo.factorization.rounding import (
    InputMetric,
    round_in_order,
    round_nearest,
    round_to_codebook,
)
from lrbo.factorization.sparsity import keep_rows, sparsify
from lrbo.factorization.sweeps import swept
from lrbo.layers.based import Factors, bands_of
from lrbo.layers.form import Level
from lrbo.layers.forms import (
    Based,
    Codebook,
    Delta,
    DeltaInt8,
    KeptRows,
    Quantized,
    QuantizedFactors,
    SemiStructured,
    Sparse,
    form_named,
)
from lrbo.layers.frequency_form import FrequencyGroups
from lrbo.layers.kronecker_form import Kronecker
from lrbo.layers.options import Option
from lrbo.linalg import has_energy

# Rounded to the nearest, or not at all, whatever the errors weigh.
UNWEIGHED = (QuantizedFactors(8).name, Delta().name, DeltaInt8().name)
# What errors are weighed with.
NEEDS = frozenset({Statistic.INPUT_MEAN, Statistic.INPUT_COVARIANCE})
MOMENTS = frozenset({Statistic.INPUT_COVARIANCE, Statistic.POOLED_INPUT_COVARIANCE})


@dataclass(frozen=True)
class BasePlan:
    """The forms of bases, Kronecker sums and frequency groups, by name, and how they are made."""

    forms: tuple[str, ...]
    options: BaseOptions

    @classmethod
    def of(cls, forms: Sequence[str], options: BaseOptions) -> BasePlan | None:
        """Return the plan of those of some forms that are made so; ``None`` if none are."""
        own = Based, Kronecker, FrequencyGroups
        names = tuple(name for name in forms if isinstance(form_named(name), own))
        return cls(names, options) if names else None

    @property
    def of_tables(self) -> BasePlan | None:
        """The plan of those forms whose rows can be looked up; ``None`` if none can."""
        return BasePlan.of([n for n in self.forms if form_named(n).by_rows], self.options)

    def only(self, family: Option) -> BasePlan:
        """Return the plan of the one base of a family."""
        form, options = form_named(family.form), self.options
        match form:
            case Quantized():
                options = replace(options, group_sizes=family.level)
            case Sparse():
                options = replace(options, percentages=family.level)
            case KeptRows():
                options = replace(options, row_percentages=family.level)
        return BasePlan((form.name,), options)

    @property
    def frequency_groups(self) -> Sequence[int]:
        """The numbers of groups that tables are factored in, if at all."""
        return self.options.frequency_groups if FrequencyGroups.name in self.forms else ()

    @property
    def needs(self) -> frozenset[Statistic]:
        """The statistics that are read."""
        weighed = any(form_named(name).in_blocks and name not in UNWEIGHED for name in self.forms)
        return NEEDS if weighed and self.options.method == "gptq" else frozenset()

    def metric(self, statistics: Mapping[Statistic, Tensor]) -> InputMetric | None:
        """Return the metric of errors; ``None`` where every entry is rounded alone.

        Raises:
            StatisticsError: If a statistic is missing.
        """
        if not self.needs:
            return None
        if missing := sorted(need.value for need in self.needs - set(statistics)):
            raise StatisticsError(
                f"bases by gptq need the statistics {', '.join(missing)}. Calibrate with a "
                "method that needs them or with loss curves, or take the nearest."
            )
        mean = statistics[Statistic.INPUT_MEAN].double()
        moment = statistics[Statistic.INPUT_COVARIANCE].double().addr(mean, mean)
        if not has_energy(moment):  # no input weighs more than another, as of factor_layer
            moment = torch.eye(len(moment)).to(moment)
        return InputMetric(moment, self.options.damping)

    def make(
        self,
        weight: Float[Tensor, "out in"],
        statistics: Mapping[Statistic, Tensor],
        dtype: torch.dtype,
        factors: LowRankFactors | None = None,
        metric: InputMetric | None = None,
    ) -> list[Base]:
        """Make every base of a weight, in float64; their numbers are stored in ``dtype``.

        Outputs are kept for what a small rank of the ``factors`` leaves of them, if given;
        ``metric`` is that of the ``statistics``, if it is known.

        Raises:
            StatisticsError: If a statistic is missing, or does not suit.
        """
        damping = self.options.damping
        metric = metric or self.metric(statistics)
        moment = None if metric is None else metric.moment
        weighs = any(isinstance(form_named(name), Sparse | KeptRows) for name in self.forms)
        gradient = statistics.get(Statistic.OUTPUT_GRADIENT) if self.needs and weighs else None
        if gradient is not None:
            gradient = gradient.double()
            gradient = shrunk(gradient, PREDICTION_SHRINKAGE) if has_energy(gradient) else None
        made, grids, shape = [], [], (weight.shape[0], weight.shape[1])
        grid = self.options.grid()
        for form in map(form_named, self.forms):
            if not isinstance(form, Based):
                continue
            for level in form.bases(grid):
                if form.base_problem(*shape, level) is not None:
                    continue
                match form:
                    case Quantized():
                        grids.append((form, level[0]))
                    case QuantizedFactors() | Delta():
                        made.append(Base(form, level, shape, {}, dtype))
                    case Codebook():
                        made.append(
                            round_to_codebook(
                                weight,
                                form,
                                dtype=dtype,
                                gptq=None if metric is None else metric.gptq,
                            )
                        )
                    case SemiStructured() | Sparse():
                        percent = level[0] if level else None
                        made.append(
                            sparsify(
                                weight,
                                form,
                                percent,
                                dtype=dtype,
                                moment=moment,
                                gradient=gradient,
                                damping=damping,
                            )
                        )
                    case KeptRows():
                        change = None if factors is None else _change(weight, factors)
                        made.append(
                            keep_rows(
                                weight,
                                form,
                                level[0],
                                dtype=dtype,
                                change=change,
                                moment=moment,
                                gradient=gradient,
                            )
                        )
                    case _:
                        raise TypeError(f"{form.name} is made by no rule")
        if not grids:
            return made
        if metric is None:
            return [*made, *round_nearest(weight, grids, dtype=dtype)]
        integers = round_in_order(weight, metric.gptq, grids, dtype=dtype)
        return [*made, *swept(weight, integers, metric, self.options.sweeps)]

    def factors(
        self,
        form: QuantizedFactors | Delta,
        factors: LowRankFactors,
        remainder: Remainders,
        weight: Float[Tensor, "out in"],
        statistics: Mapping[Statistic, Tensor],
        dtype: torch.dtype,
        level: Level = (),
        metric: InputMetric | None = None,
    ) -> Factors:
        """Round factors of a weight or change as over a base of a ``level``, scales in ``dtype``.

        ``remainder`` factors what is left.

        ``metric`` is that of the ``statistics``, if it is known.

        Raises:
            StatisticsError: If a metric is not positive definite.
        """
        if form.name in UNWEIGHED:
            sides = factors.left.float(), factors.right.float()
            return Factors.of(*sides, dtype, floats=form.has_floats)
        moment = gradient = inputs = None
        if self.needs and metric is not None and factors.center is None:
            moment, inputs = metric.moment, metric.gptq
        elif self.needs:
            moment = input_moment(factors, statistics)
            if not has_energy(moment):
                moment = torch.eye(len(moment)).to(moment)
        if moment is not None:
            gradient = statistics.get(Statistic.OUTPUT_GRADIENT)
            if gradient is not None:
                gradient = gradient.to(moment) if has_energy(gradient) else None
        if gradient is not None:
            gradient = shrunk(gradient, PREDICTION_SHRINKAGE)
        damping = self.options.damping
        return round_factors(
            factors,
            remainder,
            weight,
            moment,
            gradient,
            dtype=dtype,
            damping=damping,
            bands=bands_of(form, level),
            inputs=inputs,
        )

    def sums(
        self,
        weight: Float[Tensor, "out in"],
        factors: LowRankFactors,
        statistics: Mapping[Statistic, Tensor],
    ) -> dict[Option, KroneckerSum]:
        """Make every Kronecker sum of a weight, in float64, with the bias of its ``factors``.

        By gptq, terms are those of the moments of inputs and of output gradients, where known; by
        nearest, those of the weight alone.
        """
        forms = [each for each in map(form_named, self.forms) if isinstance(each, Kronecker)]
        if not forms:
            return {}
        made = {}
        shape = weight.shape[0], weight.shape[1]
        gradient = statistics.get(Statistic.OUTPUT_GRADIENT)
        if gradient is not None:
            gradient = shrunk(gradient.to(weight), PREDICTION_SHRINKAGE)
        is_known = not MOMENTS.isdisjoint(statistics)
        moment = input_moment(factors, statistics) if is_known else None
        has_effect = all(each is None or has_energy(each) for each in (gradient, moment))
        for form in forms:
            for left in form.shapes(*shape, self.options.grid()):
                terms = kronecker_terms(
                    weight,
                    left,
                    gradient if has_effect else None,
                    moment if has_effect else None,
                    is_weighed=self.options.method == "gptq",
                )
                if gradient is not None and not has_effect:
                    nothing = torch.zeros_like(terms.tail)
                    terms = replace(terms, tail=nothing, loss=nothing)
                family = Option(form.name, left)
                made[family] = KroneckerSum(shape, left, terms, factors.offset, factors.center)
        return made


def _change(weight: Float[Tensor, "out in"], factors: LowRankFactors) -> Float[Tensor, "out in"]:
    """Subtract the leading eighth of the largest rank from a weight.

    By predicted losses of two layers of SmolLM2-135M this picks better outputs than the whole
    weight, or what a quarter or a half leave.
    """
    rank = min(weight.shape) // 8
    return weight - factors.left[:, :rank] @ factors.right[:rank]
