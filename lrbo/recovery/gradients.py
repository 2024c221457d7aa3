"""What errors of a block's output cost: second moments of gradients, at the stream's own scale."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from lrbo.calibration.collect import batches_of
from lrbo.factorization.prediction import PREDICTION_SHRINKAGE, shrunk
from lrbo.linalg import add_gram, float64_device, mirror_upper, require_finite
from lrbo.models.blockwise import Scratch
from lrbo.tasks.model_task import ModelTask

TOKENS_PER_FEATURE = 8  # of the residual stream, that gradients are taken of
LARGEST_SCALE = 8.0  # of a token's state, beside the median

States = Float[Tensor, "*batch d"]


def windows_for(features: int, windows: int, tokens: int) -> int:
    """Return of how many windows gradients are taken."""
    return min(windows, max(math.ceil(TOKENS_PER_FEATURE * features / tokens), 1))


def scale_of(states: States) -> Float[Tensor, "*batch 1"]:
    """Return the root mean square of each token's state, float32; 1 where it is 0."""
    scale = states.float().square().mean(-1, keepdim=True).sqrt()
    return scale.masked_fill(scale == 0, 1.0)


@dataclass(frozen=True)
class Metric:
    """What errors of a block's output cost: ``1/2 (e/s)^T M (e/s)``, nats for a token.

    ``s`` is the scale of the token's state, ``most`` at most.
    """

    moment: Float[Tensor, "d d"]
    most: float

    def cost(self, error: States, target: States) -> Float[Tensor, "*batch"]:
        """Return the cost of each token's error."""
        scaled = error / scale_of(target).clamp_max(self.most)
        return (scaled @ self.moment * scaled).sum(-1) / 2


def output_metrics(
    dense: PreTrainedModel,
    task: ModelTask,
    windows: Any,
    *,
    seed: int,
    batch_windows: int,
    scratch: Scratch,
    on_block: Callable[[int], object] = lambda _: None,
) -> list[Metric]:
    """Return for each block ``M = E[s^2 g g^T]``, shrunk, float32 on the CPU.

    ``g`` is the gradient of the loss with respect to the block's output for a token, with labels
    sampled from the model, and ``s`` the root mean square of that output, 8 times the median at
    most. What follows reads the stream through norms: an error counts by its size beside the
    token's own state. The few tokens with states hundreds of times as large (Sun et al., *Massive
    Activations in Large Language Models*, COLM 2024) would be most of the loss without ``s``, and
    most of ``M`` without a limit to it.

    Args:
        dense: On its device, in evaluation mode.
        task: Whose loss is meant.
        windows: Examples of the task.
        seed: Of the labels.
        batch_windows: Per forward pass.
        scratch: For the states that enter all blocks.
        on_block: Called with 1 after each block, in each direction.

    Raises:
        StatisticsError: If a gradient is not finite, naming the block.
    """
    body = task.segments(dense)
    batches = batches_of(0, len(windows), batch_windows)
    entering: list[Tensor] = []  # each block, and last what leaves the last one
    with torch.no_grad():
        states = torch.cat([body.embed(windows[batch]).cpu() for batch in batches])
        for index in range(len(body)):
            entering.append(_stored(states, scratch))
            with body.open_block(index) as block:
                for batch in batches:
                    states[batch] = body.run(block, index, states[batch].to(body.device)).to(states)
            on_block(1)
    leaving = states.clone()
    scored = task.output_gradients(
        body, states, windows, labels="sampled", seed=seed, batch_windows=batch_windows
    )
    metrics: list[Metric] = []
    for index in reversed(range(len(body))):
        metrics.append(_metric(states, leaving, batches, scored, f"block {index}"))
        on_block(1)
        if index == 0:
            break
        leaving = entering[index]
        with body.open_block(index) as block:
            for batch in batches:
                inputs = leaving[batch].to(body.device).requires_grad_()
                with torch.enable_grad():
                    out = body.run(block, index, inputs)
                (back,) = torch.autograd.grad(out, inputs, states[batch].to(out))
                states[batch] = back.to(states)
    return metrics[::-1]


def _stored(states: Tensor, scratch: Scratch) -> Tensor:
    copy = scratch.empty(*states.shape, dtype=states.dtype)
    copy.copy_(states)
    return copy


def _metric(
    gradient: Tensor, states: Tensor, batches: list[slice], scored: int, name: str
) -> Metric:
    width = gradient.shape[-1]
    total = torch.zeros(width, width, dtype=torch.float64, device=float64_device(gradient.device))
    scale = scale_of(states)
    most = LARGEST_SCALE * float(scale.median())
    for batch in batches:
        rows = gradient[batch].float() * scale[batch].clamp_max(most)
        require_finite(f"{name}: the gradient of its output", rows)
        add_gram(total, rows.flatten(0, -2).double())
    moment = shrunk(mirror_upper(total) / scored, PREDICTION_SHRINKAGE)
    return Metric(moment.float(), most)
