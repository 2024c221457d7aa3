"""Measured losses of single layers at some ranks, to check the predicted ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lrbo.allocation.apply import replaced
from lrbo.allocation.loss_calibration import Measurement
from lrbo.errors import NonFiniteError
from lrbo.factorization.factors import LowRankFactors
from lrbo.models.blockwise import Scratch
from lrbo.models.specs import LayerSpec, ModelMap
from lrbo.tasks.model_task import ModelTask, Segments


@dataclass(frozen=True)
class SensitivitySettings:
    """The size of the check: layers of each kind (0 checks none), ranks per layer, and windows."""

    layers_per_kind: int = 3
    ranks: int = 3
    windows: int = 4


def points_of(
    layers: Sequence[LayerSpec],
    factors: Mapping[str, LowRankFactors],
    settings: SensitivitySettings,
) -> list[tuple[LayerSpec, int]]:
    """Spread layers of each kind evenly over depth, and ranks evenly up to the largest."""
    points = []
    for kind in dict.fromkeys(spec.kind for spec in layers):
        members = [spec for spec in layers if spec.kind == kind and spec.name in factors]
        count = min(settings.layers_per_kind, len(members))
        for index in range(count):
            spec = members[(2 * index + 1) * len(members) // (2 * count)]
            most = factors[spec.name].max_rank
            tries = min(settings.ranks, 2 * most)  # enough for all ranks
            ranks = {max(1, round(most * (step + 1) / (tries + 1))) for step in range(tries)}
            points += [(spec, rank) for rank in sorted(ranks)]
    return points


def measure_losses(
    body: Segments,
    layers: ModelMap,
    factors: Mapping[str, LowRankFactors],
    windows: Any,
    settings: SensitivitySettings,
    *,
    task: ModelTask,
    on_point: Callable[[int], None] = lambda _: None,
) -> list[Measurement]:
    """Measure the divergence of some layers at some ranks, each with all other layers dense.

    Hidden states of the dense model are computed once; a point runs only the blocks from its layer
    on, on average half of them, and twice the head.

    In half precision rounding alone diverges by more than many ranks do, 0.001 nats for
    SmolLM2-135M in bfloat16, so the divergence at the largest rank of each layer is subtracted.

    Args:
        body: Of the dense model.
        layers: Its map.
        factors: With predicted losses, in the dtype and on the device of the model.
        windows: Calibration examples, of which ``settings.windows`` are taken evenly.
        settings: The points.
        task: Defines the divergence.
        on_point: Called with 1 after each point.

    Raises:
        NonFiniteError: If a divergence is not finite, naming the layer and rank.
    """
    count = min(settings.windows, len(windows))
    ids = windows[[index * len(windows) // count for index in range(count)]]
    measurements = []
    scratch = Scratch()
    with torch.no_grad():
        hidden = body.embed(ids)
        entering = []
        for index in range(len(body)):
            entering.append(scratch.empty(*hidden.shape, dtype=hidden.dtype).copy_(hidden))
            with body.open_block(index) as block:
                hidden = body.run(block, index, hidden)
        dense = body.finish(hidden)

        def divergence(spec: LayerSpec, rank: int) -> float:
            """Run the body from the block of a layer on, with the layer at a rank."""
            assert spec.block is not None
            hidden = entering[spec.block].to(body.device)
            for index in range(spec.block, len(body)):
                with body.open_block(index) as block:
                    low = {spec.name: factors[spec.name].at_rank(rank)}
                    with replaced(body.model, low if index == spec.block else {}):
                        hidden = body.run(block, index, hidden)
            measured = task.distance(body, dense, body.finish(hidden))
            if not math.isfinite(measured):
                raise NonFiniteError(
                    f"{spec.name} at rank {rank}: the divergence from the dense model is "
                    f"{measured}; the model overflows in {hidden.dtype}"
                )
            return measured

        rounding: dict[str, float] = {}
        for spec, rank in points_of(layers.compressible, factors, settings):
            own = factors[spec.name]
            if dense.dtype.itemsize < 4 and spec.name not in rounding:
                rounding[spec.name] = divergence(spec, own.max_rank)
            measured = max(divergence(spec, rank) - rounding.get(spec.name, 0.0), 0.0)
            assert own.loss is not None
            predicted = float(own.loss[rank])
            measurements.append(Measurement(spec.name, spec.kind, rank, predicted, measured))
            on_point(1)
    return measurements
