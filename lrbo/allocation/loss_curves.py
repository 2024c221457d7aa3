"""Loss curves: what each layer costs at each rank, in nats per token, calibrated by measurement."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from lrbo.blockwise import BlockwiseBody, Scratch
from lrbo.compression import replace_module
from lrbo.errors import NonFiniteError
from lrbo.loss_calibration import Measurement
from lrbo.model import body_and_head
from lrbo.nested import LowRankFactors
from lrbo.specs import LayerSpec, ModelMap

Curves = Mapping[str, NDArray[np.float64]]
CHUNK_TOKENS = 256  # rows of logits at a time


def predicted_curves(factors: Mapping[str, LowRankFactors]) -> Curves:
    """Return the predicted loss of each layer at each rank; ``{}`` without gradients."""
    return {
        name: found.loss.numpy().astype(np.float64)
        for name, found in factors.items()
        if found.loss is not None
    }


@dataclass(frozen=True)
class SensitivitySettings:
    """How predictions are checked against the model.

    Attributes:
        layers_per_kind: Layers of each kind that are tried, evenly spread over depth; 0 trusts
            the predictions as they are.
        ranks: Ranks tried per layer, evenly spread.
        windows: Calibration windows that are scored.
    """

    layers_per_kind: int = 3
    ranks: int = 3
    windows: int = 4

    def points(
        self, layers: Sequence[LayerSpec], factors: Mapping[str, LowRankFactors]
    ) -> list[tuple[LayerSpec, int]]:
        """Choose layers of each kind evenly over depth, and ranks evenly over what they may have.

        Args:
            layers: Of the model.
            factors: Of those that have any.
        """
        chosen = []
        for kind in dict.fromkeys(spec.kind for spec in layers):
            members = [spec for spec in layers if spec.kind == kind and spec.name in factors]
            count = min(self.layers_per_kind, len(members))
            for index in range(count):
                spec = members[(2 * index + 1) * len(members) // (2 * count)]
                most = factors[spec.name].max_rank
                tries = min(self.ranks, 2 * most)  # which are all that there are
                ranks = {max(1, round(most * (step + 1) / (tries + 1))) for step in range(tries)}
                chosen += [(spec, rank) for rank in sorted(ranks)]
        return chosen


def measure_losses(
    body: BlockwiseBody,
    layers: ModelMap,
    factors: Mapping[str, LowRankFactors],
    curves: Curves,
    windows: Int[Tensor, "windows tokens"],
    settings: SensitivitySettings,
    *,
    memory_gib: float = 2.0,
    on_point: Callable[[int], None] | None = None,
) -> list[Measurement]:
    """Measure what some layers cost at some ranks, each with all other layers dense.

    The dense text passes through the blocks once; a point runs only what comes after its layer.
    So a point costs about half a forward pass over these windows and two passes of the head.

    In half precision any change of a layer costs something by rounding alone, 0.001 nats for
    SmolLM2-135M in bfloat16, which is more than many a cut. What a layer costs at its largest
    rank is that and nothing else: it is measured too, a point per layer, and subtracted.

    Args:
        body: Of the dense model.
        layers: Its map.
        factors: In the dtype and on the device of the model.
        curves: Predictions by layer.
        windows: Calibration ids; the first ``settings.windows`` of an even spread are used.
        settings: Which points.
        memory_gib: Main memory for hidden states.
        on_point: Told 1 after each point.

    Raises:
        NonFiniteError: If a divergence is not finite, naming the layer and rank.
    """
    points = settings.points(layers.compressible, factors)
    count = min(settings.windows, len(windows))
    ids = windows[[index * len(windows) // count for index in range(count)]]
    found = []
    with Scratch(int(memory_gib * 2**30)) as scratch, torch.no_grad():
        hidden = body.embed(ids)
        entering = []
        for index in range(len(body)):
            entering.append(scratch.empty(*hidden.shape, dtype=hidden.dtype).copy_(hidden))
            with body.open_block(index) as block:
                hidden = body.run(block, index, hidden)
        dense = body.finish(hidden)
        at = partial(_loss_at, body, factors, entering, dense)
        floors: dict[str, float] = {}
        for spec, rank in points:
            if dense.dtype.itemsize < 4 and spec.name not in floors:
                floors[spec.name] = at(spec, factors[spec.name].max_rank)
            measured = max(at(spec, rank) - floors.get(spec.name, 0.0), 0.0)
            predicted = float(curves[spec.name][rank])
            found.append(Measurement(spec.name, spec.kind, rank, predicted, measured))
            if on_point is not None:
                on_point(1)
    return found


def _loss_at(
    body: BlockwiseBody,
    factors: Mapping[str, LowRankFactors],
    entering: Sequence[Float[Tensor, "windows tokens d"]],
    dense: Float[Tensor, "windows tokens d"],
    spec: LayerSpec,
    rank: int,
) -> float:
    """Return the divergence with one layer at a rank, from what enters its block on.

    Raises:
        NonFiniteError: If it is not finite, naming the layer and rank.
    """
    assert spec.block is not None
    hidden = entering[spec.block].to(body.device)
    for index in range(spec.block, len(body)):
        with body.open_block(index) as block:
            if index == spec.block:
                low = factors[spec.name].at_rank(rank)
                before = replace_module(body.model, spec.name, low)
                try:
                    hidden = body.run(block, index, hidden)
                finally:
                    replace_module(body.model, spec.name, before)
            else:
                hidden = body.run(block, index, hidden)
    measured = _divergence(body, dense, body.finish(hidden))
    if not math.isfinite(measured):
        raise NonFiniteError(
            f"{spec.name} at rank {rank}: the divergence from the dense model is "
            f"{measured}; the model overflows in {hidden.dtype}"
        )
    return measured


def _divergence(
    body: BlockwiseBody,
    dense: Float[Tensor, "windows tokens d"],
    other: Float[Tensor, "windows tokens d"],
) -> float:
    """Return the mean ``KL(dense || other)`` of next-token distributions, nats per token."""
    _, head = body_and_head(body.model)
    total = 0.0
    rows, others = dense.flatten(0, 1), other.flatten(0, 1)
    pairs = zip(torch.split(rows, CHUNK_TOKENS), torch.split(others, CHUNK_TOKENS), strict=True)
    for p, q in pairs:
        log_p = head(p).float().log_softmax(-1)
        log_q = head(q).float().log_softmax(-1)
        total += float((log_p.exp() * (log_p - log_q)).sum(-1).double().sum())
    return total / len(rows)
