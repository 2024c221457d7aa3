"""The methods, from plain svd to loss_aware, each with its metric."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from lrbo.calibration.statistics import Statistic
from lrbo.errors import StatisticsError
from lrbo.factorization.base import FactorizationMethod, Remainders, Statistics, Weight
from lrbo.factorization.factors import LowRankFactors
from lrbo.factorization.options import AsvdOptions, FirstOrderOptions, LossAwareOptions
from lrbo.factorization.prediction import PREDICTION_SHRINKAGE, shrunk
from lrbo.layers.low_rank import Bias
from lrbo.linalg import (
    column_space,
    has_energy,
    output_directions,
    psd_cholesky,
    psd_eigenpairs,
    weighted_svd,
)


def tail_sums(energy: Float[Tensor, " k"]) -> Float[Tensor, " k_plus_1"]:
    """Return the sums of the entries after the first 0, 1, ..., ``k``, from the small end."""
    return torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)])


def second_moment(statistics: Statistics) -> Float[Tensor, "in in"]:
    """Return ``E[x x^T]``, float64, from mean and covariance."""
    mean = statistics[Statistic.INPUT_MEAN].to(torch.float64)
    return statistics[Statistic.INPUT_COVARIANCE].to(torch.float64).addr(mean, mean)


def balanced(
    left: Float[Tensor, "out k"], right: Float[Tensor, "k in"]
) -> tuple[Float[Tensor, "out k"], Float[Tensor, "k in"]]:
    """Scale columns and rows to equal lengths, so that both stay in the range of float16."""
    lengths = left.norm(dim=0), right.norm(dim=1)
    scale = (lengths[1] / lengths[0]).sqrt()
    scale = torch.where(torch.isfinite(scale) & (scale > 0), scale, torch.ones_like(scale))
    return left * scale, right / scale[:, None]


@dataclass(frozen=True)
class WeightedSvd(FactorizationMethod, ABC):
    """Minimise ``||(W - W_r) B||_F^2``, the error; a method is its ``B``. The bias stays.

    Directions that a singular ``B`` gives no weight come last; the full rank is exact all the same.
    """

    @abstractmethod
    def right_root(self, statistics: Statistics) -> Tensor | None:
        """Return ``B``: ``(in, k)``, ``(in,)`` for a diagonal one, or ``None`` for the identity."""

    @override
    def factor(self, weight: Weight, bias: Bias, statistics: Statistics) -> LowRankFactors:
        left, values, right = weighted_svd(weight, self.right_root(statistics))
        return LowRankFactors(*balanced(left, right), tail_sums(values.square()), bias)


@dataclass(frozen=True)
class Svd(WeightedSvd):
    """Truncated singular value decomposition of the weight alone (Eckart and Young, 1936)."""

    name: str = "svd"
    needs: frozenset[Statistic] = frozenset()

    @override
    def right_root(self, statistics: Statistics) -> None:
        return None


@dataclass(frozen=True)
class Fwsvd(WeightedSvd):
    """Fisher-weighted SVD: every input feature weighs as much as its weights matter to the loss.

    ``B = diag(sqrt(sum_i F_ij))``, with ``F_ij = E[(dL/dW_ij)^2]`` per token.

    References:
        Hsu et al., *Language model compression with weighted low-rank factorization*, ICLR 2022,
        equations 5 to 8. The paper sums the Fisher information over the rows of a weight stored
        as ``(in, out)``, so a sum is that of one input feature; gradients enter token by token
        here, where the paper's enter by batch.
    """

    name: str = "fwsvd"
    needs: frozenset[Statistic] = frozenset({Statistic.INPUT_IMPORTANCE})

    @override
    def right_root(self, statistics: Statistics) -> Float[Tensor, " in"]:
        return statistics[Statistic.INPUT_IMPORTANCE].sqrt()


@dataclass(frozen=True)
class FirstOrder(FirstOrderOptions, FactorizationMethod):
    r"""Sparsity-aware SVD: every output weighs as much as its most important weights do.

    A weight's importance is that of first-order pruning, ``S_ij = |W_ij dL/dW_ij|``: what setting
    it to 0 does to the loss, to first order. The ``kept`` share of a layer's weights with the
    largest importances, at least one, is what pruning would keep, and with ``D = diag(sqrt(I_i))``
    for the sums ``I_i`` of the importances that are kept in row ``i``, ``||D (W - W_r)||_F^2`` is
    the error. A row that keeps none weighs as its most important weight alone: otherwise nothing
    would order the directions of all such rows.

    References:
        Ren and Zhu, *Low-Rank Prune-And-Factorize for Language Model Compression*, LREC-COLING
        2024 (arXiv 2306.14152), sparsity-aware SVD. Its importances are signed sums over the steps
        of a fine-tuning that prunes. There are no such steps here: the dense model alone is seen,
        whose gradients of labels that it gives itself cancel in the sum, so absolute values are
        averaged over windows of text. For the same reason the dense weight is factored, and not the
        pruned one, which only training can repair. Rows are the outputs, as torch stores weights.
    """

    name: str = "first_order"
    needs: frozenset[Statistic] = frozenset({Statistic.WEIGHT_GRADIENT})

    @override
    def factor(self, weight: Weight, bias: Bias, statistics: Statistics) -> LowRankFactors:
        importance = weight.abs() * statistics[Statistic.WEIGHT_GRADIENT]
        pruned = min(round((1 - self.kept) * weight.numel()), weight.numel() - 1)
        is_kept = importance >= importance.flatten().kthvalue(pruned + 1).values
        sums = (importance * is_kept).sum(1)
        rows = torch.where(is_kept.any(1), sums, importance.amax(1))
        right, values, left = weighted_svd(weight.T, rows.sqrt())
        return LowRankFactors(*balanced(left.T, right.T), tail_sums(values.square()), bias)


@dataclass(frozen=True)
class Asvd(AsvdOptions, WeightedSvd):
    """Activation-aware SVD: every input feature weighs as much as it is active.

    ``B = diag(E[|x_j|]^alpha)``.

    References:
        Yuan et al., *ASVD: Activation-aware Singular Value Decomposition for Compressing Large
        Language Models*, 2023, equations 5 and 7.
    """

    name: str = "asvd"
    needs: frozenset[Statistic] = frozenset({Statistic.INPUT_MAGNITUDE})

    @override
    def right_root(self, statistics: Statistics) -> Float[Tensor, " in"]:
        return statistics[Statistic.INPUT_MAGNITUDE] ** self.alpha


@dataclass(frozen=True)
class Drone(WeightedSvd):
    """Data-aware low rank: the least mean squared output error, ``B B^T = E[x x^T]``.

    References:
        Chen et al., *DRONE: Data-aware Low-rank Compression for Large NLP Models*, NeurIPS 2021,
        theorem 1.
    """

    name: str = "drone"
    needs: frozenset[Statistic] = frozenset({Statistic.INPUT_MEAN, Statistic.INPUT_COVARIANCE})

    @override
    def right_root(self, statistics: Statistics) -> Float[Tensor, "in in"]:
        energy, vectors = psd_eigenpairs(second_moment(statistics), "input second moment")
        return vectors * energy.sqrt()


@dataclass(frozen=True)
class SvdLlm(WeightedSvd):
    """Truncation-aware whitening: the metric of DRONE, with ``B`` a Cholesky factor.

    A second moment that is singular gets the jitter that Cholesky's method needs, announced.

    References:
        Wang et al., *SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language
        Model Compression*, ICLR 2025, section 3.1 (without its update of the weights).
    """

    name: str = "svd_llm"
    needs: frozenset[Statistic] = frozenset({Statistic.INPUT_MEAN, Statistic.INPUT_COVARIANCE})

    @override
    def right_root(self, statistics: Statistics) -> Float[Tensor, "in in"]:
        return psd_cholesky(second_moment(statistics), "input second moment")


@dataclass(frozen=True)
class Bolaco(FactorizationMethod):
    r"""Principal directions of the outputs, from a pooled centred covariance, and a bias.

    For a dense layer ``y = W x + b`` whose calibration outputs have mean ``mu`` and pooled
    covariance ``C``, the rank-``r`` layer is

        y_r = Q_r Q_r^T W x + mu - Q_r Q_r^T (mu - b),

    with ``Q_r`` the ``r`` leading eigenvectors of ``C = W C_in W^T``; its error is the sum of the
    other eigenvalues. With one group no other rank-``r`` affine layer has a smaller mean squared
    output error; with more, the same holds for the error around each group's own mean, averaged
    over groups.

    References:
        Ji et al., *Adaptive Feature-based Low-Rank Compression of Large Language Models via
        Bayesian Optimization*, Findings of EMNLP 2024, equations 3 to 6; the dense bias ``b`` is
        our addition. Moments are merged exactly, which its code does not.
    """

    name: str = "bolaco"
    needs: frozenset[Statistic] = frozenset(
        {Statistic.INPUT_MEAN, Statistic.POOLED_INPUT_COVARIANCE}
    )

    @property
    @override
    def adds_bias(self) -> bool:
        return True

    @override
    def factor(self, weight: Weight, bias: Bias, statistics: Statistics) -> LowRankFactors:
        mean = statistics[Statistic.INPUT_MEAN]
        covariance = statistics[Statistic.POOLED_INPUT_COVARIANCE]
        left, energy, right = output_directions(weight, covariance)
        offset = weight @ mean if bias is None else weight @ mean + bias
        return LowRankFactors(left, right, tail_sums(energy), offset, mean)


@dataclass(frozen=True)
class LossAware(LossAwareOptions, FactorizationMethod):
    r"""Two-sided factorization: the least expected increase of the loss, to second order.

    With input moment ``C = E[x x^T]`` and output-gradient moment ``G = E[g g^T]``, where ``g``
    is the gradient of the summed loss with respect to one token's output, a change ``D`` of the
    weight raises the loss by about ``1/2 tr(G D C D^T)`` nats per token, if ``x`` and ``g`` are
    taken as independent (K-FAC). With ``G = R^T R`` and the principal directions ``Q`` of
    ``R W x``, the rank-``r`` layer is ``R^-1 Q_r Q_r^T R W``.

    ``C`` and ``G`` are shrunk towards a multiple of the identity of the same trace, and the
    spectrum of ``G`` is flattened: both are estimates of the dense model, and directions with
    small gradients there matter once other layers change. The error is the predicted increase of
    the loss with both as they then are. Only outputs that ``W x`` can reach count, so nothing
    larger than ``min(out, in)`` is decomposed.

    References:
        Martens and Grosse, *Optimizing Neural Networks with Kronecker-factored Approximate
        Curvature*, 2015, for the metric; the closed form is that of two-sided weighted low rank.
        Centring is Bolaco's (Ji et al., 2024).
    """

    name: str = "loss_aware"

    @property
    @override
    def needs(self) -> frozenset[Statistic]:
        return frozenset(
            {Statistic.INPUT_MEAN, Statistic.INPUT_COVARIANCE, Statistic.OUTPUT_GRADIENT}
        )

    @property
    @override
    def adds_bias(self) -> bool:
        return self.centred

    @override
    def for_kind(self, kind: str) -> LossAware:
        return replace(self, output_power=0.0, one_sided=()) if kind in self.one_sided else self

    @override
    def factor(self, weight: Weight, bias: Bias, statistics: Statistics) -> LowRankFactors:
        basis, reduced = column_space(weight)
        gradient = statistics[Statistic.OUTPUT_GRADIENT]
        mean_energy = gradient.diagonal().mean()
        if basis is not None:
            gradient = basis.T @ gradient @ basis
        moment = shrunk(gradient, self.output_shrinkage, mean_energy)
        strength, axes = psd_eigenpairs(moment, "output gradient moment")
        tempered = strength**self.output_power
        scale = (tempered * (strength.sum() / tempered.sum())).sqrt()
        if not float(scale.min()) > 0:
            raise StatisticsError(
                f"{Statistic.OUTPUT_GRADIENT.value} has directions without gradient, and "
                f"output_shrinkage={self.output_shrinkage!r} is lost in rounding; expected at "
                "least 1e-9. Raise it, or use more data.calibration.tokens."
            )
        centred = statistics[Statistic.INPUT_COVARIANCE]
        directions, energy, right = output_directions(
            scale[:, None] * (axes.T @ reduced),
            shrunk(centred if self.centred else second_moment(statistics), self.input_shrinkage),
            "weighted output moment",
        )
        back = axes @ (directions / scale[:, None])
        loss = None
        if not self.input_shrinkage:  # predicted_loss, for directions that C leaves apart
            predicted = shrunk(gradient, PREDICTION_SHRINKAGE, mean_energy)
            loss = tail_sums((back * (predicted @ back)).sum(0).clamp_min(0.0) * energy / 2)
        left, right = balanced(back if basis is None else basis @ back, right)
        tail = tail_sums(energy / 2)
        if not self.centred:
            return LowRankFactors(left, right, tail, bias, loss=loss)
        mean = statistics[Statistic.INPUT_MEAN]
        offset = weight @ mean if bias is None else weight @ mean + bias
        return LowRankFactors(left, right, tail, offset, mean, loss)

    @override
    def remainders(self, bias: Bias, statistics: Statistics) -> Remainders:
        """Factor changes in the metric in which losses are predicted, ``G`` as it is.

        They are small, as the second order asks for, and ``G`` is not flattened. The roots of both
        moments are made once for all changes, and the errors are the predicted losses.
        """
        factored = super().remainders(bias, statistics)
        mean, covariance = (
            statistics[need].double() for need in (Statistic.INPUT_MEAN, Statistic.INPUT_COVARIANCE)
        )
        gradient = statistics[Statistic.OUTPUT_GRADIENT].double()
        inputs = covariance if self.centred else covariance.addr(mean, mean)
        if not (has_energy(gradient) and has_energy(inputs)):
            return factored  # nothing has an effect
        # What is left of rounding is rounded again, and no digit beyond those of float32 matters.
        is_wide = len(gradient) <= len(inputs)
        # Of the smaller side there is a root; the other one enters as it is.
        if is_wide:
            root = psd_cholesky(shrunk(gradient, PREDICTION_SHRINKAGE), "output gradient moment").T
            other = shrunk(inputs.float(), self.input_shrinkage)
        else:
            root = psd_cholesky(shrunk(inputs, self.input_shrinkage), "input moment")
            other = shrunk(gradient.float(), PREDICTION_SHRINKAGE)
        root = root.float().contiguous()

        def leading(weight: Weight, max_rank: int) -> LowRankFactors:
            narrow = weight.float()
            seen = root @ narrow if is_wide else narrow @ root
            moment = seen @ other @ seen.T if is_wide else seen.T @ (other @ seen)
            whole = moment.diagonal().sum(dtype=torch.float64)
            if max_rank:
                energy, vectors = torch.linalg.eigh(moment)
                basis = vectors[:, -max_rank:].flip(-1)
                energy = energy.double().clamp_min(0.0).flip(-1)
                tail = tail_sums(energy / 2)[: max_rank + 1]
            else:
                tail, basis = whole[None] / 2, root[:, :0]
            if is_wide:
                left = torch.linalg.solve_triangular(root, basis, upper=True)
                right = basis.T @ seen
            else:
                left = seen @ basis
                right = torch.linalg.solve_triangular(root, basis.T, upper=False, left=False)
            left, right = balanced(left.to(weight.dtype), right.to(weight.dtype))
            if not self.centred:
                return LowRankFactors(left, right, tail, bias, loss=tail.clone())
            offset = weight.double() @ mean if bias is None else weight.double() @ mean + bias
            return LowRankFactors(left, right, tail, offset, mean, tail.clone())

        return leading
