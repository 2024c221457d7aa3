"""The statistics of a layer that methods may need."""

from __future__ import annotations

from enum import StrEnum


class Statistic(StrEnum):
    """What calibration can gather about a layer; the value is the name that it is stored under.

    ``x`` is the input of a layer for one token, ``g`` the gradient of the summed loss with
    respect to its output for that token.
    """

    INPUT_MEAN = "mean"  # E[x], (in,)
    INPUT_MAGNITUDE = "magnitude"  # E[|x|], (in,)
    INPUT_COVARIANCE = "covariance"  # Cov(x), (in, in)
    POOLED_INPUT_COVARIANCE = "pooled_covariance"  # mean over groups of text of Cov(x) within each
    OUTPUT_GRADIENT = "output_gradient"  # E[g g^T], (out, out), nats^2
    # E[|g|^2 x_j^2], (in,): the Fisher information of the weights that read feature j, by token.
    INPUT_IMPORTANCE = "input_importance"


# Each layer has its own; the others belong to an input, and layers that share it share them.
GRADIENT_STATISTICS = frozenset({Statistic.OUTPUT_GRADIENT, Statistic.INPUT_IMPORTANCE})
MATRICES = frozenset(
    {Statistic.INPUT_COVARIANCE, Statistic.POOLED_INPUT_COVARIANCE, Statistic.OUTPUT_GRADIENT}
)
