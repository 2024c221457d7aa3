"""The closed form of a refit against least squares, alternating minimisation and loops."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from lrbo.calibration.moments import Moments
from lrbo.errors import StatisticsError
from lrbo.factorization.factors import LowRankFactors
from lrbo.linalg import JitterWarning
from lrbo.refit.regression import OutputErrors, OutputMetric, PairMoments, solve

OUT, IN, TOKENS = 5, 7, 60
EXACT = 1e-9  # everything is float64; the systems have condition numbers of a few hundred

shapes = pytest.mark.parametrize(("out", "size"), [(5, 7), (7, 5), (6, 6)])


@dataclass(frozen=True)
class Target:
    """A dense layer, and the shares of drift and feedback in what its low-rank form should say."""

    weight: torch.Tensor
    bias: torch.Tensor
    blend: float
    feedback: float = 0.0

    @property
    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.weight, self.bias


def case(out: int = OUT, size: int = IN, blend: float = 0.7, tokens: int = TOKENS):
    """Draw a layer, its inputs in both models, and a metric of its outputs."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = draw(tokens, size) @ draw(size, size) + 2 * draw(size)
    dense = x + 0.4 * draw(tokens, size) + 0.3 * x.tanh() + 0.5
    root = draw(out, out)
    metric = root @ root.T + 0.1 * torch.eye(out)
    return Target(draw(out, size), draw(out), blend), x, dense, metric


def stream(x: torch.Tensor, beside: torch.Tensor) -> PairMoments:
    """Stream the rows in uneven pieces."""
    together = torch.cat([x, beside], 1)
    moments = Moments(together.shape[1])
    for rows in together.tensor_split([3, 20]):
        moments.update(rows)
    return PairMoments.of(moments, x.shape[1])


def pair_moments(
    target: Target, x: torch.Tensor, dense: torch.Tensor, lacks: torch.Tensor | None = None
) -> PairMoments:
    """Gather what is asked for beyond the dense answer: from the drift, or token by token."""
    if lacks is None:
        return stream(x, dense - x).mapped(target.weight, target.blend)
    return stream(x, target.blend * (dense - x) @ target.weight.T + target.feedback * lacks)


def lacking(x: torch.Tensor, dense: torch.Tensor, out: int) -> torch.Tensor:
    """Draw what the residual stream lacks; its mean is not 0 and it depends on the inputs."""
    generator = torch.Generator().manual_seed(7)
    mix = torch.randn(2 * x.shape[1], out, generator=generator, dtype=torch.float64)
    noise = torch.randn(len(x), out, generator=generator, dtype=torch.float64)
    return 0.1 * torch.cat([x, dense - x], 1).tanh() @ mix + 0.2 * noise + 0.3


def answers(
    target: Target, x: torch.Tensor, dense: torch.Tensor, lacks: torch.Tensor | float = 0.0
) -> torch.Tensor:
    """``W (beta x_f + (1 - beta) x) + b``, as the papers write it, and the feedback."""
    assert target.bias is not None
    plain = (target.blend * dense + (1 - target.blend) * x) @ target.weight.T + target.bias
    return plain + target.feedback * lacks


def matrix(factors: LowRankFactors) -> torch.Tensor:
    return factors.left @ factors.right


def weighed(metric: torch.Tensor, error: torch.Tensor) -> float:
    return float(((error @ metric) * error).sum()) / len(error)


def test_moments_are_those_of_the_rows() -> None:
    target, x, dense, _ = case()
    for beside, moments in (
        (dense - x, stream(x, dense - x)),
        (0.7 * (dense - x) @ target.weight.T, stream(x, dense - x).mapped(target.weight, 0.7)),
    ):
        both = torch.cov(torch.cat([x, beside], 1).T, correction=0)
        torch.testing.assert_close(moments.mean, x.mean(0))
        torch.testing.assert_close(moments.target_mean, beside.mean(0))
        torch.testing.assert_close(moments.covariance, both[:IN, :IN])
        torch.testing.assert_close(moments.cross, both[IN:, :IN])
        beside = dense - x if moments.share else beside
        expected = torch.cov(beside.T, correction=0)
        torch.testing.assert_close(moments.target_covariance, expected)


@shapes
@pytest.mark.parametrize(("blend", "feedback"), [(0.0, 0.0), (0.3, 0.0), (1.0, 0.0), (0.5, 0.8)])
def test_at_full_rank_without_ridge_it_is_least_squares(
    out: int, size: int, blend: float, feedback: float
) -> None:
    target, x, dense, metric = case(out, size, blend)
    target, lacks = replace(target, feedback=feedback), lacking(x, dense, out)
    y, moments = answers(target, x, dense, lacks), pair_moments(target, x, dense, lacks)
    for weight in (None, metric):
        options = {"ridge": 0.0, "metric": OutputMetric(weight)}
        plain = solve(*target.dense, moments, min(out, size), **options)
        expected = np.linalg.lstsq(x.numpy(), (y - target.bias).numpy(), rcond=None)[0].T
        if out <= size:
            np.testing.assert_allclose(matrix(plain), expected, atol=EXACT)
        assert plain.offset is target.bias
        assert plain.center is None
        # Around the means: least squares with an intercept.
        centred = solve(*target.dense, moments, min(out, size), restore_means=True, **options)
        ones = np.hstack([x.numpy(), np.ones((TOKENS, 1))])
        expected = np.linalg.lstsq(ones, y.numpy(), rcond=None)[0].T
        np.testing.assert_allclose(matrix(centred), expected[:, :-1], atol=EXACT)
        np.testing.assert_allclose(centred.bias_at(min(out, size)), expected[:, -1], atol=EXACT)


def alternating_minimum(
    x: np.ndarray, y: np.ndarray, metric: np.ndarray, rank: int, rounds: int = 3000
) -> np.ndarray:
    """Least squares for one factor and then for the other, until nothing moves."""
    root = np.linalg.cholesky(metric).T
    right = np.random.default_rng(1).normal(size=(rank, x.shape[1]))
    for _ in range(rounds):
        left = np.linalg.lstsq(x @ right.T, y, rcond=None)[0].T
        weighted = root @ left  # ||root (y - left right x)||: the normal equations of `right`
        right = np.linalg.solve(weighted.T @ weighted, weighted.T @ root @ y.T @ x)
        right = np.linalg.solve(x.T @ x, right.T).T
    return left @ right


@shapes
@pytest.mark.parametrize("ridge", [0.0, 0.2])
def test_no_other_factors_of_the_rank_are_better(out: int, size: int, ridge: float) -> None:
    """The ridge is what rows ``sqrt(n lam) I`` with answers ``W`` add to least squares."""
    target, x, dense, metric = case(out, size)
    y = answers(target, x, dense) - target.bias
    factors = solve(
        *target.dense, pair_moments(target, x, dense), 2, ridge=ridge, metric=OutputMetric(metric)
    )
    extra = float(TOKENS * ridge * (x.T @ x / TOKENS).trace() / size) ** 0.5
    rows = np.vstack([x.numpy(), extra * np.eye(size)])
    wanted = np.vstack([y.numpy(), extra * target.weight.numpy().T])

    def objective(candidate: np.ndarray) -> float:
        error = wanted - rows @ candidate.T
        return float(((error @ metric.numpy()) * error).sum())

    best = matrix(factors).numpy()
    other = alternating_minimum(rows, wanted, metric.numpy(), 2)
    np.testing.assert_allclose(best, other, atol=1e-6)  # where 3,000 rounds have come to
    assert objective(best) <= objective(other) + EXACT
    generator = torch.Generator().manual_seed(3)
    for scale in (1e-3, 1e-2, 0.1, 1.0) * 10:
        left = factors.left + scale * torch.randn(factors.left.shape, generator=generator)
        right = factors.right + scale * torch.randn(factors.right.shape, generator=generator)
        assert objective((left @ right).numpy()) > objective(best)


@shapes
def test_the_tail_is_the_objective_and_prefixes_are_optimal(out: int, size: int) -> None:
    target, x, dense, metric = case(out, size)
    moments = pair_moments(target, x, dense)
    options = {"ridge": 0.1, "metric": OutputMetric(metric), "restore_means": True}
    whole = solve(*target.dense, moments, min(out, size), **options)
    eye = torch.eye(size, dtype=torch.float64)
    lifted = moments.covariance + 0.1 * moments.covariance.trace() / size * eye
    for rank in range(min(out, size) + 1):
        factors = solve(*target.dense, moments, rank, **options)
        assert factors.max_rank == rank
        assert len(factors.tail) == rank + 1
        miss = matrix(whole) - matrix(factors)
        objective = float((metric * (miss @ lifted @ miss.T)).sum())
        assert float(factors.tail[rank]) == pytest.approx(objective, abs=EXACT)
        prefix = whole.left[:, :rank] @ whole.right[:rank]
        torch.testing.assert_close(matrix(factors), prefix, rtol=0, atol=EXACT)
        torch.testing.assert_close(factors.left.norm(dim=0), factors.right.norm(dim=1))


def test_a_strong_ridge_gives_the_dense_weight_back() -> None:
    target, x, dense, _ = case(blend=1.0)
    factors = solve(*target.dense, pair_moments(target, x, dense), OUT, ridge=1e9)
    torch.testing.assert_close(matrix(factors), target.weight, rtol=0, atol=1e-6)


def test_without_drift_the_full_rank_answer_is_the_dense_weight() -> None:
    target, x, _, _ = case()
    few = pair_moments(target, x[:3], x[:3])  # even where the data say next to nothing
    factors = solve(*target.dense, few, OUT, ridge=1e-3)
    torch.testing.assert_close(matrix(factors), target.weight, rtol=0, atol=EXACT)


def test_outputs_that_do_not_count_are_not_paid_for() -> None:
    target, x, dense, _ = case()
    moments = pair_moments(target, x, dense)
    metric = torch.zeros(OUT, OUT, dtype=torch.float64)
    metric[:2, :2] = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    factors = solve(*target.dense, moments, 4, ridge=0.0, metric=OutputMetric(metric))
    assert factors.max_rank == 4  # the rank that was asked for, padded
    y = answers(target, x, dense) - target.bias
    expected = np.linalg.lstsq(x.numpy(), y.numpy(), rcond=None)[0].T
    np.testing.assert_allclose(matrix(factors)[:2], expected[:2], atol=EXACT)
    assert not matrix(factors)[2:].any()


@pytest.mark.parametrize("feedback", [None, 0.0, 0.8])
@pytest.mark.parametrize("with_metric", [False, True])
def test_the_errors_from_moments_are_the_errors_over_tokens(
    with_metric: bool, feedback: float | None
) -> None:
    """Of two texts, and of targets from the drift alone or token by token."""
    target, x, dense, metric = case()
    target = replace(target, feedback=feedback or 0.0)
    weight = metric if with_metric else torch.eye(OUT, dtype=torch.float64)
    texts, pairs = [], []
    for rows, dense_rows in ((x, dense), (x[::3] + 1, dense[::3])):
        lacks = None if feedback is None else lacking(rows, dense_rows, OUT)
        pairs.append(pair_moments(target, rows, dense_rows, lacks))
        texts.append((rows, answers(target, rows, dense_rows, 0.0 if lacks is None else lacks)))
    errors = OutputErrors(*target.dense, pairs, OutputMetric(metric if with_metric else None))
    energies = [weighed(weight, y) for _, y in texts]
    assert errors.energies == pytest.approx(energies)
    left, right = target.weight[:, :3], torch.eye(IN, dtype=torch.float64)[:3]
    y = texts[0][1]
    for offset, center in ((None, None), (y.mean(0), None), (y.mean(0), x.mean(0))):
        factors = LowRankFactors(left, right, torch.zeros(4), offset, center)
        for rank in (0, 1, 3):
            with torch.no_grad():
                misses = [y - factors.at_rank(rank)(rows) for rows, y in texts]
            pairs_of = zip(misses, energies, strict=True)
            expected = [weighed(weight, miss) / energy for miss, energy in pairs_of]
            assert errors.of(factors, rank) == pytest.approx(expected)


def test_a_singular_second_moment_is_announced() -> None:
    target, x, dense, _ = case()
    moments = pair_moments(target, x[:4], dense[:4])
    with pytest.warns(JitterWarning, match=r"q: the second moment .* singular at ridge=0; added"):
        factors = solve(*target.dense, moments, 2, ridge=0.0, name="q")
    assert matrix(factors).isfinite().all()
    solve(*target.dense, moments, 2, ridge=1e-3)  # a ridge says nothing: warnings are errors here


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_a_feature_without_variance_is_announced_and_keeps_the_dense_weight(value: float) -> None:
    """Around the means it says nothing of its column, which a ridge leaves where it is."""
    target, x, dense, _ = case()
    x[:, 2] = dense[:, 2] = value
    moments = pair_moments(target, x, dense)
    with pytest.warns(JitterWarning, match=r"^q: the second moment .* singular at ridge=0; added"):
        solve(*target.dense, moments, 2, ridge=0.0, restore_means=True, name="q")
    factors = solve(*target.dense, moments, OUT, ridge=1e-3, restore_means=True)
    torch.testing.assert_close(matrix(factors)[:, 2], target.weight[:, 2], rtol=0, atol=EXACT)


def test_a_second_moment_that_no_jitter_mends_is_refused() -> None:
    target, x, dense, _ = case()
    moments = pair_moments(target, x, dense)
    moments.covariance.diagonal().copy_(torch.tensor([-5.0, *[1.0] * (IN - 1)]))
    with pytest.raises(StatisticsError, match=r"q: .*not positive definite even with"):
        solve(*target.dense, moments, 2, ridge=0.0, restore_means=True, name="q")


def test_an_input_that_is_always_zero_leaves_the_weight_alone() -> None:
    target, x, _, _ = case()
    moments = pair_moments(target, 0 * x, 0 * x)
    factors = solve(*target.dense, moments, OUT, ridge=1e-2)
    torch.testing.assert_close(matrix(factors), target.weight, rtol=0, atol=EXACT)
    errors = OutputErrors(target.weight, None, [moments], OutputMetric(None))
    # The bias is all that is answered, where 0 is asked for.
    assert errors.of(factors, OUT) == pytest.approx([float(target.bias @ target.bias)])


def test_a_metric_that_is_zero_throughout_weighs_all_outputs_alike() -> None:
    """Gradients of a layer without effect: its factors stay those of plain squares, not zeros."""
    target, x, dense, _ = case()
    moments = pair_moments(target, x, dense)
    zero = OutputMetric(torch.zeros(OUT, OUT, dtype=torch.float64))
    factors, plain = (
        solve(*target.dense, moments, 2, ridge=0.1, metric=metric)
        for metric in (zero, OutputMetric(None))
    )
    assert torch.equal(factors.left, plain.left)
    assert torch.equal(factors.right, plain.right)


def test_a_metric_with_a_nan_is_refused() -> None:
    metric = torch.eye(3)
    metric[0, 1] = torch.nan
    with pytest.raises(StatisticsError, match=r"k: output metric holds 1 non-finite"):
        OutputMetric(metric, "k")
