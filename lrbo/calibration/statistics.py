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
    # E[|sum_t g_i x_j|], (out, in), nats: the size of the weight's gradient, window by window, over
    # the tokens of a window; float32, as it is as large as the weight.
    WEIGHT_GRADIENT = "weight_gradient"
    # Of an embedding, whose rows are looked up, and of the head, whose label v has probability p_v.
    TOKEN_FREQUENCY = "token_frequency"  # of each row, (out,), smoothed
    ROW_GRADIENT = "row_gradient"  # E[g g^T] of a row that is looked up, (in, in), nats^2
    LABEL_VARIANCE = "label_variance"  # E[p_v (1 - p_v)], (out,)


# Each layer has its own; the others belong to an input, and layers that share it share them.
GRADIENT_STATISTICS = frozenset(
    {
        Statistic.OUTPUT_GRADIENT,
        Statistic.INPUT_IMPORTANCE,
        Statistic.WEIGHT_GRADIENT,
        Statistic.ROW_GRADIENT,
        Statistic.LABEL_VARIANCE,
    }
)
MATRICES = frozenset(
    {
        Statistic.INPUT_COVARIANCE,
        Statistic.POOLED_INPUT_COVARIANCE,
        Statistic.OUTPUT_GRADIENT,
        Statistic.ROW_GRADIENT,
    }
)
# What layers of blocks do not have.
TABLE_STATISTICS = frozenset(
    {Statistic.TOKEN_FREQUENCY, Statistic.ROW_GRADIENT, Statistic.LABEL_VARIANCE}
)
# Of embedding and head, whatever the method.
LOOKUP_STATISTICS = frozenset({Statistic.TOKEN_FREQUENCY, Statistic.ROW_GRADIENT})
HEAD_STATISTICS = frozenset(
    {Statistic.INPUT_MEAN, Statistic.INPUT_COVARIANCE, Statistic.LABEL_VARIANCE}
)
