"""What a change of a weight costs the model, in nats per token, before anything is run."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from lrbo.calibration.statistics import Statistic
from lrbo.factorization.factors import LowRankFactors

PREDICTION_SHRINKAGE = 0.01
# What relative errors of outputs are worked out from.
ERROR_NEEDS = frozenset({Statistic.INPUT_MEAN, Statistic.INPUT_COVARIANCE})


def shrunk(
    matrix: Float[Tensor, "d d"], share: float, mean: Float[Tensor, ""] | None = None
) -> Float[Tensor, "d d"]:
    """Return ``(1 - share) M + share * mean I``, with ``mean(diag M)`` of the same trace."""
    result = (1 - share) * matrix
    result.diagonal().add_(share * (matrix.diagonal().mean() if mean is None else mean))
    return result


def squared_errors(
    weight: Float[Tensor, "out in"],
    left: Float[Tensor, "out k"],
    right: Float[Tensor, "k in"],
    inputs: Float[Tensor, "in in"],
    outputs: Float[Tensor, "out out"] | None = None,
    whole: Float[Tensor, ""] | None = None,
) -> Float[Tensor, " k_plus_1"]:
    """Return ``tr(G D C D^T)`` with ``D = W - left[:, :r] right[:r]``, for every ``r``; float64.

    ``G``, of the outputs, is the identity by default. Nothing is taken for independent: factors may
    be of any weight, and rounded. Made monotone: no rank is worth more than a lower one
    that errs less. ``whole`` is the first one, if it is known: half of the work is for it.
    """
    left, right = left.double(), right.double()
    if whole is None:
        weighed = weight if outputs is None else outputs @ weight
        whole = (weighed @ inputs * weight).sum()
    ends = left if outputs is None else outputs @ left
    seen = right @ inputs  # (k, in)
    both = left.T @ ends
    blocks = (both * (seen @ right.T)).cumsum(0).cumsum(1).diagonal()
    steps = blocks - 2 * (seen @ weight.T * ends.T).sum(1).cumsum(0)
    return torch.cat([whole[None], whole + steps]).clamp_min(0.0).cummin(0).values


def with_rounding(
    factors: LowRankFactors,
    rounded: tuple[Float[Tensor, "out k"], Float[Tensor, "k in"]],
    weight: Float[Tensor, "out in"],
    statistics: Mapping[Statistic, Tensor],
    whole: Float[Tensor, ""] | None = None,
) -> Float[Tensor, " k_plus_1"] | None:
    """Return the predicted losses of ranks of factors as they are stored, rounded.

    ``whole`` is as of :func:`squared_errors`; ``None`` where nothing is predicted.
    """
    if factors.loss is None:
        return None
    gradient, moment = moments(factors, statistics)
    return squared_errors(weight, *rounded, moment, gradient, whole) / 2


def relative_error(
    squared: Float[Tensor, " n"],
    weight: Float[Tensor, "out in"],
    bias: Float[Tensor, " out"] | None,
    statistics: Mapping[Statistic, Tensor],
) -> Float[Tensor, " n"]:
    """Return ``||f_r(x) - f(x)|| / ||f(x)||`` over the calibration inputs of a layer ``f``.

    ``squared`` are mean squared errors of its output; of a layer that gives zeros it is 0.
    """
    inputs = statistics[Statistic.INPUT_COVARIANCE].to(weight)
    mean = weight @ statistics[Statistic.INPUT_MEAN].to(weight)
    mean = mean if bias is None else mean + bias.to(weight)
    size = (weight @ inputs * weight).sum() + mean.square().sum()
    return (squared / size).sqrt() if size > 0 else torch.zeros_like(squared)


def input_moment(
    factors: LowRankFactors, statistics: Mapping[Statistic, Tensor]
) -> Float[Tensor, "in in"]:
    """Return the moment that weighs changes: without the mean, where factors restore it."""
    covariance = statistics.get(Statistic.INPUT_COVARIANCE)
    if covariance is None:
        covariance = statistics[Statistic.POOLED_INPUT_COVARIANCE]
    moment = covariance.to(factors.left.device, torch.float64)
    if factors.center is None:
        mean = statistics[Statistic.INPUT_MEAN].to(moment)
        moment = moment.addr(mean, mean)
    return moment


def moments(
    factors: LowRankFactors, statistics: Mapping[Statistic, Tensor]
) -> tuple[Float[Tensor, "out out"], Float[Tensor, "in in"]]:
    """Return ``G``, shrunk, and ``C`` of a prediction, in float64; see :func:`predicted_loss`."""
    gradient = shrunk(
        statistics[Statistic.OUTPUT_GRADIENT].to(factors.left.device, torch.float64),
        PREDICTION_SHRINKAGE,
    )
    return gradient, input_moment(factors, statistics)


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
    gradient, moment = moments(factors, statistics)
    outputs, inputs = left.T @ gradient @ left, right @ moment @ right.T
    return left_out(outputs * inputs)


def left_out(pairs: Float[Tensor, "k k"]) -> Float[Tensor, " k_plus_1"]:
    """Return half of what the directions after the first 0, 1, ..., ``k`` cost together, falling.

    ``pairs`` are what each two of them cost: the sum is that over the trailing square block.
    """
    blocks = pairs.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0) / 2
    curve = torch.cat([blocks, blocks.new_zeros(1)]).clamp_min(0.0)
    return curve.flip(0).cummax(0).values.flip(0)
