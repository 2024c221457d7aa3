"""Token-weighted negative log-likelihood."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from lrbo.errors import NonFiniteError
from lrbo.model import body_and_head

OnTokens = Callable[[int], None]


def perplexity_of(nll: float) -> float:
    """Take ``exp`` of nats per token, which is ``inf`` above 709.78, as in every float.

    Example:
        >>> perplexity_of(0.0), perplexity_of(710.0)
        (1.0, inf)
    """
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf


@dataclass(frozen=True)
class Perplexity:
    """Summed negative log-likelihood in nats over scored tokens; adds across batches.

    Attributes:
        nll: Sum over tokens, nats.
        tokens: Tokens that were predicted.
    """

    nll: float
    tokens: int

    @property
    def mean(self) -> float:
        """Return nats per token."""
        return self.nll / self.tokens

    @property
    def value(self) -> float:
        """Return the perplexity, ``exp(nll / tokens)``, ``inf`` where that overflows."""
        return perplexity_of(self.mean)

    @classmethod
    def of_windows(cls, losses: Sequence[float], tokens: int) -> Perplexity:
        """Add windows up.

        Args:
            losses: Mean nats per token of each window.
            tokens: Scored in each of them.
        """
        return cls(math.fsum(losses) * tokens, len(losses) * tokens)

    def __add__(self, other: Perplexity) -> Perplexity:
        """Return the score of both sets of tokens."""
        return Perplexity(self.nll + other.nll, self.tokens + other.tokens)


@dataclass(frozen=True)
class Chunk:
    """Predictions for some consecutive scored tokens.

    Attributes:
        first: Index of the first among all scored tokens.
        logits: ``(n, vocabulary)``, float32.
        log_normalizer: ``(n,)``, logsumexp of the logits.
        nll: ``(n,)``, negative log-likelihood of the true tokens, nats.
    """

    first: int
    logits: Float[Tensor, "n vocabulary"]
    log_normalizer: Float[Tensor, " n"]
    nll: Float[Tensor, " n"]


def predictions(
    model: PreTrainedModel,
    windows: Int[Tensor, "windows tokens"],
    *,
    batch_windows: int = 4,
    chunk_tokens: int = 256,
) -> Iterator[Chunk]:
    """Predict every token of every window but the first, a chunk of logits at a time.

    The logits of a long batch over a large vocabulary would be the largest tensor of the whole
    run; hidden states go through the head in chunks, so at most ``chunk_tokens`` rows exist.

    Args:
        model: In evaluation mode.
        windows: ``(windows, tokens)`` ids.
        batch_windows: Windows per forward pass.
        chunk_tokens: Rows of logits at a time.

    Yields:
        Chunks in the order of the tokens.

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
        for rows, true in zip(
            torch.split(hidden, chunk_tokens), torch.split(targets, chunk_tokens), strict=True
        ):
            with torch.inference_mode():
                logits = head(rows).float()
                log_normalizer = logits.logsumexp(-1)
                nll = log_normalizer - logits.gather(1, true[:, None]).squeeze(1)
            bad = int((~torch.isfinite(nll)).sum())
            if bad:
                raise NonFiniteError(
                    f"the loss of {bad} tokens is not finite among the {len(nll)} tokens "
                    f"from number {first} on; the model overflows in {rows.dtype}"
                )
            yield Chunk(first, logits, log_normalizer, nll)
            first += len(nll)


def score(
    model: PreTrainedModel,
    windows: Int[Tensor, "windows tokens"],
    *,
    batch_windows: int = 4,
    chunk_tokens: int = 256,
    on_tokens: OnTokens | None = None,
) -> Perplexity:
    """Score a model on token windows.

    Args:
        model: In evaluation mode.
        windows: ``(windows, tokens)`` ids; the first token of each is context only.
        batch_windows: Windows per forward pass; does not change the result.
        chunk_tokens: Rows of logits at a time; does not change the result.
        on_tokens: Told the number of tokens after each chunk.

    Raises:
        NonFiniteError: With the count, if a token's loss is not finite.
    """
    total = Perplexity(0.0, 0)
    for chunk in predictions(
        model, windows, batch_windows=batch_windows, chunk_tokens=chunk_tokens
    ):
        total += Perplexity(float(chunk.nll.double().sum()), len(chunk.nll))
        if on_tokens is not None:
            on_tokens(len(chunk.nll))
    return total


def score_windows(
    model: PreTrainedModel,
    windows: Int[Tensor, "windows tokens"],
    *,
    batch_windows: int = 4,
    chunk_tokens: int = 256,
    on_tokens: OnTokens | None = None,
) -> Float[Tensor, " windows"]:
    """Score a model on each token window by itself.

    Args:
        model: In evaluation mode.
        windows: ``(windows, tokens)`` ids; the first token of each is context only.
        batch_windows: Windows per forward pass; does not change the result.
        chunk_tokens: Rows of logits at a time; does not change the result.
        on_tokens: Told the number of tokens after each chunk.

    Returns:
        Mean nats per token of each window, float64 on the CPU.

    Raises:
        NonFiniteError: With the count, if a token's loss is not finite.
    """
    found: list[Tensor] = []
    for chunk in predictions(
        model, windows, batch_windows=batch_windows, chunk_tokens=chunk_tokens
    ):
        found.append(chunk.nll.double().cpu())
        if on_tokens is not None:
            on_tokens(len(chunk.nll))
    return torch.cat(found).view(len(windows), -1).mean(1)
