"""Reduced-rank regression of a layer whose inputs drifted from those of the dense model."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from lrbo.calibration.moments import Moments
from lrbo.errors import StatisticsError
from lrbo.factorization.weighted import balanced
from lrbo.linalg import JitterWarning, mirror_upper, psd_root, require_finite
from lrbo.nested import LowRankFactors

# Added to a second moment that is not positive definite, as shares of its mean eigenvalue.
JITTERS = (1e-10, 1e-8, 1e-6, 1e-4)


@dataclass(frozen=True)
class PairMoments:
    """Moments of an input ``x`` of the compressed model and of a vector ``t`` beside it.

    ``t`` is what a layer is asked for beyond its dense answer ``W x + b``, or what that is a
    linear map of (:meth:`mapped`): the drift ``d = x_dense - x`` of the input. The drift, not the
    dense input, is what is multiplied: where nothing upstream is compressed it is exactly
    nothing, and elsewhere the small difference of two large moments is not taken.

    Attributes:
        tokens: Vectors seen.
        mean: ``(in,)``, of the input; float64, as all that follows.
        beside_mean: ``(k,)``, of ``t``.
        covariance: ``(in, in)``, of the input around its mean.
        cross: ``(k, in)``, ``E[(t - mean)(x - mean)^T]``.
        beside: ``(k, k)``, covariance of ``t``.
    """

    tokens: int
    mean: Float[Tensor, " in"]
    beside_mean: Float[Tensor, " k"]
    covariance: Float[Tensor, "in in"]
    cross: Float[Tensor, "k in"]
    beside: Float[Tensor, "k k"]

    @classmethod
    def of(cls, moments: Moments, size: int) -> PairMoments:
        """Cut the moments of stacked vectors into their parts.

        Args:
            moments: Of ``(x, t)``, ``(in + k,)``.
            size: ``in``.
        """
        upper = moments.upper / max(moments.tokens, 1)
        return cls(
            moments.tokens,
            moments.mean[:size],
            moments.mean[size:],
            mirror_upper(upper[:size, :size]),
            upper[:size, size:].T.contiguous(),
            mirror_upper(upper[size:, size:]),
        )

    def mapped(self, matrix: Float[Tensor, "out k"]) -> PairMoments:
        """Return the moments of ``x`` and ``M t``."""
        return replace(
            self,
            beside_mean=matrix @ self.beside_mean,
            cross=matrix @ self.cross,
            beside=matrix @ self.beside @ matrix.T,
        )

    def second(self, *, means: bool) -> Float[Tensor, "in in"]:
        """Return ``E[x x^T]``, around the means or around zero."""
        return self.covariance if means else self.covariance + self.mean.outer(self.mean)

    def beyond(self, *, means: bool) -> Float[Tensor, "k in"]:
        """Return ``E[t x^T]``, around the means or around zero."""
        return self.cross if means else self.cross + self.beside_mean.outer(self.mean)


class OutputMetric:
    """Weighs output errors: ``e -> e^T G e`` in nats, or their plain square without ``G``.

    Args:
        matrix: ``G``, ``(out, out)``, symmetric positive semi-definite, or ``None``. One that is
            zero throughout says of no output that it counts more, and is taken for ``None``.
        name: The layer, for messages.

    Raises:
        StatisticsError: If the matrix is not finite.
    """

    def __init__(self, matrix: Float[Tensor, "out out"] | None, name: str = "layer") -> None:
        self._matrix: Tensor | None = None
        self._lower: Tensor | None = None
        self._inverse: Tensor | None = None
        if matrix is None or not bool(matrix.any()):
            return
        require_finite(f"{name}: output metric", matrix)
        double = matrix.to(torch.float64)
        self._matrix = (double + double.T) / 2
        lower, failed = torch.linalg.cholesky_ex(self._matrix)
        if int(failed) or not _is_well_founded(lower):  # some outputs do not count: no inverse
            root, inverse = psd_root(self._matrix, f"{name}: output metric")
            self._lower, self._inverse = root, inverse.T
        else:
            self._lower = lower

    def weigh(self, matrix: Float[Tensor, "out c"]) -> Float[Tensor, "out c"]:
        """Return ``G M``."""
        return matrix if self._matrix is None else self._matrix @ matrix

    def energy(self, covariance: Float[Tensor, "out out"]) -> float:
        """Return ``E[e^T G e]`` of outputs with this second moment."""
        if self._matrix is None:
            return float(covariance.trace())
        return float((self._matrix * covariance).sum())

    def enter(self, matrix: Float[Tensor, "out c"]) -> Float[Tensor, "k c"]:
        """Return ``A M`` where ``A^T A = G``, so that errors are plain squares."""
        return matrix if self._lower is None else self._lower.T @ matrix

    def leave(self, matrix: Float[Tensor, "k c"]) -> Float[Tensor, "out c"]:
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

    Args:
        weight: ``W``, ``(out, in)``, of the dense layer, float64.
        bias: ``b``, ``(out,)``, float64, or ``None``.
        moments: Of the inputs and of what is asked for beyond the dense layer's answer.
        rank: Of the layer.
        ridge: Pull towards the dense weight, as a share of the mean eigenvalue of ``S``.
        metric: Of the outputs; plain squares by default.
        restore_means: Whether to solve around the means and give the layer the bias that
            restores the mean answer. Else the dense bias stays.
        name: The layer, for messages.

    Returns:
        Factors of exactly this rank, float64, scaled so that both sides of a direction have
        the same length. The error of a rank is the objective above: what no rank mends (the
        part of ``t`` that is not linear in ``x``) is not in it.

    Raises:
        StatisticsError: If ``S`` stays singular with the largest jitter.
    """
    metric = OutputMetric(None) if metric is None else metric
    lower = _cholesky(moments.second(means=restore_means), ridge, name)
    step = torch.cholesky_solve(moments.beyond(means=restore_means).T, lower).T
    product = metric.enter((weight + step) @ lower)
    # Eigenvectors of the smaller Gram matrix, not an SVD: forty times as fast for a wide layer,
    # and less exact only for directions 1e-8 below the first, which no chosen rank reaches.
    if product.shape[0] <= product.shape[1]:
        energy, vectors = torch.linalg.eigh(product @ product.T)
        left = vectors.flip(-1)[:, :rank]
        right = left.T @ product
    else:
        energy, vectors = torch.linalg.eigh(product.T @ product)
        right = vectors.flip(-1)[:, :rank].T
        left = product @ right.T
    left = metric.leave(left)
    right = torch.linalg.solve_triangular(lower, right, upper=False, left=False)
    missing = rank - right.shape[0]  # a metric that counts fewer outputs than the rank
    if missing > 0:
        left = torch.cat([left, left.new_zeros(len(left), missing)], 1)
        right = torch.cat([right, right.new_zeros(missing, right.shape[1])])
    left, right = balanced(left, right)
    tail = energy.clamp_min(0.0).cumsum(0).flip(0)  # eigh sorts ascending
    tail = torch.cat([tail, tail.new_zeros(max(rank + 1 - len(tail), 1))])[: rank + 1]
    return LowRankFactors(
        left,
        right,
        tail,
        _mean_answer(weight, bias, moments) if restore_means else bias,
        moments.mean if restore_means else None,
    )


def _mean_answer(
    weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None, moments: PairMoments
) -> Float[Tensor, " out"]:
    """Return the mean of ``W x + b + t``."""
    found = weight @ moments.mean + moments.beside_mean
    return found if bias is None else found + bias


class OutputError:
    """Mean squared output error of layers that should answer ``W x + b + t``, from moments alone.

    Args:
        weight: ``W``, ``(out, in)``, float64.
        bias: ``b``, ``(out,)``, float64, or ``None``.
        moments: Of the inputs that count, and of what is asked for beyond the dense answer.
        metric: Of the outputs.
    """

    def __init__(
        self,
        weight: Float[Tensor, "out in"],
        bias: Float[Tensor, " out"] | None,
        moments: PairMoments,
        metric: OutputMetric,
    ) -> None:
        self._moments, self._metric = moments, metric
        self._mean = _mean_answer(weight, bias, moments)
        self._weighed = metric.weigh(weight)
        self._plain = weight @ moments.covariance
        self._cross = 2 * moments.cross
        self._beyond = metric.energy(moments.beside)
        spread = float((self._weighed * (self._plain + self._cross)).sum())
        self.energy = spread + self._beyond + self._of_mean(self._mean)

    def of(self, factors: LowRankFactors, rank: int) -> float:
        """Return the error at a rank as a share of the target's mean square."""
        left, right = (
            part.to(self._plain) for part in (factors.left[:, :rank], factors.right[:rank])
        )
        weighed = self._weighed - self._metric.weigh(left) @ right
        spread = self._plain - left @ (right @ self._moments.covariance) + self._cross
        answer = left @ (right @ self._moments.mean)
        bias = factors.bias_at(rank)
        answer = answer if bias is None else answer + bias.to(answer)
        error = float((weighed * spread).sum()) + self._beyond + self._of_mean(self._mean - answer)
        return max(error, 0.0) / (self.energy if self.energy > 0 else 1.0)

    def _of_mean(self, vector: Tensor) -> float:
        """Return the metric of one vector."""
        return float(vector @ self._metric.weigh(vector[:, None])[:, 0])


def _cholesky(second: Tensor, ridge: float, name: str) -> Tensor:
    """Return the Cholesky root of ``S + lam I``, with announced jitter if it needs some."""
    # Not `linalg.psd_cholesky`, whose root is only multiplied with: this one is solved with, so
    # pivots that are rounding alone are refused although they are positive, jitter starts
    # higher, and an input that is always 0 is no error.
    mean = float(second.diagonal().mean()) or 1.0  # an input that is always 0 weighs nothing
    lifted = second.clone()
    lifted.diagonal().add_(ridge * mean)
    added = 0.0
    lower: Tensor
    for jitter in (0.0, *JITTERS):
        lifted.diagonal().add_((jitter - added) * mean)
        added = jitter
        lower, failed = torch.linalg.cholesky_ex(lifted)
        if not int(failed) and _is_well_founded(lower):
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


def _is_well_founded(lower: Tensor) -> bool:
    """Return whether no pivot of a Cholesky root is rounding alone."""
    pivots = lower.diagonal().square()
    floor = len(pivots) * torch.finfo(torch.float64).eps * pivots.max()
    return bool(pivots.min() > floor)
