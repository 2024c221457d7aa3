"""Reduced-rank regression for a layer whose inputs drifted from those of the dense model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from lrbo.calibration.moments import Moments
from lrbo.errors import StatisticsError
from lrbo.factorization.factors import LowRankFactors
from lrbo.factorization.methods import balanced
from lrbo.linalg import JitterWarning, psd_root, require_finite

# Added to the diagonal of a singular second moment, as shares of its mean eigenvalue.
JITTERS = (1e-10, 1e-8, 1e-6, 1e-4)


@dataclass(frozen=True)
class PairMoments:
    """Moments of an input ``x`` of the compressed model and of a target ``t``.

    ``t`` is what a layer should add to its dense output ``W x + b``, or a vector of which that is
    a linear map (:meth:`mapped`): the drift ``d = x_dense - x`` of the input. Its moments are
    exactly 0 where nothing upstream is compressed; differences of large moments would not be.

    All are float64. ``cross`` is ``E[(t - mean)(x - mean)^T]``. Where ``t`` is a ``share`` of
    ``W v``, ``target_covariance`` is that of ``v``, as only what errors weigh of it is ever asked
    for.
    """

    mean: Float[Tensor, " in"]
    target_mean: Float[Tensor, " k"]
    covariance: Float[Tensor, "in in"]
    cross: Float[Tensor, "k in"]
    target_covariance: Float[Tensor, "v v"]
    share: float | None = None

    @classmethod
    def of(cls, moments: Moments, size: int) -> PairMoments:
        """Split the moments of stacked vectors ``(x, t)``, of which ``x`` has ``size`` elements."""
        both = moments.covariance
        x, t = slice(size), slice(size, None)
        return cls(moments.mean[x], moments.mean[t], both[x, x], both[t, x], both[t, t])

    def mapped(self, weight: Float[Tensor, "out k"], share: float) -> PairMoments:
        """Return the moments of ``x`` and the share of ``W t``, of a layer with this weight."""
        return replace(
            self,
            target_mean=share * (weight @ self.target_mean),
            cross=share * (weight @ self.cross),
            share=share,
        )

    def mean_output(self, weight: Tensor, bias: Tensor | None) -> Float[Tensor, " out"]:
        """Return the mean of ``W x + b + t``."""
        mean = weight @ self.mean + self.target_mean
        return mean if bias is None else mean + bias


class OutputMetric:
    """Weighs output errors, ``e -> e^T G e`` in nats; plain squares where ``G`` is zero or None."""

    def __init__(self, matrix: Float[Tensor, "out out"] | None, name: str = "layer") -> None:
        self._matrix: Tensor | None = None
        self._lower: Tensor | None = None
        self._inverse: Tensor | None = None
        if matrix is None or not bool(matrix.any()):
            return
        require_finite(f"{name}: output metric", matrix)
        double = matrix.to(torch.float64)
        self._matrix = (double + double.T) / 2
        self._lower, failed = torch.linalg.cholesky_ex(self._matrix)
        # Where some outputs do not count, there is no inverse.
        if int(failed) or not _is_well_conditioned(self._lower):
            self._lower, inverse = psd_root(self._matrix, f"{name}: output metric")
            self._inverse = inverse.T

    def weigh(self, matrix: Float[Tensor, "out c"]) -> Float[Tensor, "out c"]:
        """Return ``G M``."""
        return matrix if self._matrix is None else self._matrix @ matrix

    def energy(self, covariance: Float[Tensor, "out out"]) -> float:
        """Return ``E[e^T G e]`` of errors with this second moment."""
        if self._matrix is None:
            return float(covariance.trace())
        return float((self._matrix * covariance).sum())

    def to_plain(self, matrix: Float[Tensor, "out c"]) -> Float[Tensor, "k c"]:
        """Return ``A M`` where ``A^T A = G``, so that errors are plain squares."""
        return matrix if self._lower is None else self._lower.T @ matrix

    def from_plain(self, matrix: Float[Tensor, "k c"]) -> Float[Tensor, "out c"]:
        """Return the ``M`` with ``A M`` as given; 0 on outputs that do not count."""
        if self._inverse is not None:
            return self._inverse @ matrix
        if self._lower is None:
            return matrix
        solved: Tensor = torch.linalg.solve_triangular(self._lower.T, matrix, upper=True)
        return solved


def solve(
    weight: Float[Tensor, "out in"],
    bias: Float[Tensor, " out"] | None,
    moments: PairMoments,
    rank: int,
    *,
    ridge: float,
    metric: OutputMetric | None = None,
    restore_means: bool = False,
    name: str = "layer",
) -> LowRankFactors:
    r"""Solve for the low-rank layer that comes closest to ``W x + b + t``.

    With ``S = E[x x^T]``, ``T = E[t x^T]`` and ``lam = ridge * trace(S) / in`` the best layer of
    full rank, drawn towards the dense weight by ``lam ||X - W||^2``, is

        W_ols = W + T (S + lam I)^-1,

    and of all ``X`` of rank ``r`` the one with the least
    ``tr(G (W_ols - X)(S + lam I)(W_ols - X)^T)`` is ``A^+ SVD_r(A W_ols B) B^-1`` with
    ``A^T A = G`` and ``B B^T = S + lam I`` (reduced-rank regression: Izenman, 1975).

    All tensors are float64. ``restore_means`` solves around the means, and gives the layer the bias
    that restores the mean output; else the dense bias stays. ``name`` is for messages.

    Returns:
        Factors of exactly this rank, both sides of a direction of the same length. Their error is
        the objective above, without the part of ``t`` that is not linear in ``x``.

    Raises:
        StatisticsError: If ``S`` stays singular with the largest jitter.
    """
    metric = metric or OutputMetric(None)
    second, cross = moments.covariance, moments.cross
    if not restore_means:
        second = second + moments.mean.outer(moments.mean)
        cross = cross + moments.target_mean.outer(moments.mean)
    lower = _cholesky(second, ridge, name)
    # W_ols B = W B + T B^-T, as (S + lam I)^-1 B = B^-T.
    step = torch.linalg.solve_triangular(lower, cross.T, upper=False).T
    product = metric.to_plain(weight @ lower + step)
    # Eigenvectors of the smaller Gram matrix, not an SVD: forty times as fast for a wide layer,
    # and less exact only for directions 1e-8 below the first, which no useful rank reaches.
    is_wide = product.shape[0] <= product.shape[1]
    energy, vectors = torch.linalg.eigh(product @ product.T if is_wide else product.T @ product)
    basis = vectors.flip(-1)[:, :rank]
    left, right = (basis, basis.T @ product) if is_wide else (product @ basis, basis.T)
    left = metric.from_plain(left)
    right = torch.linalg.solve_triangular(lower, right, upper=False, left=False)
    missing = rank - len(right)  # where a metric counts fewer outputs than the rank
    left, right = balanced(pad(left, (0, missing)), pad(right, (0, 0, 0, missing)))
    tail = energy.clamp_min(0.0).cumsum(0).flip(0)  # eigh sorts ascending
    tail = pad(tail, (0, rank + 1))[: rank + 1]
    return LowRankFactors(
        left,
        right,
        tail,
        moments.mean_output(weight, bias) if restore_means else bias,
        moments.mean if restore_means else None,
    )


class OutputErrors:
    """Mean squared output errors of layers with the target ``W x + b + t``, from moments alone.

    There is one for each of several texts, whose moments are ``pairs``. What the metric weighs is
    weighed once for all of them.
    """

    def __init__(
        self,
        weight: Float[Tensor, "out in"],
        bias: Float[Tensor, " out"] | None,
        pairs: Sequence[PairMoments],
        metric: OutputMetric,
    ) -> None:
        self._metric, self._weighed = metric, metric.weigh(weight)
        self._texts = [_Text.of(weight, bias, self._weighed, each, metric) for each in pairs]

    @property
    def energies(self) -> list[float]:
        """Return the targets' mean squares, by text."""
        return [each.energy for each in self._texts]

    def of(self, factors: LowRankFactors, rank: int) -> list[float]:
        """Return the errors at a rank, by text, as shares of the target's mean square."""
        like = self._weighed
        left, right = factors.left[:, :rank].to(like), factors.right[:rank].to(like)
        bias = factors.bias_at(rank)
        weighed = like - self._metric.weigh(left) @ right
        errors = []
        for text in self._texts:
            output = left @ (right @ text.moments.mean)
            plain = text.plain - left @ (right @ text.moments.covariance)
            mean = text.mean - (output if bias is None else output + bias.to(output))
            error = text.error(weighed, plain, mean, self._metric)
            errors.append(max(error, 0.0) / (text.energy if text.energy > 0 else 1.0))
        return errors


@dataclass(frozen=True)
class _Text:
    """What the errors on one text have in common."""

    moments: PairMoments
    mean: Float[Tensor, " out"]  # of the target
    plain: Float[Tensor, "out in"]  # W Cov(x)
    constant: float  # E[t^T G t] around the mean
    energy: float

    @classmethod
    def of(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        weighed: Tensor,
        moments: PairMoments,
        metric: OutputMetric,
    ) -> _Text:
        """Work it out for a dense layer, whose weight the metric has ``weighed``."""
        mean, plain = moments.mean_output(weight, bias), weight @ moments.covariance
        if moments.share is None:
            constant = metric.energy(moments.target_covariance)
        else:
            constant = float((weighed * (weight @ moments.target_covariance)).sum())
            constant *= moments.share**2
        text = cls(moments, mean, plain, constant, 0.0)
        return replace(text, energy=text.error(weighed, plain, mean, metric))

    def error(self, weighed: Tensor, plain: Tensor, mean: Tensor, metric: OutputMetric) -> float:
        """Return ``E[e^T G e]`` of ``e = M x + t``, from ``G M``, ``M Cov(x)`` and ``E[e]``."""
        of_mean = float(mean @ metric.weigh(mean[:, None])[:, 0])
        return float((weighed * (plain + 2 * self.moments.cross)).sum()) + self.constant + of_mean


def _cholesky(second: Tensor, ridge: float, name: str) -> Tensor:
    """Return the Cholesky root of ``S + lam I``, with announced jitter if it needs some."""
    # Not `linalg.psd_cholesky`, whose root is only multiplied with: this one is solved with, so
    # pivots of rounding alone are refused although they are positive, jitter starts higher, and
    # an input that is always 0 is no error.
    mean = float(second.diagonal().mean()) or 1.0
    lifted = second.clone()
    lifted.diagonal().add_(ridge * mean)
    added = 0.0
    for jitter in (0.0, *JITTERS):
        lifted.diagonal().add_((jitter - added) * mean)
        added = jitter
        lower: Tensor
        lower, failed = torch.linalg.cholesky_ex(lifted)
        if not int(failed) and _is_well_conditioned(lower):
            if jitter:
                warnings.warn(
                    f"{name}: the second moment of its input is singular at ridge={ridge:g}; "
                    f"added {jitter * mean:.3e}, {jitter:g} of its mean eigenvalue. Calibrate "
                    "the refit on more tokens or raise the ridge.",
                    JitterWarning,
                    stacklevel=3,
                )
            return lower
    raise StatisticsError(
        f"{name}: the second moment of its input is not positive definite even with "
        f"{added * mean:.3e} ({added:g} of its mean eigenvalue) added; raise the ridge ({ridge:g})."
    )


def _is_well_conditioned(lower: Tensor) -> bool:
    """Tell whether every pivot of a Cholesky root exceeds rounding."""
    pivots = lower.diagonal().square()
    floor = len(pivots) * torch.finfo(torch.float64).eps * pivots.max()
    return bool(pivots.min() > floor)
