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
from lrbo.tasks.perplexity import DenseReference, log_rest_of

PIECE = 2**18  # logits at a time on a CPU


@dataclass(frozen=True)
class Weights:
    """What the parts of a loss count: ``kl T^2 KL + ce nll``, per token."""

    kl: float
    ce: float
    temperature: float = 1.0


@dataclass(frozen=True)
class Predicted:
    """Distributions of the compressed model for some rows."""

    logits: Float[Tensor, "n vocabulary"]
    q: Float[Tensor, "n vocabulary"]
    log_normalizer: Float[Tensor, " n"]  # logsumexp of the logits

    @classmethod
    def of(cls, logits: Float[Tensor, "n vocabulary"]) -> Predicted:
        """Normalize logits in two passes over them."""
        log_q = logits.log_softmax(-1)
        log_normalizer = logits[:, 0] - log_q[:, 0]
        return cls(logits, log_q.exp_(), log_normalizer)

    def log_of(self, ids: Int[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """Return log-probabilities of tokens."""
        return self.logits.gather(1, ids) - self.log_normalizer[:, None]


# Of each row a divergence, and the distribution w with which its gradient is q - w.
Compared = tuple[Tensor, Tensor]


class FullTeacher:
    """Distributions of the dense model, from its hidden states or logits."""

    def __init__(self, states: Float[Tensor, "n d"], head: nn.Module) -> None:
        self.states, self.head = states, head

    def at(self, rows: slice) -> FullTeacher:
        """Take rows, of which logits are worked out."""
        return FullTeacher(self.head(self.states[rows]), nn.Identity())

    def compared(self, rows: slice, own: Predicted, temperature: float) -> Compared:
        """Return ``KL(p || q)`` of rows of both divided by a temperature, and ``p``."""
        logits = self.head(self.states[rows]).to(own.q, copy=True)
        dense = Predicted.of(logits if temperature == 1 else logits / temperature)
        inside = torch.linalg.vecdot(dense.q, dense.logits.sub_(own.logits))
        return inside - dense.log_normalizer + own.log_normalizer, dense.q


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

    def at(self, rows: slice) -> TopTeacher:
        """Take rows."""
        return TopTeacher(self.ids[rows], self.log_p[rows], self.log_rest[rows])

    def compared(self, rows: slice, own: Predicted, temperature: float) -> Compared:
        r"""Return ``KL`` over the tokens and their rest, and ``w``.

        That is ``p`` for the tokens and ``q_j R / Q`` for all others, with ``R`` and ``Q`` the
        rest's probability in the dense model and in this one.
        """
        assert temperature == 1
        ids, log_p, log_rest = self.ids[rows], self.log_p[rows], self.log_rest[rows]
        top, p, rest = own.log_of(ids), log_p.exp(), log_rest.exp()
        log_others = log_rest_of(own.logits, own.log_normalizer, ids, top)
        outside = (rest * (log_rest - log_others)).masked_fill(rest == 0, 0.0)
        share = torch.where(rest == 0, rest, (log_rest - log_others).exp())
        wanted = (own.q * share[:, None]).scatter_(1, ids, p)
        return torch.linalg.vecdot(p, log_p - top) + outside, wanted


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
            logits = head(leaf)
        with torch.no_grad():
            own = None if teacher is None else teacher.at(rows)
            sums, gradient = _scored(logits.detach(), targets[rows], own, weights, 1 / count)
        kl, nll = kl + sums[0], nll + sums[1]
        first, *rest = torch.autograd.grad(logits, [leaf, *parameters], gradient)
        parts.append(first)
        for total, more in zip(gathered, rest, strict=True):
            total += more
    value = hidden.new_tensor((weights.kl * kl + weights.ce * nll) / count, dtype=torch.float32)
    gradients = [torch.cat(parts), *gathered]
    total = _Known.apply(value, gradients, hidden, *parameters)  # type: ignore[no-untyped-call]
    return Loss(total, kl / count, nll / count)


def chunked_consistency(
    first: Float[Tensor, "n d"],
    second: Float[Tensor, "n d"],
    head: nn.Module,
    chunk_tokens: int = 256,
) -> Tensor:
    """Return ``(KL(p || q) + KL(q || p)) / 2`` of two passes, on average over rows.

    Both have gradients; like those of :func:`chunked_loss` they are worked out chunk by chunk.

    Raises:
        NonFiniteError: If the divergence of a row is not finite, with the number of rows.
    """
    parameters = [p for p in parameters_of(head) if p.requires_grad]
    gathered = [torch.zeros_like(parameter) for parameter in parameters]
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    count, sums = len(first), list[Tensor]()
    for start in range(0, count, chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        leaves = [each[rows].detach().requires_grad_() for each in (first, second)]
        with torch.enable_grad():
            log_p, log_q = (
                logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
                for logits in map(head, leaves)
            )
            each = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1) / 2
        sums.append(each.detach())
        (*own,) = torch.autograd.grad(each.sum() / count, [*leaves, *parameters])
        for side, gradient in zip(sides, own, strict=False):
            side.append(gradient)
        for known, more in zip(gathered, own[2:], strict=True):
            known += more
    every = torch.cat(sums).double()
    if bad := int((~torch.isfinite(every)).sum()):
        raise NonFiniteError(f"the consistency of {bad} of {count} tokens is not finite")
    value = first.new_tensor(float(every.mean()), dtype=torch.float32)
    gradients = [*(torch.cat(side) for side in sides), *gathered]
    total: Tensor = _Known.apply(  # type: ignore[no-untyped-call]
        value, gradients, first, second, *parameters
    )
    return total


def _scored(
    logits: Float[Tensor, "n vocabulary"],
    targets: Int[Tensor, " n"],
    teacher: Teacher | None,
    weights: Weights,
    scale: float,
) -> tuple[tuple[float, float], Tensor]:
    """Return the sums of divergence and nll, and ``scale`` times the gradient of the logits."""
    gradient, parts = torch.empty_like(logits), list[Tensor]()
    # On a CPU it takes half of the time where a piece stays in the cache of its core.
    size = max(PIECE // logits.shape[1], 1) if logits.device.type == "cpu" else len(logits)
    for start in range(0, len(logits), size):
        rows = slice(start, start + size)
        piece = logits[rows].to(torch.promote_types(logits.dtype, torch.float32))
        losses, gradient[rows] = _piece(piece, targets[rows], teacher, weights, rows, scale)
        parts.append(losses)
    both = torch.cat(parts, 1).double()
    finite = int(torch.isfinite(both).all(0).sum())
    if finite < len(logits):
        raise NonFiniteError(
            f"the loss of {len(logits) - finite} of {len(logits)} tokens is not finite"
        )
    kl, nll = both.sum(1).tolist()
    return (kl, nll), gradient


def _piece(
    logits: Float[Tensor, "n vocabulary"],
    targets: Int[Tensor, " n"],
    teacher: Teacher | None,
    weights: Weights,
    rows: slice,
    scale: float,
) -> tuple[Float[Tensor, "2 n"], Float[Tensor, "n vocabulary"]]:
    """Return divergences and nll of some rows, and the gradient."""
    own, kl, t = Predicted.of(logits), weights.kl, weights.temperature
    nll = -own.log_of(targets[:, None]).squeeze(1)
    gradient, divergence = own.q, torch.zeros_like(nll)
    if teacher is None or not kl:
        gradient.mul_(weights.ce * scale)
    else:
        softer = own if t == 1 else Predicted.of(logits / t)
        divergence, wanted = teacher.compared(rows, softer, t)
        divergence = divergence * t**2
        if t == 1:
            gradient.mul_((weights.ce + kl) * scale)
        else:
            gradient.mul_(weights.ce * scale).add_(softer.q, alpha=kl * t * scale)
        gradient.sub_(wanted, alpha=kl * t * scale)
    if weights.ce:
        one = gradient.new_full((len(targets), 1), -weights.ce * scale)
        gradient.scatter_add_(1, targets[:, None], one)
    return torch.stack([divergence, nll]), gradient


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
