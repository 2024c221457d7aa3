"""KL between dense and compressed next-token distributions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from lrbo.errors import NonFiniteError, StudyError, reading
from lrbo.evaluation.perplexity import Chunk, OnTokens, Perplexity, predictions
from lrbo.storage import replacing

# Log-probabilities in float32 are off by about 1e-6, so that 1 minus the top is a good measure of
# the rest only while the rest is well above that. Below this it is summed token by token.
CANCELLED = 1e-3


@dataclass(frozen=True)
class DenseReference:
    """What the dense model says about the validation tokens, measured once.

    Of each next-token distribution the ``k`` most probable tokens are kept and the rest is one
    bucket. The divergence over this coarser partition is a lower bound of the full one (data
    processing inequality), and equal to it if ``k`` is the vocabulary. It takes
    ``tokens * (8 k + 4)`` bytes: 8 MiB for 8,192 tokens at ``k = 128``, where full
    distributions of a 49k vocabulary would take 1.5 GiB.

    Attributes:
        perplexity: Of the dense model.
        ids: ``(tokens, k)``, int32, the most probable tokens.
        log_probs: ``(tokens, k)``, float32, their log-probabilities.
        log_rest: ``(tokens,)``, float32, log-probability of all others together.
    """

    perplexity: Perplexity
    ids: Int[Tensor, "tokens k"]
    log_probs: Float[Tensor, "tokens k"]
    log_rest: Float[Tensor, " tokens"]

    @property
    def bytes(self) -> int:
        """Return the memory that the reference takes."""
        tensors = (self.ids, self.log_probs, self.log_rest)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def kl_dense_to_compressed(self, chunk: Chunk) -> Float[Tensor, " n"]:
        """Return ``KL(dense || compressed)`` per token of a chunk, nats, not negative.

        Args:
            chunk: Predictions of the compressed model for the same tokens in the same order.

        Raises:
            NonFiniteError: With the count, if a token's divergence is not finite.
        """
        place = slice(chunk.first, chunk.first + len(chunk.nll))
        device = chunk.logits.device
        ids = self.ids[place].to(device, torch.int64)
        dense = self.log_probs[place].to(device)
        rest = self.log_rest[place].to(device)
        compressed = chunk.logits.gather(1, ids) - chunk.log_normalizer[:, None]
        compressed_rest = _log_rest(chunk, ids, compressed)
        inside = (dense.exp() * (dense - compressed)).sum(-1)
        outside = torch.where(
            rest.isneginf(), torch.zeros_like(rest), rest.exp() * (rest - compressed_rest)
        )
        divergence = (inside + outside).clamp_min(0.0)
        bad = int((~torch.isfinite(divergence)).sum())
        if bad:
            raise NonFiniteError(
                f"the divergence of {bad} tokens is not finite among the {len(divergence)} tokens "
                f"from number {chunk.first} on; the compressed model calls a token impossible"
            )
        return divergence

    def save(self, path: Path) -> None:
        """Store the reference, so that the dense model is scored only once per study."""
        tensors = {"ids": self.ids, "log_probs": self.log_probs, "log_rest": self.log_rest}
        about = {"nll": repr(self.perplexity.nll), "tokens": str(self.perplexity.tokens)}
        with replacing(path) as beside:
            save_file(tensors, beside, metadata=about)

    @classmethod
    def load(cls, path: Path) -> DenseReference:
        """Read what :meth:`save` stored.

        Raises:
            StudyError: If it is not that.
        """
        with reading(StudyError, f"{path} is damaged"):
            with safe_open(str(path), framework="pt") as file:
                about = file.metadata() or {}
                found = cls(
                    Perplexity(float(about["nll"]), int(about["tokens"])),
                    file.get_tensor("ids"),
                    file.get_tensor("log_probs"),
                    file.get_tensor("log_rest"),
                )
            kinds = (found.ids.dtype, found.log_probs.dtype, found.log_rest.dtype)
            if kinds != (torch.int32, torch.float32, torch.float32):
                raise ValueError(f"its tensors are {kinds}")
            rows = (len(found.ids), len(found.log_probs), len(found.log_rest))
            if set(rows) != {found.perplexity.tokens}:
                raise ValueError(f"it has {rows} rows for {found.perplexity.tokens} tokens")
            if found.ids.shape != found.log_probs.shape:
                raise ValueError("it has more tokens than probabilities, or fewer")
        return found


def measure_dense(
    model: PreTrainedModel,
    windows: Int[Tensor, "windows tokens"],
    *,
    top: int = 128,
    batch_windows: int = 4,
    chunk_tokens: int = 256,
    on_tokens: OnTokens | None = None,
) -> DenseReference:
    """Score the dense model and keep the heads of its distributions.

    Args:
        model: The dense model, in evaluation mode.
        windows: ``(windows, tokens)`` ids.
        top: Tokens kept per distribution; capped at the vocabulary.
        batch_windows: Windows per forward pass.
        chunk_tokens: Rows of logits at a time.
        on_tokens: Told the number of tokens after each chunk.

    Raises:
        NonFiniteError: With the count, if a token's loss is not finite.
    """
    total = Perplexity(0.0, 0)
    ids: list[Tensor] = []
    log_probs: list[Tensor] = []
    log_rest: list[Tensor] = []
    for chunk in predictions(
        model, windows, batch_windows=batch_windows, chunk_tokens=chunk_tokens
    ):
        total += Perplexity(float(chunk.nll.double().sum()), len(chunk.nll))
        best = chunk.logits.topk(min(top, chunk.logits.shape[1]), sorted=False)
        ids.append(best.indices.to(torch.int32).cpu())
        kept = best.values - chunk.log_normalizer[:, None]
        log_probs.append(kept.cpu())
        log_rest.append(_log_rest(chunk, best.indices, kept).cpu())
        if on_tokens is not None:
            on_tokens(len(chunk.nll))
    return DenseReference(total, torch.cat(ids), torch.cat(log_probs), torch.cat(log_rest))


def _log_rest(
    chunk: Chunk, ids: Int[Tensor, "n k"], log_probs: Float[Tensor, "n k"]
) -> Float[Tensor, " n"]:
    """Return the log-probability of everything but ``ids``; ``-inf`` if there is nothing else.

    One minus the top is known already and costs nothing; only the rows that put nearly
    everything on ``ids`` are summed over the vocabulary again.
    """
    rest = 1.0 - log_probs.double().exp().sum(-1)
    log_rest = rest.clamp_min(CANCELLED).log().to(log_probs.dtype)
    rows = (rest < CANCELLED).nonzero().squeeze(1)
    others = chunk.logits[rows].scatter(1, ids[rows], -torch.inf).logsumexp(-1)
    return log_rest.index_copy(0, rows, others - chunk.log_normalizer[rows])
