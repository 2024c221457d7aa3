"""Reduced-rank regression of a layer whose inputs drifted from those of the dense model."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

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
class ResidualMoments:
    """Moments of ``e``: what the residual stream lacks where a layer's answer is added to it.

    Attributes:
        mean: ``(out,)``, float64, as all that follows.
        cross: ``(out, in)``, ``E[(e - mean)(x - mean)^T]`` with the layer's input.
        drift_cross: ``(out, in)``, the same with the input's drift.
        covariance: ``(out, out)``.
    """

    mean: Float[Tensor, " out"]
    cross: Float[Tensor, "out in"]
    drift_cross: Float[Tensor, "out in"]
    covariance: Float[Tensor, "out out"]


@dataclass(frozen=True)
class DriftMoments:
    """Moments of an input ``x`` of the compressed model and of its drift ``d = x_dense - x``.

    The drift, not the dense input, is what is multiplied: where nothing upstream is compressed
    it is exactly nothing, and elsewhere the small difference of two large moments is not taken.

    Attributes:
        tokens: Vectors seen.
        mean: ``(in,)``, of the input; float64, as all that follows.
        drift_mean: ``(in,)``, of the drift.
        covariance: ``(in, in)``, of the input around its mean.
        cross: ``(in, in)``, ``E[(d - mean)(x - mean)^T]``.
        drift: ``(in, in)``, covariance of the drift.
        residual: Of the residual stream, where the layer adds to it; else ``None``.
    """

    tokens: int
    mean: Float[Tensor, " in"]
    drift_mean: Float[Tensor, " in"]
    covariance: Float[Tensor, "in in"]
    cross: Float[Tensor, "in in"]
    drift: Float[Tensor, "in in"]
    residual: ResidualMoments | None = None

    @classmethod
    def of(cls, moments: Moments, size: int) -> DriftMoments:
        """Cut the moments of stacked vectors into their parts.

        Args:
            moments: Of ``(x, d)``, ``(2 in,)``, or of ``(x, d, e)``, ``(2 in + out,)``.
            size: ``in``.
        """
        upper = moments.upper / max(moments.tokens, 1)
        x, d, e = slice(size), slice(size, 2 * size), slice(2 * size, None)
        residual = ResidualMoments(
            moments.mean[e],
            upper[x, e].T.contiguous(),
            upper[d, e].T.contiguous(),
            mirror_upper(upper[e, e]),
        )
        return cls(
            moments.tokens,
            moments.mean[x],
            moments.mean[d],
            mirror_upper(upper[x, x]),
            upper[x, d].T.contiguous(),
            mirror_upper(upper[d, d]),
            residual if len(residual.mean) else None,
        )

    def second(self, *, means: bool) -> Float[Tensor, "in in"]:
        """Return ``E[x x^T]``, around the means or around zero."""
        return self.covariance if means else self.covariance + self.mean.outer(self.mean)


class OutputMetric:
    """Weighs output errors: ``e -> e^T G e`` in nats, or their plain square without ``G``.

    Args:
        matrix: ``G``, ``(out, out)``, symmetric positive semi-definite, or ``None``.
        name: The layer, for messages.

    Raises:
        StatisticsError: If the matrix is not finite.
    """

    def __init__(self, matrix: Float[Tensor, "out out"] | None, name: str = "layer") -> None:
        self._matrix: Tensor | None = None
        self._lower: Tensor | None = None
        self._inverse: Tensor | None = None
        if matrix is None:
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


@dataclass(frozen=True)
class Target:
    """What a refit layer should answer: ``y = W (x + blend d) + b + feedback e``.

    Attributes:
        weight: ``(out, in)``, ``W``, the dense weight, float64.
        bias: ``(out,)``, ``b``, float64, or ``None``.
        blend: Share of the dense model's input: 1 asks for what the dense layer answered in the
            dense model, 0 for what it would answer here.
        feedback: Share of what the residual stream lacks so far that a layer which adds to it is
            asked to bring; nothing where the moments hold nothing of it.
    """

    weight: Float[Tensor, "out in"]
    bias: Float[Tensor, " out"] | None
    blend: float
    feedback: float = 0.0

    def mean(self, moments: DriftMoments) -> Float[Tensor, " out"]:
        """Return the mean answer, ``(out,)``."""
        found = self.weight @ (moments.mean + self.blend * moments.drift_mean)
        if moments.residual is not None:
            found = found + self.feedback * moments.residual.mean
        return found if self.bias is None else found + self.bias

    def beyond(self, moments: DriftMoments, *, means: bool) -> Float[Tensor, "out in"]:
        """Return ``E[t x^T]`` of ``t = y - W x - b``, around the means or around zero."""
        found = self.blend * (self.weight @ moments.cross)
        if moments.residual is not None:
            found += self.feedback * moments.residual.cross
        if means:
            return found
        mean = self.blend * (self.weight @ moments.drift_mean)
        if moments.residual is not None:
            mean += self.feedback * moments.residual.mean
        return found + mean.outer(moments.mean)

    def beyond_energy(self, moments: DriftMoments, metric: OutputMetric) -> float:
        """Return ``E[t^T G t]`` of ``t = y - W x - b``, around its mean."""
        weighed = metric.weigh(self.weight)
        found = self.blend**2 * float((weighed * (self.weight @ moments.drift)).sum())
        if (residual := moments.residual) is not None:
            both = float((weighed * residual.drift_cross).sum())
            found += 2 * self.blend * self.feedback * both
            found += self.feedback**2 * float(metric.weigh(residual.covariance).trace())
        return found


def solve(
    target: Target,
    moments: DriftMoments,
    rank: int,
    *,
    ridge: float,
    metric: OutputMetric | None = None,
    restore_means: bool = False,
    name: str = "layer",
) -> LowRankFactors:
    r"""Solve for the low-rank layer that comes closest to its target.

    With ``S = E[x x^T]``, ``T = E[t x^T]``, where ``t = blend W d + feedback e`` is what the
    target asks for beyond the dense layer's answer, and ``lam = ridge * trace(S) / in`` the best
    layer of full rank, drawn towards the dense weight by ``lam ||X - W||^2``, is

        W_ols = W + T (S + lam I)^-1,

    and of all ``X`` of rank ``r`` the one with the least
    ``tr(G (W_ols - X)(S + lam I)(W_ols - X)^T)`` is ``A^+ SVD_r(A W_ols B) B^-1`` with
    ``A^T A = G`` and ``B B^T = S + lam I`` (reduced-rank regression: Izenman, 1975).

    Args:
        target: The answers to come close to.
        moments: Of the inputs and their drift.
        rank: Of the layer.
        ridge: Pull towards the dense weight, as a share of the mean eigenvalue of ``S``.
        metric: Of the outputs; plain squares by default.
        restore_means: Whether to solve around the means and give the layer the bias that
            restores the mean answer. Else the dense bias stays.
        name: The layer, for messages.

    Returns:
        Factors of exactly this rank, float64, scaled so that both sides of a direction have
        the same length. The error of a rank is the objective above: what no rank mends (the
        part of the target that is not linear in ``x``) is not in it.

    Raises:
        StatisticsError: If ``S`` stays singular with the largest jitter.
    """
    metric = OutputMetric(None) if metric is None else metric
    lower = _cholesky(moments.second(means=restore_means), ridge, name)
    step = torch.cholesky_solve(target.beyond(moments, means=restore_means).T, lower).T
    product = metric.enter((target.weight + step) @ lower)
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
        target.mean(moments) if restore_means else target.bias,
        moments.mean if restore_means else None,
    )


class OutputError:
    """Mean squared output error of layers against one target, from moments alone.

    Args:
        target: The answers to compare with.
        moments: Of the inputs that count, with their drift.
        metric: Of the outputs.
    """

    def __init__(self, target: Target, moments: DriftMoments, metric: OutputMetric) -> None:
        self._target, self._moments, self._metric = target, moments, metric
        self._mean = target.mean(moments)
        self._weighed = metric.weigh(target.weight)
        self._plain = target.weight @ moments.covariance
        self._cross = 2 * target.beyond(moments, means=True)
        self._beyond = target.beyond_energy(moments, metric)
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
