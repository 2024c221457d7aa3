"""Causal language models: next-token loss, its gradient, and divergence from the dense model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from lrbo.errors import StatisticsError
from lrbo.models.blockwise import BlockwiseBody
from lrbo.models.limits import Limits
from lrbo.models.loading import load_model, load_skeleton, load_tokenizer
from lrbo.models.model_map import body_and_head, map_model
from lrbo.tasks.metrics import CAUSAL_LM, Task
from lrbo.tasks.model_task import Labels, OnLogits, OnScored, Segments
from lrbo.tasks.perplexity import DenseReference, Windows, measure_dense, predictions

States: TypeAlias = Float[Tensor, "windows tokens d"]
IGNORED = -100  # label of no token, for torch's cross-entropy


@dataclass(frozen=True)
class CausalLM:
    """Next-token prediction: negative log-likelihood in nats per token."""

    record: ClassVar[Task] = CAUSAL_LM
    auto_class: ClassVar[str] = "AutoModelForCausalLM"

    batch_windows: int = 4  # per forward pass
    chunk_tokens: int = 256  # rows of logits at a time
    kl_top: int = 128  # tokens of each dense distribution that the divergence tells apart

    skeleton = staticmethod(load_skeleton)
    load = staticmethod(load_model)
    tokenizer = staticmethod(load_tokenizer)
    map = staticmethod(map_model)
    segments = staticmethod(BlockwiseBody)
    positions = staticmethod(torch.numel)
    load_reference = staticmethod(DenseReference.load)

    def problems(self, model: PreTrainedModel, name: str, examples: Mapping[str, Any]) -> list[str]:
        """List windows that are too long, or have tokens that the model does not know."""
        return Limits.of(model.config, name).of_windows(dict(examples))

    def output_gradients(
        self,
        segments: Segments,
        states: States,
        examples: Windows,
        *,
        labels: Labels,
        seed: int,
        batch_windows: int,
        on_logits: OnLogits = None,
    ) -> int:
        """Replace the last block's output by the gradient of the summed loss.

        With sampled labels the second moments of the gradients are the Fisher information, which
        is the Hessian of the divergence from the dense model at the dense model itself. With the
        data's they are the empirical Fisher, and the last token of a window has no loss.
        """
        scored = examples.numel() - (len(examples) if labels == "data" else 0)
        if not scored:
            raise StatisticsError(
                f"{len(examples)} windows of {examples.shape[1]} tokens have no token with a next "
                "one; use windows of at least 2 tokens, or calibration.labels=sampled."
            )
        _, head = body_and_head(segments.model)
        following = examples.roll(-1, 1)
        following[:, -1] = IGNORED
        uniform = torch.rand(examples.shape, generator=torch.Generator().manual_seed(seed))
        for first in range(0, len(examples), batch_windows):
            batch = slice(first, first + batch_windows)
            inputs = states[batch].to(segments.device).requires_grad_()
            with torch.enable_grad():
                finished = segments.finish(inputs)
            rows = (finished.detach(), following[batch], uniform[batch])
            parts: list[Tensor] = []
            for hidden, tokens, draws in self._chunks(*(each.to(finished.device) for each in rows)):
                leaf = hidden.requires_grad_()
                with torch.enable_grad():
                    logits = head(leaf)
                    # float32 at least: probabilities in half precision would not sum to 1.
                    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                    targets = tokens if labels == "data" else sample_labels(logits.detach(), draws)
                    loss = functional.cross_entropy(logits, targets, reduction="sum")
                if on_logits is not None:
                    on_logits(hidden.detach(), logits.detach())
                parts += torch.autograd.grad(loss, leaf)
            (back,) = torch.autograd.grad(finished, inputs, torch.cat(parts).view_as(finished))
            states[batch] = back.to(states)
        return scored

    def distance(self, segments: Segments, dense: States, other: States) -> float:
        """Mean ``KL(dense || other)`` of next-token distributions, nats per token."""
        _, head = body_and_head(segments.model)
        total = 0.0
        for rows in self._chunks(dense, other):
            log_p, log_q = (head(each).float().log_softmax(-1) for each in rows)
            divergence = functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
            total += float(divergence.double().sum())
        return total / dense.shape[:2].numel()

    def losses(
        self, model: PreTrainedModel, examples: Windows, *, on_scored: OnScored = None
    ) -> Float[Tensor, " windows"]:
        """Mean nats per token of each window."""
        chunks = predictions(model, examples, **self._passes(on_scored))
        losses = torch.cat([chunk.nll.double().cpu() for chunk in chunks])
        return losses.view(len(examples), -1).mean(1)

    def compared(
        self,
        model: PreTrainedModel,
        examples: Windows,
        reference: DenseReference,
        first: int,
        *,
        on_scored: OnScored = None,
    ) -> tuple[Float[Tensor, "windows scored"], Float[Tensor, "windows scored"]]:
        """Nll and divergence of every token but the first of each window."""
        windows, tokens = examples.shape
        pairs = []
        for chunk in predictions(model, examples, **self._passes(on_scored)):
            shifted = replace(chunk, first=chunk.first + first * (tokens - 1))
            pairs.append((chunk.nll, reference.kl_dense_to_compressed(shifted)))
        nll, divergence = (torch.cat(each).double() for each in zip(*pairs, strict=True))
        return nll.view(windows, -1), divergence.view(windows, -1)

    def measure_dense(
        self, model: PreTrainedModel, examples: Windows, *, on_scored: OnScored = None
    ) -> DenseReference:
        """Score the dense model, and store its most probable tokens."""
        return measure_dense(model, examples, top=self.kl_top, **self._passes(on_scored))

    def _chunks(self, *states: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Walk through the tokens of several tensors, side by side."""
        chunks = (torch.split(each.flatten(0, 1), self.chunk_tokens) for each in states)
        return zip(*chunks, strict=True)

    def _passes(self, on_scored: OnScored) -> dict[str, Any]:
        sizes = {"batch_windows": self.batch_windows, "chunk_tokens": self.chunk_tokens}
        return sizes | {"on_tokens": on_scored}


def sample_labels(
    logits: Float[Tensor, "n vocabulary"], draws: Float[Tensor, " n"]
) -> Int[Tensor, " n"]:
    """Sample a label per row: where the cumulative distribution passes its draw in [0, 1)."""
    total = logits.softmax(-1).cumsum(-1)
    # right: a label without probability is never passed, not even by a draw of 0.
    passed = torch.searchsorted(total, draws[:, None] * total[:, -1:], right=True)
    return passed.clamp_max(logits.shape[1] - 1).squeeze(1)
