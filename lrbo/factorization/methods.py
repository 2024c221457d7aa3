"""svd, fwsvd, asvd, drone, svd_llm: five metrics, one weighted SVD."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lrbo.accounting import Storage, low_rank_parameters
from lrbo.factorization.base import Statistic, require_statistics
from lrbo.linalg import psd_cholesky, psd_eigenpairs, weighted_svd
from lrbo.nested import LowRankFactors
from lrbo.specs import LayerSpec


def tail_sums(energy: Float[Tensor, " k"]) -> Float[Tensor, " k_plus_1"]:
    """Return what is left after 0, 1, ..., ``k`` entries: summed from the small end."""
    return torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)])


def second_moment(statistics: Mapping[Statistic, Tensor]) -> Float[Tensor, "in in"]:
    """Return ``E[x x^T]``, float64, from mean and covariance."""
    mean = statistics[Statistic.INPUT_MEAN].to(torch.float64)
    return statistics[Statistic.INPUT_COVARIANCE].to(torch.float64) + mean.outer(mean)


def balanced(
    left: Float[Tensor, "out k"], right: Float[Tensor, "k in"]
) -> tuple[Float[Tensor, "out k"], Float[Tensor, "k in"]]:
    """Return the same product with equally long columns and rows.

    So both factors stay in the range of half precision; a direction that is zero stays as it is.
    """
    lengths = left.norm(dim=0), right.norm(dim=1)
    scale = (lengths[1] / lengths[0]).sqrt()
    scale = torch.where(torch.isfinite(scale) & (scale > 0), scale, torch.ones_like(scale))
    return left * scale, right / scale[:, None]


@dataclass(frozen=True)
class WeightedSvd(ABC):
    """Minimise ``||(W - W_r) B||_F^2``; a method is its ``B``. An existing bias is kept.

    A singular ``B`` (fewer calibration tokens than features, a feature that is always zero)
    leaves directions without weight: they come last, and the full rank is exact all the same.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """Return the name in the registry and in ``conf/method``."""

    @property
    @abstractmethod
    def needs(self) -> frozenset[Statistic]:
        """Return the statistics that the metric reads."""

    @abstractmethod
    def right_root(self, statistics: Mapping[Statistic, Tensor]) -> Tensor | None:
        """Return ``B``: ``(in, k)``, ``(in,)`` for a diagonal one, or ``None`` for the identity."""

    def for_kind(self, kind: str) -> WeightedSvd:
        """Return the method itself: it treats every kind alike."""
        del kind
        return self

    def factor(
        self,
        weight: Float[Tensor, "out in"],
        bias: Float[Tensor, " out"] | None,
        statistics: Mapping[Statistic, Tensor],
    ) -> LowRankFactors:
        """Factor one layer.

        Args:
            weight: ``(out, in)``, any floating dtype; not modified.
            bias: ``(out,)`` or ``None``.
            statistics: What the method needs.

        Returns:
            Factors of all ranks up to ``min(out, in)``, float64; the error is
            ``||(W - W_r) B||_F^2``.

        Raises:
            StatisticsError: If a statistic is missing or anything is not finite.
        """
        require_statistics(self, weight, bias, statistics)
        left, values, right = weighted_svd(weight, self.right_root(statistics))
        left, right = balanced(left, right)
        offset = None if bias is None else bias.to(torch.float64)
        return LowRankFactors(left, right, tail_sums(values.square()), offset)

    def parameters(self, spec: LayerSpec, rank: int, storage: Storage = "factored") -> int:
        """Count the factors, and the bias where the dense layer has one."""
        return low_rank_parameters(spec, rank, bias=spec.has_bias, storage=storage)


@dataclass(frozen=True)
class Svd(WeightedSvd):
    """Truncated singular value decomposition of the weight alone (Eckart and Young, 1936).

    It knows nothing of the data and is the floor that every other method must beat.
    """

    name: str = "svd"
    needs: frozenset[Statistic] = frozenset()

    def right_root(self, statistics: Mapping[Statistic, Tensor]) -> None:
        """Return the identity."""
        del statistics


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

    def right_root(self, statistics: Mapping[Statistic, Tensor]) -> Float[Tensor, " in"]:
        """Return the root of the importances."""
        return statistics[Statistic.INPUT_IMPORTANCE].to(torch.float64).sqrt()


@dataclass(frozen=True)
class Asvd(WeightedSvd):
    """Activation-aware SVD: every input feature weighs as much as it is active.

    ``B = diag(E[|x_j|]^alpha)``.

    Attributes:
        alpha: Strength; 0 is plain SVD. The paper's 0.5.

    References:
        Yuan et al., *ASVD: Activation-aware Singular Value Decomposition for Compressing Large
        Language Models*, 2023, equations 5 and 7.
    """

    name: str = "asvd"
    needs: frozenset[Statistic] = frozenset({Statistic.INPUT_MAGNITUDE})
    alpha: float = 0.5

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if not 0 <= self.alpha < math.inf:
            raise ValueError(f"alpha={self.alpha!r}: expected a number from 0 on")

    def right_root(self, statistics: Mapping[Statistic, Tensor]) -> Float[Tensor, " in"]:
        """Return the magnitudes to the power of ``alpha``."""
        return statistics[Statistic.INPUT_MAGNITUDE].to(torch.float64) ** self.alpha


@dataclass(frozen=True)
class Drone(WeightedSvd):
    """Data-aware low rank: the least mean squared output error, ``B B^T = E[x x^T]``.

    ``B`` is the root by eigendecomposition, so that data of any rank will do.

    References:
        Chen et al., *DRONE: Data-aware Low-rank Compression for Large NLP Models*, NeurIPS 2021,
        theorem 1.
    """

    name: str = "drone"
    needs: frozenset[Statistic] = frozenset({Statistic.INPUT_MEAN, Statistic.INPUT_COVARIANCE})

    def right_root(self, statistics: Mapping[Statistic, Tensor]) -> Float[Tensor, "in in"]:
        """Return eigenvectors scaled by the roots of their eigenvalues."""
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

    def right_root(self, statistics: Mapping[Statistic, Tensor]) -> Float[Tensor, "in in"]:
        """Return the lower Cholesky factor."""
        return psd_cholesky(second_moment(statistics), "input second moment")
