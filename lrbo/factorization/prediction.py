"""What a change of a weight costs the model, in nats per token, before anything is run."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from lrbo.calibration.statistics import Statistic
from lrbo.factorization.factors import LowRankFactors
from lrbo.layers.based import INT8, Factors

PREDICTION_SHRINKAGE = 0.01


def shrunk(matrix: Float[Tensor, "d d"], share: float) -> Float[Tensor, "d d"]:
    """Return ``(1 - share) M + share * mean(diag M) I``, of the same trace."""
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    return (1 - share) * matrix + share * matrix.diagonal().mean() * identity


def with_rounding(
    factors: LowRankFactors, statistics: Mapping[Statistic, Tensor]
) -> Float[Tensor, " k_plus_1"] | None:
    """Return the predicted losses of factors that are rounded to 8 bits, each direction by itself.

    What rounding does to the directions of a rank is added to what the rank leaves out; errors of
    different directions are taken for independent. ``None`` where nothing is predicted.
    """
    if factors.loss is None:
        return None
    gradient, moment = _moments(factors, statistics)
    noise = torch.zeros(factors.max_rank, dtype=torch.float64, device=factors.left.device)
    left, right = factors.left.double(), factors.right.double()
    codes = Factors.of(left, right, torch.float64)
    lengths = left.abs().amax(0), right.abs().amax(1)
    changes = [
        codes.left.double() * lengths[0] / INT8 - left,
        codes.right.double() * lengths[1][:, None] / INT8 - right,
    ]

    def outputs(matrix: Tensor) -> Tensor:
        return (matrix * (gradient @ matrix)).sum(0)

    def inputs(matrix: Tensor) -> Tensor:
        return (matrix * (matrix @ moment)).sum(1)

    noise += outputs(changes[0]) * inputs(right) + outputs(left) * inputs(changes[1])
    rounded = torch.cat([noise.new_zeros(1), noise.cumsum(0) / 2])
    return torch.cummin(factors.loss.to(rounded) + rounded, 0).values


def _moments(
    factors: LowRankFactors, statistics: Mapping[Statistic, Tensor]
) -> tuple[Float[Tensor, "out out"], Float[Tensor, "in in"]]:
    """Return ``G``, shrunk, and ``C`` of a prediction, in float64."""
    gradient = shrunk(
        statistics[Statistic.OUTPUT_GRADIENT].to(factors.left.double()), PREDICTION_SHRINKAGE
    )
    covariance = statistics.get(Statistic.INPUT_COVARIANCE)
    if covariance is None:
        covariance = statistics[Statistic.POOLED_INPUT_COVARIANCE]
    moment = covariance.to(gradient)
    if factors.center is None:
        mean = statistics[Statistic.INPUT_MEAN].to(gradient)
        moment = moment + mean.outer(mean)
    return gradient, moment


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
    gradient, moment = _moments(factors, statistics)
    outputs, inputs = left.T @ gradient @ left, right @ moment @ right.T
    # Of the directions that a rank leaves out: the sum over the trailing square block.
    blocks = (outputs * inputs).flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0) / 2
    curve = torch.cat([blocks, blocks.new_zeros(1)]).clamp_min(0.0)
    return curve.flip(0).cummax(0).values.flip(0)
