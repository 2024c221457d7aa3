"""The interface of factorization methods, and the factorization of one layer by any of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from lrbo.calibration.statistics import GRADIENT_STATISTICS, MATRICES, Statistic
from lrbo.errors import StatisticsError
from lrbo.factorization.factors import LowRankFactors
from lrbo.factorization.prediction import predicted_loss
from lrbo.layers.low_rank import Bias
from lrbo.linalg import has_energy, require_finite

Weight = Float[Tensor, "out in"]
Statistics = Mapping[Statistic, Tensor]
# A change of a weight and the largest useful rank -> its factors.
Remainders = Callable[[Weight, int], LowRankFactors]


@runtime_checkable
class FactorizationMethod(Protocol):
    """What a method must have; one that derives from this class inherits the rest."""

    @property
    def name(self) -> str:
        """The name in the registry and in ``conf/method``."""

    @property
    def needs(self) -> frozenset[Statistic]:
        """The statistics that :meth:`factor` reads."""

    @abstractmethod
    def factor(self, weight: Weight, bias: Bias, statistics: Statistics) -> LowRankFactors:
        """Factor one layer for every rank up to ``min(out, in)`` at once.

        Everything comes from :func:`factor_layer`: in float64, finite, on one device.

        Args:
            weight: ``(out, in)``; not modified.
            bias: ``(out,)`` or ``None``.
            statistics: At least what the method needs, none of it zero throughout.
        """

    @property
    def adds_bias(self) -> bool:
        """Whether factored layers have a bias also where the dense layer has none."""
        return False

    def remainders(self, bias: Bias, statistics: Statistics) -> Remainders:
        """Return a function that factors changes of one weight: those that its bases leave.

        Everything is as of :func:`factor_layer`; factors come with predicted losses, if gradients
        are known. They are in the dtype of the change.
        """

        def factored(weight: Weight, max_rank: int) -> LowRankFactors:
            full = factor_layer(self, weight, bias, statistics)
            if Statistic.OUTPUT_GRADIENT in statistics:
                full = replace(full, loss=predicted_loss(full, statistics))
            return full.to(dtype=weight.dtype, max_rank=max_rank)

        return factored

    def for_kind(self, kind: str) -> FactorizationMethod:
        """Return the method for layers of a kind; most methods treat all alike."""
        del kind
        return self


def factor_layer(
    method: FactorizationMethod, weight: Weight, bias: Bias, statistics: Statistics
) -> LowRankFactors:
    """Factor one layer, also one whose inputs or output gradients were zero in calibration.

    A metric made of zeros ranks no direction. The method then gets identities or ones, so that
    directions have a meaningful order for other texts, and the error of every rank is 0.

    Raises:
        StatisticsError: If a statistic is missing or anything is not finite.
    """
    if missing := sorted(need.value for need in method.needs - set(statistics)):
        raise StatisticsError(
            f"method {method.name!r} needs the statistics {', '.join(missing)}; "
            f"got {', '.join(sorted(s.value for s in statistics)) or 'none'}. Run calibration "
            "with this method's needs."
        )
    used = {need: statistics[need].double() for need in sorted(method.needs)}
    given = {"weight": weight, "bias": bias, **{need.value: used[need] for need in used}}
    for name, tensor in given.items():
        if tensor is not None:
            require_finite(name, tensor)
    mean = used.get(Statistic.INPUT_MEAN)
    constant = MATRICES - GRADIENT_STATISTICS if mean is not None and bool(mean.any()) else set()
    alike: dict[Statistic, Tensor] = {
        need: torch.eye(len(value)).to(value) if need in MATRICES else torch.ones_like(value)
        for need, value in used.items()
        if need is not Statistic.INPUT_MEAN and need not in constant and not has_energy(value)
    }
    offset = None if bias is None else bias.double()
    factors = method.factor(weight.double(), offset, used | alike)
    if not alike:
        return factors
    nothing = torch.zeros_like(factors.tail)
    return replace(factors, tail=nothing, loss=None if factors.loss is None else nothing.clone())
