"""Losses and gradients in chunks are those of torch's autograd on all logits at once."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lrbo.errors import NonFiniteError
from lrbo.recovery.divergence import (
    FullTeacher,
    TopTeacher,
    Weights,
    chunked_consistency,
    chunked_loss,
    hidden_distance,
)

ROWS, WIDTH, VOCABULARY = 11, 6, 17


def draw(*size: int, seed: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def head_of(seed: int, *, trained: bool) -> nn.Linear:
    head = nn.Linear(WIDTH, VOCABULARY)
    with torch.no_grad():
        head.weight.copy_(draw(VOCABULARY, WIDTH, seed=seed))
        head.bias.copy_(draw(VOCABULARY, seed=seed + 1))
    return head.requires_grad_(trained)


def targets() -> Tensor:
    return torch.randint(VOCABULARY, (ROWS,), generator=torch.Generator().manual_seed(9))


def gradients(loss: Tensor, hidden: Tensor, head: nn.Module) -> list[Tensor]:
    inputs = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    return [*torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize(
    "weights", [Weights(1.0, 0.1), Weights(0.0, 2.0), Weights(0.5, 0.0), Weights(1.0, 0.3, 2.5)]
)
def test_loss_and_gradients_are_those_of_autograd(
    trained: bool, chunk: int, weights: Weights
) -> None:
    hidden, dense = draw(ROWS, WIDTH, seed=1).requires_grad_(), draw(ROWS, WIDTH, seed=2)
    head, other = head_of(3, trained=trained), head_of(5, trained=False)
    teacher = FullTeacher(dense, other)
    loss = chunked_loss(hidden, head, targets(), teacher, weights, chunk)

    logits, wanted = head(hidden), other(dense)
    t = weights.temperature
    kl = functional.kl_div(
        (logits / t).log_softmax(-1), (wanted / t).softmax(-1), reduction="batchmean"
    )
    nll = functional.cross_entropy(logits, targets())
    expected = weights.kl * t**2 * kl + weights.ce * nll
    torch.testing.assert_close(loss.total, expected)
    assert loss.nll == pytest.approx(nll.item(), rel=1e-5)
    if weights.kl:
        assert loss.kl == pytest.approx(t**2 * kl.item(), rel=1e-4)
    pairs = zip(
        gradients(3 * loss.total, hidden, head), gradients(3 * expected, hidden, head), strict=True
    )
    for actual, reference in pairs:
        torch.testing.assert_close(actual, reference, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("top", [1, 5, VOCABULARY - 1])
def test_the_rest_of_the_tokens_counts_as_one(top: int) -> None:
    hidden, head = draw(ROWS, WIDTH, seed=1).requires_grad_(), head_of(3, trained=False)
    log_p = head_of(5, trained=False)(draw(ROWS, WIDTH, seed=2)).log_softmax(-1)
    best = log_p.topk(top)
    log_rest = (1 - best.values.exp().sum(-1)).log()
    teacher = TopTeacher(best.indices, best.values, log_rest)
    loss = chunked_loss(hidden, head, targets(), teacher, Weights(1.0, 0.0), 4)

    log_q = head(hidden).double().log_softmax(-1)
    own = log_q.gather(1, best.indices)
    others = (1 - own.exp().sum(-1)).log()
    inside = (best.values.exp() * (best.values - own)).sum(-1)
    expected = (inside + log_rest.exp() * (log_rest - others)).mean().float()
    torch.testing.assert_close(loss.total, expected, rtol=1e-4, atol=1e-5)
    (actual,) = torch.autograd.grad(loss.total, hidden)
    (reference,) = torch.autograd.grad(expected, hidden)
    torch.testing.assert_close(actual, reference, rtol=1e-4, atol=1e-6)


def test_of_all_tokens_the_coarse_divergence_is_the_full_one() -> None:
    hidden, head = draw(ROWS, WIDTH, seed=1).requires_grad_(), head_of(3, trained=False)
    dense, other = draw(ROWS, WIDTH, seed=2), head_of(5, trained=False)
    best = other(dense).log_softmax(-1).topk(VOCABULARY)
    nothing = torch.full((ROWS,), -torch.inf)
    teachers = (FullTeacher(dense, other), TopTeacher(best.indices, best.values, nothing))
    losses = [
        chunked_loss(hidden, head, targets(), each, Weights(1.0, 0.1)).total for each in teachers
    ]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(each, hidden) for each in losses))


def test_a_loss_that_is_not_finite_is_counted() -> None:
    hidden = draw(ROWS, WIDTH, seed=1)
    hidden[3:5] = torch.nan
    with pytest.raises(NonFiniteError, match="the loss of 2 of 11 tokens is not finite"):
        chunked_loss(hidden, head_of(3, trained=False), targets(), None, Weights(0.0, 1.0))


def test_the_distance_of_hidden_states_is_a_share_that_scale_does_not_change() -> None:
    dense = [draw(2, 3, WIDTH, seed=seed) for seed in (1, 2)]
    states = [each * torch.tensor([1.1, 1.0, 0.9])[:, None] for each in dense]
    expected = (0.01 + 0.0 + 0.01) / 3
    assert float(hidden_distance(states, dense)) == pytest.approx(expected, rel=1e-4)
    louder = [[1000 * each for each in side] for side in (states, dense)]
    assert float(hidden_distance(*louder)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("chunk", [3, 100])
def test_consistency_and_its_gradients_are_those_of_both_passes_written_out(chunk: int) -> None:
    head = head_of(0, trained=True)
    states = [draw(7, WIDTH, seed=seed) for seed in (0, 1)]
    leaves = [each.clone().requires_grad_() for each in states]
    total = chunked_consistency(leaves[0], leaves[1], head, chunk)
    (3 * total).backward()
    actual = [each.grad for each in (*leaves, *head.parameters())]
    head.zero_grad()
    twins = [each.clone().requires_grad_() for each in states]
    log_p, log_q = (head(each).log_softmax(-1) for each in twins)
    both = [
        functional.kl_div(q, p, log_target=True, reduction="batchmean")
        for p, q in ((log_p, log_q), (log_q, log_p))
    ]
    expected = torch.stack(both).mean()
    (3 * expected).backward()
    torch.testing.assert_close(total, expected)
    for own, twin in zip(actual, (*twins, *head.parameters()), strict=True):
        torch.testing.assert_close(own, twin.grad)
    assert float(chunked_consistency(states[0], states[0], head).detach()) == 0
    with pytest.raises(NonFiniteError, match="the consistency of 1 of 7 tokens"):
        chunked_consistency(states[0].index_fill(0, torch.tensor(2), torch.inf), states[1], head)
