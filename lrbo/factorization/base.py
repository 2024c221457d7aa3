"""FactorizationMethod: what a method needs and what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from enum import StrEnum
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from lrbo.accounting import Storage
from lrbo.errors import StatisticsError
from lrbo.linalg import require_finite
from lrbo.nested import LowRankFactors
from lrbo.specs import LayerSpec


class Statistic(StrEnum):
    """What calibration can gather about a layer; the value is the name that it is stored under.

    ``x`` is the input of a layer for one token, ``g`` the gradient of the summed loss with
    respect to its output for that token.

    Attributes:
        INPUT_MEAN: ``E[x]``, ``(in,)``.
        INPUT_MAGNITUDE: ``E[|x|]``, ``(in,)``.
        INPUT_COVARIANCE: ``Cov(x)``, ``(in, in)``.
        POOLED_INPUT_COVARIANCE: Mean over groups of text of ``Cov(x)`` within the group.
        OUTPUT_GRADIENT: ``E[g g^T]``, ``(out, out)``, nats^2.
        INPUT_IMPORTANCE: ``E[|g|^2 x_j^2]``, ``(in,)``: the Fisher information of the weights
            that read feature ``j``, token by token.
    """

    INPUT_MEAN = "mean"
    INPUT_MAGNITUDE = "magnitude"
    INPUT_COVARIANCE = "covariance"
    POOLED_INPUT_COVARIANCE = "pooled_covariance"
    OUTPUT_GRADIENT = "output_gradient"
    INPUT_IMPORTANCE = "input_importance"


# Each layer has its own; the others belong to an input, and layers that share it share them.
GRADIENT_STATISTICS = frozenset({Statistic.OUTPUT_GRADIENT, Statistic.INPUT_IMPORTANCE})
MATRICES = frozenset(
    {Statistic.INPUT_COVARIANCE, Statistic.POOLED_INPUT_COVARIANCE, Statistic.OUTPUT_GRADIENT}
)


@runtime_checkable
class FactorizationMethod(Protocol):
    """The whole obligation of a new method."""

    @property
    def name(self) -> str:
        """Return the name in the registry and in ``conf/method``."""
        ...

    @property
    def needs(self) -> frozenset[Statistic]:
        """Return the statistics that :meth:`factor` reads."""
        ...

    def for_kind(self, kind: str) -> FactorizationMethod:
        """Return the method for layers of a kind; most methods treat all alike."""
        ...

    def factor(
        self,
        weight: Float[Tensor, "out in"],
        bias: Float[Tensor, " out"] | None,
        statistics: Mapping[Statistic, Tensor],
    ) -> LowRankFactors:
        """Factor one layer, in float64, for every rank at once.

        Args:
            weight: ``(out, in)``, any floating dtype; not modified.
            bias: ``(out,)`` or ``None``.
            statistics: At least what the method needs, none of it zero throughout
                (:func:`factor_layer` takes care of those).

        Raises:
            StatisticsError: If a statistic is missing or anything is not finite.
        """
        ...

    def parameters(self, spec: LayerSpec, rank: int, storage: Storage = "factored") -> int:
        """Count what the layer holds at a rank, an added bias included.

        Args:
            spec: The layer.
            rank: Inner dimension.
            storage: The form that is counted.
        """
        ...


def require_statistics(
    method: FactorizationMethod,
    weight: Tensor,
    bias: Tensor | None,
    statistics: Mapping[Statistic, Tensor],
) -> None:
    """Refuse missing or non-finite input before any work is done.

    Args:
        method: Whose needs must be there.
        weight: ``(out, in)``.
        bias: ``(out,)`` or ``None``.
        statistics: What calibration gathered; more than is needed is not looked at.

    Raises:
        StatisticsError: Naming what is missing, or counting what is not finite.
    """
    missing = sorted(need.value for need in method.needs - set(statistics))
    if missing:
        raise StatisticsError(
            f"method {method.name!r} needs the statistics {', '.join(missing)}; "
            f"got {', '.join(sorted(s.value for s in statistics)) or 'none'}. Run calibration "
            "with this method's needs."
        )
    require_finite("weight", weight)
    if bias is not None:
        require_finite("bias", bias)
    for need in sorted(method.needs):
        require_finite(need.value, statistics[need])


def factor_layer(
    method: FactorizationMethod,
    weight: Float[Tensor, "out in"],
    bias: Float[Tensor, " out"] | None,
    statistics: Mapping[Statistic, Tensor],
) -> LowRankFactors:
    """Factor one layer, which may be one that calibration saw nothing pass through.

    Where inputs, or gradients of outputs, are zero throughout, a metric made of them is zero: any
    rank is as good as dense, and no direction comes before another. The method is then given
    inputs or gradients that weigh all alike, so that directions are still in an order that means
    something should another text reach them, and the error of every rank is 0, as it was measured.

    Args:
        method: For layers of this kind.
        weight: ``(out, in)``, any floating dtype; not modified.
        bias: ``(out,)`` or ``None``.
        statistics: At least what the method needs, where the weight is.

    Raises:
        StatisticsError: If a statistic is missing or anything is not finite.
    """
    used = {need: statistics[need] for need in method.needs if need in statistics}
    mean = used.get(Statistic.INPUT_MEAN)
    constant = MATRICES - GRADIENT_STATISTICS if mean is not None and bool(mean.any()) else set()
    alike: dict[Statistic, Tensor] = {
        need: torch.eye(len(value)).to(value) if need in MATRICES else torch.ones_like(value)
        for need, value in used.items()
        if need is not Statistic.INPUT_MEAN and need not in constant and not bool(value.any())
    }
    factors = method.factor(weight, bias, used | alike)
    return replace(factors, tail=torch.zeros_like(factors.tail)) if alike else factors
