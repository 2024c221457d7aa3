"""Gradients of the loss: at the end of a body, and their moments at a layer's output."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lrbo.blockwise import BlockwiseBody
from lrbo.calibration.sites import require_sound
from lrbo.errors import StatisticsError
from lrbo.factorization.base import Statistic
from lrbo.linalg import add_gram, float64_device, mirror_upper
from lrbo.model import body_and_head

Labels = Literal["sampled", "data"]
CHUNK_TOKENS = 256  # rows of logits at a time


@runtime_checkable
class GradientSettings(Protocol):
    """What of the settings decides the gradients."""

    @property
    def batch_windows(self) -> int:
        """Return the windows per pass."""
        ...

    @property
    def labels(self) -> Labels:
        """Return what the loss is taken of."""
        ...

    @property
    def seed(self) -> int:
        """Return the seed of sampled labels."""
        ...


@dataclass
class GradientMoments:
    """Running moments of the output gradients of one layer: only what was asked for.

    Attributes:
        upper: ``(out, out)``, float64; its upper triangle is ``sum g g^T``.
        importance: ``(in,)``, float64, ``sum |g|^2 x_j^2``.
        tokens: Gradients seen.
    """

    upper: Float[Tensor, "out out"] | None
    importance: Float[Tensor, " in"] | None
    tokens: int = 0

    @classmethod
    def empty(
        cls,
        needs: Collection[Statistic],
        out_features: int,
        in_features: int,
        device: torch.device,
    ) -> GradientMoments:
        """Return the moments of no gradients."""
        place = float64_device(device)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=place)

        return cls(
            zeros(out_features, out_features) if Statistic.OUTPUT_GRADIENT in needs else None,
            zeros(in_features) if Statistic.INPUT_IMPORTANCE in needs else None,
        )

    def update(self, inputs: Float[Tensor, "n in"], gradients: Float[Tensor, "n out"]) -> None:
        """Add some tokens, any floating dtype; products run in float32, sums in float64."""
        wide = torch.promote_types(gradients.dtype, torch.float32)
        rows = gradients.to(wide)
        self.tokens += len(rows)
        if self.upper is not None:
            add_gram(self.upper, rows)
        if self.importance is not None:
            lengths = rows.square().sum(1, keepdim=True)
            weighted = inputs.to(wide).square() * lengths
            self.importance += weighted.to(self.importance.device).sum(0, dtype=torch.float64)

    def statistics(self, layer: str, tokens: int, scored: int) -> dict[Statistic, Tensor]:
        """Return the finished statistics, float64, on the CPU.

        Args:
            layer: Its name, for messages.
            tokens: That should have been seen.
            scored: Those of them that have a loss: the means are over these. The last token of
                a window of data has none, and its gradients are 0, for no other reads it.

        Raises:
            StatisticsError: If there were others, or a value is not finite.
        """
        found: dict[Statistic, Tensor] = {}
        if self.upper is not None:
            found[Statistic.OUTPUT_GRADIENT] = mirror_upper(self.upper).div_(scored).cpu()
        if self.importance is not None:
            found[Statistic.INPUT_IMPORTANCE] = self.importance.cpu() / scored
        require_sound(layer, "gradients", found, seen=self.tokens, tokens=tokens)
        return found


def scored_tokens(ids: Int[Tensor, "windows tokens"], labels: Labels) -> int:
    """Count the tokens that have a loss: in the data, the last of a window has no next one.

    Raises:
        StatisticsError: If there are none.
    """
    scored = ids.numel() - (len(ids) if labels == "data" else 0)
    if not scored:
        raise StatisticsError(
            f"{len(ids)} windows of {ids.shape[1]} tokens have no token with a next one; use "
            "windows of at least 2 tokens, or calibration.labels=sampled."
        )
    return scored


def loss_gradients(
    body: BlockwiseBody,
    states: Float[Tensor, "windows tokens d"],
    ids: Int[Tensor, "windows tokens"],
    settings: GradientSettings,
) -> None:
    """Replace the last block's output by the gradient of the summed loss with respect to it.

    With labels sampled from the model's own predictions, the second moments of the gradients
    are the Fisher information, which is the Hessian of the divergence from the dense model at
    the dense model itself. With the data's labels they are the empirical Fisher.

    Args:
        body: Of the model.
        states: Output of the last block; overwritten, batch by batch.
        ids: The tokens; needed for the data's labels.
        settings: Labels, their seed, and windows per pass.
    """
    _, head = body_and_head(body.model)
    generator = torch.Generator().manual_seed(settings.seed)
    uniform = torch.rand(ids.shape, generator=generator)
    for first in range(0, len(ids), settings.batch_windows):
        batch = slice(first, first + settings.batch_windows)
        inputs = states[batch].to(body.device).requires_grad_()
        with torch.enable_grad():
            finished = body.finish(inputs)
        rows = finished.detach().flatten(0, 1)
        following = ids[batch].roll(-1, 1)
        following[:, -1] = -1  # the last token of a window has no next one
        labels, draws = following.flatten().to(rows.device), uniform[batch].flatten()
        parts = [
            _head_gradient(
                head,
                rows[start : start + CHUNK_TOKENS],
                labels[start : start + CHUNK_TOKENS] if settings.labels == "data" else None,
                draws[start : start + CHUNK_TOKENS].to(rows.device),
            )
            for start in range(0, len(rows), CHUNK_TOKENS)
        ]
        at_end = torch.cat(parts).view_as(finished)
        (back,) = torch.autograd.grad(finished, inputs, at_end)
        states[batch] = back.to(states)


def _head_gradient(
    head: torch.nn.Module,
    rows: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"] | None,
    draws: Float[Tensor, " n"],
) -> Float[Tensor, "n d"]:
    """Return the gradient of the summed cross-entropy with respect to what the head reads.

    Args:
        head: Hidden states to logits.
        rows: Some tokens.
        labels: Their labels, -1 for none; ``None`` samples them.
        draws: In [0, 1): the label is where the cumulative distribution passes it.
    """
    leaf = rows.detach().requires_grad_()
    with torch.enable_grad():
        logits = head(leaf)
    # float32 at least: probabilities in half precision would not sum to 1.
    wide = torch.promote_types(logits.dtype, torch.float32)
    slope = logits.detach().to(wide).softmax(-1)
    if labels is None:
        total = slope.cumsum(-1)
        # right: a label without probability is never passed, not even by a draw of 0.
        passed = torch.searchsorted(total, draws[:, None] * total[:, -1:], right=True)
        chosen = passed.clamp_max(slope.shape[1] - 1)
    else:
        chosen = labels.clamp_min(0)[:, None]
    slope.scatter_add_(1, chosen, -torch.ones_like(chosen, dtype=slope.dtype))
    if labels is not None:
        slope[labels < 0] = 0.0
    (gradient,) = torch.autograd.grad(logits, leaf, slope.to(logits.dtype))
    return gradient
