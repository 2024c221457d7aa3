"""svd: one weighted SVD whose metric is the identity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lrbo.accounting import Storage, low_rank_parameters
from lrbo.factorization.base import Statistic, require_statistics
from lrbo.linalg import weighted_svd
from lrbo.model import LayerSpec
from lrbo.nested import LowRankFactors


def tail_sums(energy: Float[Tensor, " k"]) -> Float[Tensor, " k_plus_1"]:
    """Return what is left after 0, 1, ..., ``k`` entries: summed from the small end."""
    return torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)])


@dataclass(frozen=True)
class Svd:
    """Truncated singular value decomposition of the weight alone (Eckart and Young, 1936).

    Minimises ``||W - W_r||_F``. It knows nothing of the data and is the floor that every other
    method must beat. An existing bias is kept as it is.
    """

    name: str = "svd"
    needs: frozenset[Statistic] = frozenset()

    def factor(
        self,
        weight: Float[Tensor, "out in"],
        bias: Float[Tensor, " out"] | None,
        statistics: Mapping[Statistic, Tensor],
    ) -> LowRankFactors:
        """Factor one layer; the singular values are split evenly between both factors.

        Args:
            weight: ``(out, in)``, any floating dtype; not modified.
            bias: ``(out,)`` or ``None``.
            statistics: Not used.

        Returns:
            Factors of all ranks up to ``min(out, in)``, float64; the error is the squared
            Frobenius norm of what is left.

        Raises:
            StatisticsError: If the weight or the bias is not finite.
        """
        require_statistics(self, weight, bias, statistics)
        left, values, right = weighted_svd(weight)
        root = values.sqrt()  # even split: both factors stay in the range of half precision
        return LowRankFactors(
            left * root,
            root[:, None] * right,
            tail_sums(values.square()),
            None if bias is None else bias.to(torch.float64),
        )

    def parameters(self, spec: LayerSpec, rank: int, storage: Storage = "factored") -> int:
        """Count the factors, and the bias where the dense layer has one."""
        return low_rank_parameters(spec, rank, bias=spec.has_bias, storage=storage)
