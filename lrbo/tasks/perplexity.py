"""Scores of next tokens: perplexity, and KL from the dense model's distributions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from lrbo.errors import NonFiniteError, StudyError, reading
from lrbo.files.atomic import replacing
from lrbo.models.model_map import body_and_head
from lrbo.tasks.metrics import perplexity_of
from lrbo.tasks.model_task import OnScored

# Log-probabilities in float32 are off by about 1e-6: below this, 1 minus the top is no good measure
# of the rest, which is summed token by token.
CANCELLED = 1e-3

Windows: TypeAlias = Int[Tensor, "windows tokens"]


@dataclass(frozen=True)
class Perplexity:
    """Negative log-likelihood in nats, summed over scored tokens; adds across batches."""

    nll: float
    tokens: int

    @property
    def mean(self) -> float:
        """Nats per token."""
        return self.nll / self.tokens

    @property
    def value(self) -> float:
        """The perplexity, ``exp(nll / tokens)``: ``inf`` where that overflows."""
        return perplexity_of(self.mean)

    def __add__(self, other: Perplexity) -> Perplexity:
        return Perplexity(self.nll + other.nll, self.tokens + other.tokens)


@dataclass(frozen=True)
class Chunk:
    """Predictions for consecutive scored tokens, float32."""

    first: int  # number of the first of them
    logits: Float[Tensor, "n vocabulary"]
    log_normalizer: Float[Tensor, " n"]  # logsumexp of the logits
    nll: Float[Tensor, " n"]  # of the true tokens, nats

    @property
    def perplexity(self) -> Perplexity:
        """The score of these tokens."""
        return Perplexity(float(self.nll.double().sum()), len(self.nll))


def predictions(
    model: PreTrainedModel,
    windows: Windows,
    *,
    batch_windows: int = 4,
    chunk_tokens: int = 256,
    on_tokens: OnScored = None,
) -> Iterator[Chunk]:
    """Predict every token of every window but the first, which is context only.

    Hidden states go through the head ``chunk_tokens`` rows at a time: the logits of a long batch
    over a large vocabulary would be the largest tensor of the whole run. Neither this size nor that
    of batches changes the result. ``on_tokens`` is called with the number of tokens of each chunk.

    Raises:
        NonFiniteError: With the count, if a token's loss is not finite.
    """
    body, head = body_and_head(model)
    device = next(model.parameters()).device
    first = 0
    for batch in torch.split(windows, batch_windows):
        ids = batch.to(device)
        with torch.inference_mode():  # not around the yields: it would hold for the caller too
            hidden = body(ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
        targets = ids[:, 1:].flatten()
        chunks = (torch.split(each, chunk_tokens) for each in (hidden, targets))
        for rows, tokens in zip(*chunks, strict=True):
            with torch.inference_mode():
                logits = head(rows).float()
                log_normalizer = logits.logsumexp(-1)
                nll = log_normalizer - logits.gather(1, tokens[:, None]).squeeze(1)
            _require_finite("loss", nll, first, f"the model overflows in {rows.dtype}")
            yield Chunk(first, logits, log_normalizer, nll)
            first += len(nll)
            if on_tokens is not None:
                on_tokens(len(nll))


def _require_finite(what: str, values: Float[Tensor, " n"], first: int, why: str) -> None:
    if bad := int((~torch.isfinite(values)).sum()):
        raise NonFiniteError(
            f"the {what} of {bad} tokens is not finite among the {len(values)} tokens from number "
            f"{first} on; {why}"
        )


def score(model: PreTrainedModel, windows: Windows, **passes: Any) -> Perplexity:
    """Score a model on token windows; ``passes`` are other arguments of :func:`predictions`."""
    chunks = predictions(model, windows, **passes)
    return sum((chunk.perplexity for chunk in chunks), start=Perplexity(0.0, 0))


@dataclass(frozen=True)
class DenseReference:
    """Next-token distributions of the dense model for the validation tokens, measured once.

    Of each distribution the ``k`` most probable tokens are stored and the rest is one bucket:
    ``tokens * (8 k + 4)`` bytes. The divergence over this coarser partition is a lower bound of the
    full one (data processing inequality), equal to it if ``k`` is the vocabulary.
    """

    perplexity: Perplexity  # of the dense model
    ids: Int[Tensor, "tokens k"]  # int32
    log_probs: Float[Tensor, "tokens k"]  # float32, as the next
    log_rest: Float[Tensor, " tokens"]  # of all other tokens together

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.perplexity.mean

    @property
    def scored(self) -> int:
        """Number of tokens."""
        return self.perplexity.tokens

    def kl_dense_to_compressed(self, chunk: Chunk) -> Float[Tensor, " n"]:
        """``KL(dense || compressed)`` per token, nats, not negative; NonFiniteError otherwise."""
        rows = slice(chunk.first, chunk.first + len(chunk.nll))
        device = chunk.logits.device
        ids = self.ids[rows].to(device, torch.int64)
        dense, rest = self.log_probs[rows].to(device), self.log_rest[rows].to(device)
        compressed = chunk.logits.gather(1, ids) - chunk.log_normalizer[:, None]
        compressed_rest = log_rest_of(chunk.logits, chunk.log_normalizer, ids, compressed)
        inside = (dense.exp() * (dense - compressed)).sum(-1)
        outside = (rest.exp() * (rest - compressed_rest)).masked_fill(rest.isneginf(), 0.0)
        divergence = (inside + outside).clamp_min(0.0)
        why = "the compressed model calls a token impossible"
        _require_finite("divergence", divergence, chunk.first, why)
        return divergence

    def save(self, path: Path) -> None:
        """Write a file for :meth:`load`."""
        tensors = {"ids": self.ids, "log_probs": self.log_probs, "log_rest": self.log_rest}
        about = {"nll": repr(self.perplexity.nll), "tokens": str(self.perplexity.tokens)}
        with replacing(path) as beside:
            save_file(tensors, beside, metadata=about)

    @classmethod
    def load(cls, path: Path) -> DenseReference:
        """Read a file of :meth:`save`; StudyError if it is damaged."""
        with reading(StudyError, f"{path} is damaged"):
            with safe_open(str(path), framework="pt") as file:
                about = file.metadata() or {}
                perplexity = Perplexity(float(about["nll"]), int(about["tokens"]))
                tensors = [file.get_tensor(name) for name in ("ids", "log_probs", "log_rest")]
            actual = [(tensor.dtype, *tensor.shape) for tensor in tensors]
            rows = (perplexity.tokens, tensors[0].shape[-1])
            expected = [(torch.int32, *rows), (torch.float32, *rows), (torch.float32, rows[0])]
            if actual != expected:
                raise ValueError(f"its tensors are {actual}, expected {expected}")
        return cls(perplexity, *tensors)


def measure_dense(
    model: PreTrainedModel, windows: Windows, *, top: int = 128, **passes: Any
) -> DenseReference:
    """Score the dense model, and store the ``top`` most probable tokens of its distributions."""
    total, rows = Perplexity(0.0, 0), []
    for chunk in predictions(model, windows, **passes):
        total += chunk.perplexity
        best = chunk.logits.topk(min(top, chunk.logits.shape[1]), sorted=False)
        log_probs = best.values - chunk.log_normalizer[:, None]
        log_rest = log_rest_of(chunk.logits, chunk.log_normalizer, best.indices, log_probs)
        rows.append((best.indices.int().cpu(), log_probs.cpu(), log_rest.cpu()))
    return DenseReference(total, *map(torch.cat, zip(*rows, strict=True)))


def log_rest_of(
    logits: Float[Tensor, "n vocabulary"],
    log_normalizer: Float[Tensor, " n"],
    ids: Int[Tensor, "n k"],
    log_probs: Float[Tensor, "n k"],
) -> Float[Tensor, " n"]:
    """Log-probability of everything but ``ids``; ``-inf`` if there is nothing else."""
    rest = 1.0 - log_probs.double().exp().sum(-1)
    log_rest = rest.clamp_min(CANCELLED).log().to(log_probs.dtype)
    rows = (rest < CANCELLED).nonzero().squeeze(1)
    others = logits[rows].scatter(1, ids[rows], -torch.inf).logsumexp(-1)
    return log_rest.index_copy(0, rows, others - log_normalizer[rows])
