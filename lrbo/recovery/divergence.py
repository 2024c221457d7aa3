"""Divergence from the dense model's distributions, with gradients in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lrbo.errors import NonFiniteError
from lrbo.layers.tables import TiedHead
from lrbo.tasks.perplexity import DenseReference


@dataclass(frozen=True)
class Weights:
    """What the parts of a loss count: ``kl T^2 KL + ce nll``, per token."""

    kl: float
    ce: float
    temperature: float = 1.0


Scored = tuple[Tensor, Tensor]  # a loss per row, and its gradient with respect to the logits
Chunk = slice


class FullTeacher:
    """Distributions of the dense model, from its hidden states."""

    def __init__(self, hidden: Float[Tensor, "n d"], head: nn.Module) -> None:
        self.hidden, self.head = hidden, head

    def divergence(
        self, rows: Chunk, log_q: Float[Tensor, "n vocabulary"], temperature: float
    ) -> Scored:
        """Return ``T^2 KL(p || q)`` of rows, and its gradient, ``T (q - p)``."""
        log_p = (self.head(self.hidden[rows]).float() / temperature).log_softmax(-1)
        gradient = log_q.exp()
        p = log_p.exp()
        loss = torch.linalg.vecdot(p, log_p.sub_(log_q)) * temperature**2
        return loss, gradient.sub_(p).mul_(temperature)


class TopTeacher:
    """The most probable tokens of the dense model, and all others as one: a coarser divergence."""

    def __init__(
        self, ids: Int[Tensor, "n k"], log_p: Float[Tensor, "n k"], log_rest: Float[Tensor, " n"]
    ) -> None:
        self.ids, self.log_p, self.log_rest = ids, log_p, log_rest

    @classmethod
    def of(cls, references: Sequence[DenseReference], device: torch.device) -> TopTeacher:
        """Take the predictions of several windows in order."""
        return cls(
            torch.cat([each.ids for each in references]).to(device, torch.int64),
            torch.cat([each.log_probs for each in references]).to(device),
            torch.cat([each.log_rest for each in references]).to(device),
        )

    def divergence(
        self, rows: Chunk, log_q: Float[Tensor, "n vocabulary"], temperature: float
    ) -> Scored:
        r"""Return ``KL`` over the tokens and their rest, and its gradient.

        With ``R`` and ``Q`` the rest's probability in the dense model and in this one, the
        gradient is ``q_j - p_j`` for the tokens and ``q_j (1 - R / Q)`` for all others.
        """
        assert temperature == 1
        ids, log_p, log_rest = self.ids[rows], self.log_p[rows], self.log_rest[rows]
        top = log_q.gather(1, ids)
        others = log_q.scatter(1, ids, -torch.inf)
        log_others = others.logsumexp(-1)
        p, rest = log_p.exp(), log_rest.exp()
        outside = (rest * (log_rest - log_others)).masked_fill(rest == 0, 0.0)
        loss = torch.linalg.vecdot(p, log_p - top) + outside
        share = torch.where(rest == 0, rest, (log_rest - log_others).exp())
        gradient = others.exp_().mul_(1 - share[:, None])
        return loss, gradient.scatter_(1, ids, top.exp() - p)


Teacher = FullTeacher | TopTeacher


@dataclass(frozen=True)
class Loss:
    """A loss with a gradient, and its parts as they are per token, without weights."""

    total: Tensor
    kl: float
    nll: float


def chunked_loss(
    hidden: Float[Tensor, "n d"],
    head: nn.Module,
    targets: Int[Tensor, " n"],
    teacher: Teacher | None,
    weights: Weights,
    chunk_tokens: int = 256,
) -> Loss:
    """Return the mean loss of rows whose logits never exist all together.

    Of each chunk the gradient is worked out at once, in closed form up to the logits, and only that
    of hidden states and of the head's parameters stays: over a large vocabulary logits are the
    largest tensors of a step.

    Args:
        hidden: Finished states of the compressed model, in a graph.
        head: Gives logits of them; its parameters may be trained too.
        targets: The next tokens.
        teacher: ``None`` where the divergence does not count.
        weights: Of the parts.
        chunk_tokens: Rows at a time; does not change the result.

    Raises:
        NonFiniteError: If a loss is not finite, with the number of rows.
    """
    parameters = [p for p in parameters_of(head) if p.requires_grad]
    count, parts = len(targets), list[Tensor]()
    gathered = [torch.zeros_like(parameter) for parameter in parameters]
    kl = nll = 0.0
    for start in range(0, count, chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        leaf = hidden[rows].detach().requires_grad_()
        with torch.enable_grad():
            logits = head(leaf).float()
        with torch.no_grad():
            loss, own_kl, own_nll, gradient = _scored(
                logits.detach(), targets[rows], teacher, weights, rows
            )
        if bad := int((~torch.isfinite(loss)).sum()):
            raise NonFiniteError(f"the loss of {bad} of {len(loss)} tokens is not finite")
        kl, nll = kl + own_kl, nll + own_nll
        first, *rest = torch.autograd.grad(logits, [leaf, *parameters], gradient / count)
        parts.append(first)
        for total, more in zip(gathered, rest, strict=True):
            total += more
    value = hidden.new_tensor((weights.kl * kl + weights.ce * nll) / count, dtype=torch.float32)
    gradients = [torch.cat(parts), *gathered]
    total = _Known.apply(value, gradients, hidden, *parameters)  # type: ignore[no-untyped-call]
    return Loss(total, kl / count, nll / count)


def _scored(
    logits: Float[Tensor, "n vocabulary"],
    targets: Int[Tensor, " n"],
    teacher: Teacher | None,
    weights: Weights,
    rows: Chunk,
) -> tuple[Tensor, float, float, Tensor]:
    """Return losses, the sums of their two parts, and the gradient with respect to the logits."""
    log_q = logits.log_softmax(-1)
    nll = -log_q.gather(1, targets[:, None]).squeeze(1)
    loss, kl, gradient = weights.ce * nll, 0.0, torch.zeros_like(log_q)
    if teacher is not None and weights.kl:
        softer = log_q
        if weights.temperature != 1:
            softer = (logits / weights.temperature).log_softmax(-1)
        divergence, gradient = teacher.divergence(rows, softer, weights.temperature)
        loss = loss + weights.kl * divergence
        gradient.mul_(weights.kl)
        kl = float(divergence.double().sum())
    if weights.ce:
        gradient.add_(log_q.exp_(), alpha=weights.ce)
        one = gradient.new_full((len(targets), 1), -weights.ce)
        gradient.scatter_add_(1, targets[:, None], one)
    return loss, kl, float(nll.double().sum()), gradient


def parameters_of(head: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters of a head, those of the table that it may be tied to."""
    yield from (head.tied[0] if isinstance(head, TiedHead) else head).parameters()


class _Known(torch.autograd.Function):
    """A value whose gradients were worked out before."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Sequence[Tensor], *_: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Any, ...]:
        return None, None, *(each * outer[0].to(each.dtype) for each in ctx.gradients)


def hidden_distance(
    states: Sequence[Float[Tensor, "*batch d"]], dense: Sequence[Float[Tensor, "*batch d"]]
) -> Tensor:
    """Mean squared distance of hidden states, each token's as a share of its own mean square.

    All layers count alike (Noach & Goldberg, *Compressing Pre-trained Language Models by Matrix
    Decomposition*, AACL 2020, section 2.2, without shares: a few tokens of large states would then
    be all of it).
    """
    parts = []
    for own, target in zip(states, dense, strict=True):
        wide = target.float()
        scale = wide.square().mean(-1).clamp_min(torch.finfo(torch.float32).tiny)
        parts.append(((own.float() - wide).square().mean(-1) / scale).mean())
    return torch.stack(parts).mean()
