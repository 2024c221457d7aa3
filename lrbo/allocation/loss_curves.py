"""Measured losses of single layers as some options, to check the predicted ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lrbo.allocation.apply import replaced
from lrbo.allocation.loss_calibration import Measurement
from lrbo.errors import NonFiniteError
from lrbo.factorization.prepared import Prepared
from lrbo.layers.forms import Based, KeptRows, form_named, is_joint
from lrbo.layers.options import Menu, Option
from lrbo.layers.product_form import Factored
from lrbo.models.blockwise import Scratch
from lrbo.models.specs import LayerSpec
from lrbo.tasks.model_task import ModelTask, Segments


@dataclass(frozen=True)
class SensitivitySettings:
    """The size of the check: layers of each kind (0 checks none), ranks per layer, and windows."""

    layers_per_kind: int = 3
    ranks: int = 3
    windows: int = 4


def points_of(
    layers: Sequence[LayerSpec],
    prepared: Mapping[str, Prepared],
    menus: Mapping[str, Menu],
    settings: SensitivitySettings,
) -> list[tuple[LayerSpec, Option]]:
    """Spread layers of each kind evenly over depth, and ranks evenly up to the largest.

    Embedding and head, which are in no block, are left out, and joint options, which are of no
    single layer.

    Of low-rank forms the first on the menu; bases without a rank, and what stands for no whole
    weight so, kept outputs and Kronecker sums, of the most that there is.
    """
    points = []
    inside = [spec for spec in layers if spec.block is not None]
    for kind in dict.fromkeys(spec.kind for spec in inside):
        members = [spec for spec in inside if spec.kind == kind and spec.name in prepared]
        count = min(settings.layers_per_kind, len(members))
        for index in range(count):
            spec = members[(2 * index + 1) * len(members) // (2 * count)]
            alone = [each for each in menus[spec.name].sections[:-1] if not is_joint(each.form)]
            families = [each.family for each in alone]
            for family in families:
                if not family.is_low_rank:
                    form = form_named(family.form)
                    is_whole = isinstance(form, Based) and not isinstance(form, KeptRows)
                    last = 0 if is_whole else prepared[spec.name].part(family).max_rank
                    points.append((spec, family.at(last)))
            low = next((family for family in families if family.is_low_rank), None)
            most = 0 if low is None else prepared[spec.name].part(low).max_rank
            tries = min(settings.ranks, 2 * most)  # enough for all ranks
            ranks = {max(1, round(most * (step + 1) / (tries + 1))) for step in range(tries)}
            points += [(spec, low.at(rank)) for rank in sorted(ranks) if low is not None]
    return points


def measure_losses(
    body: Segments,
    points: Sequence[tuple[LayerSpec, Option]],
    prepared: Mapping[str, Prepared],
    windows: Any,
    settings: SensitivitySettings,
    *,
    task: ModelTask,
    on_point: Callable[[int], None] = lambda _: None,
) -> list[Measurement]:
    """Measure the divergence of some layers as some options, each with all other layers dense.

    Hidden states of the dense model are computed once; a point runs only the blocks from its layer
    on, on average half of them, and twice the head.

    In half precision rounding alone diverges by more than many ranks do, 0.001 nats for
    SmolLM2-135M in bfloat16, so the divergence of each layer at the largest rank is subtracted.

    Args:
        body: Of the dense model.
        points: As of :func:`points_of`.
        prepared: With predicted losses, in the dtype and on the device of the model.
        windows: Calibration examples, of which ``settings.windows`` are taken evenly.
        settings: The number of windows.
        task: Defines the divergence.
        on_point: Called with 1 after each point.

    Raises:
        NonFiniteError: If a divergence is not finite, naming the layer and option.
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

        def divergence(spec: LayerSpec, option: Option) -> float:
            """Run the body from the block of a layer on, with the layer as an option."""
            assert spec.block is not None
            hidden = entering[spec.block].to(body.device)
            for index in range(spec.block, len(body)):
                with body.open_block(index) as block:
                    own = {spec.name: prepared[spec.name].trial_module(spec.name, option, 0, {})}
                    with replaced(body.model, own if index == spec.block else {}):
                        hidden = body.run(block, index, hidden)
            measured = task.distance(body, dense, body.finish(hidden))
            if not math.isfinite(measured):
                raise NonFiniteError(
                    f"{spec.name} as {option.label}: the divergence from the dense model is "
                    f"{measured}; the model overflows in {hidden.dtype}"
                )
            return measured

        rounding: dict[str, float] = {}
        for spec, option in points:
            own = prepared[spec.name].part(option.family)
            added = 0.0
            is_plain = isinstance(form_named(option.form), Factored)
            if dense.dtype.itemsize < 4 and is_plain:
                if spec.name not in rounding:
                    rounding[spec.name] = divergence(spec, option.family.at(own.max_rank))
                added = rounding[spec.name]
            measured = max(divergence(spec, option) - added, 0.0)
            assert own.loss is not None
            predicted = float(own.loss[option.level[-1]])
            measurements.append(Measurement(spec.name, spec.kind, str(option), predicted, measured))
            on_point(1)
    return measurements
