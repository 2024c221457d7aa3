"""bolaco: principal directions of the outputs, pooled centred covariance, bias."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lrbo.accounting import Storage, low_rank_parameters
from lrbo.factorization.base import Statistic, require_statistics
from lrbo.factorization.weighted import tail_sums
from lrbo.linalg import output_directions
from lrbo.nested import LowRankFactors
from lrbo.specs import LayerSpec


@dataclass(frozen=True)
class Bolaco:
    r"""Adaptive feature-based factorization of Bolaco.

    For a dense layer ``y = W x + b`` whose calibration outputs have mean ``mu`` and pooled
    covariance ``C``, the rank-``r`` layer is

        y_r = Q_r Q_r^T W x + mu - Q_r Q_r^T (mu - b),

    with ``Q_r`` the ``r`` leading eigenvectors of ``C``. ``C`` comes from the input of the
    layer, ``C = W C_in W^T``, so that layers which share an input share their statistics. With
    one group no other rank-``r`` affine layer has a smaller mean squared output error; with
    more, the same holds for the error around each group's own mean, averaged over groups.

    References:
        Ji et al., *Adaptive Feature-based Low-Rank Compression of Large Language Models via
        Bayesian Optimization*, Findings of EMNLP 2024, equations 3 to 6. The dense bias ``b``
        is our addition (the paper's models have none), and merging of moments is exact where
        its code is not.
    """

    name: str = "bolaco"
    needs: frozenset[Statistic] = frozenset(
        {Statistic.INPUT_MEAN, Statistic.POOLED_INPUT_COVARIANCE}
    )

    def for_kind(self, kind: str) -> Bolaco:
        """Return the method itself: it treats every kind alike."""
        del kind
        return self

    def factor(
        self,
        weight: Float[Tensor, "out in"],
        bias: Float[Tensor, " out"] | None,
        statistics: Mapping[Statistic, Tensor],
    ) -> LowRankFactors:
        """Factor one layer along the principal directions of its outputs.

        Args:
            weight: ``(out, in)``, any floating dtype; not modified.
            bias: ``(out,)``, the dense bias, or ``None``.
            statistics: ``mean`` ``(in,)`` and ``pooled_covariance`` ``(in, in)`` of the input.

        Returns:
            Factors of all ranks up to ``min(out, in)``, float64. The error is the mean squared
            output error per token: the sum of the discarded eigenvalues.

        Raises:
            StatisticsError: If a statistic is missing or anything is not finite.

        Note:
            One symmetric eigendecomposition of order ``min(out, in)``.
        """
        require_statistics(self, weight, bias, statistics)
        dense = weight.to(torch.float64)
        mean_in = statistics[Statistic.INPUT_MEAN].to(dense)
        covariance_in = statistics[Statistic.POOLED_INPUT_COVARIANCE].to(dense)
        left, eigenvalues, right = output_directions(dense, covariance_in)
        mean_out = dense @ mean_in if bias is None else dense @ mean_in + bias.to(dense)
        return LowRankFactors(left, right, tail_sums(eigenvalues), mean_out, mean_in)

    def parameters(self, spec: LayerSpec, rank: int, storage: Storage = "factored") -> int:
        """Count the factors and the bias, which every low-rank layer of this method carries."""
        return low_rank_parameters(spec, rank, bias=True, storage=storage)
