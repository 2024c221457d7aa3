"""What a change of a weight costs the model, in nats per token, before anything is run."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from lrbo.calibration.statistics import Statistic
from lrbo.factorization.factors import LowRankFactors

PREDICTION_SHRINKAGE = 0.01


def shrunk(matrix: Float[Tensor, "d d"], share: float) -> Float[Tensor, "d d"]:
    """Return ``(1 - share) M + share * mean(diag M) I``, of the same trace."""
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    return (1 - share) * matrix + share * matrix.diagonal().mean() * identity


def predicted_loss(
    factors: LowRankFactors, statistics: Mapping[Statistic, Tensor]
) -> Float[Tensor, " k_plus_1"]:
    """Predict the increase of the loss at rank 0, 1, ..., ``k``, nats per token.

    It is ``1/2 tr(G D C D^T)``, as of :class:`LossAware`, with ``D`` the product of the directions
    that a rank leaves out, of any method, so that all curves have one unit. ``C`` is the covariance
    (or else the pooled one) where the factors restore the mean, else the second moment; ``G`` is
    shrunk by 0.01. Made monotone, for directions of another metric may cancel; float64.
    """
    left, right = factors.left.double(), factors.right.double()
    gradient = statistics[Statistic.OUTPUT_GRADIENT].to(left)
    covariance = statistics.get(Statistic.INPUT_COVARIANCE)
    if covariance is None:
        covariance = statistics[Statistic.POOLED_INPUT_COVARIANCE]
    outputs = left.T @ shrunk(gradient, PREDICTION_SHRINKAGE) @ left
    inputs = right @ covariance.to(right) @ right.T
    if factors.center is None:
        mean = right @ statistics[Statistic.INPUT_MEAN].to(right)
        inputs += mean.outer(mean)
    # Of the directions that a rank leaves out: the sum over the trailing square block.
    blocks = (outputs * inputs).flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0) / 2
    curve = torch.cat([blocks, blocks.new_zeros(1)]).clamp_min(0.0)
    return curve.flip(0).cummax(0).values.flip(0)
