"""FactorizationMethod: what a method needs and what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from lrbo.accounting import Storage
from lrbo.errors import StatisticsError
from lrbo.linalg import require_finite
from lrbo.model import LayerSpec
from lrbo.nested import LowRankFactors


class Statistic(StrEnum):
    """What calibration can gather about the input of a layer.

    The value is the name under which it is stored.
    """

    INPUT_MEAN = "mean"
    INPUT_COVARIANCE = "covariance"
    POOLED_INPUT_COVARIANCE = "pooled_covariance"


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

    def factor(
        self,
        weight: Float[Tensor, "out in"],
        bias: Float[Tensor, " out"] | None,
        statistics: Mapping[Statistic, Tensor],
    ) -> LowRankFactors:
        """Factor one layer, in float64, for every rank at once."""
        ...

    def parameters(self, spec: LayerSpec, rank: int, storage: Storage = "factored") -> int:
        """Count what the layer holds at a rank, an added bias included."""
        ...


def require_statistics(
    method: FactorizationMethod,
    weight: Tensor,
    bias: Tensor | None,
    statistics: Mapping[Statistic, Tensor],
) -> None:
    """Refuse missing or non-finite input before any work is done.

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
