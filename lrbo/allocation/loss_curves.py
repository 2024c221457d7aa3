"""Measured losses of single layers as some options, to check the predicted ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from lrbo.allocation.apply import replaced, trial_modules
from lrbo.allocation.loss_calibration import Measurement
from lrbo.errors import NonFiniteError
from lrbo.factorization.prepared import Prepared
from lrbo.layers.forms import Based, KeptRows, form_named, is_joint
from lrbo.layers.frequency_form import FrequencyGroups
from lrbo.layers.joint_form import Joint
from lrbo.layers.options import Menu, Option, Section
from lrbo.layers.product_form import Factored
from lrbo.models.blockwise import Scratch
from lrbo.models.specs import LayerSpec
from lrbo.tasks.model_task import ModelTask, Reference, Segments


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

    Embedding and head are measured too. Of low-rank forms the first on the menu is; bases are
    without a rank; what stands for no whole weight so, kept outputs and Kronecker sums, with the
    most that there is. Groups of rows, and what attentions or MLPs become as a whole, are at as
    many levels as ranks are; the latter at the layer that ends the part. Factors that layers
    share are not measured.
    """
    points = []
    known = [spec for spec in layers if spec.name in prepared]
    for kind in dict.fromkeys(spec.kind for spec in known):
        members = [spec for spec in known if spec.kind == kind]
        count = len(members) if members[0].block is None else settings.layers_per_kind
        count = min(count, len(members)) if settings.layers_per_kind else 0
        for index in range(count):
            spec = members[(2 * index + 1) * len(members) // (2 * count)]
            points += [(spec, option) for option in _options_of(spec, prepared, menus, settings)]
    return points


def _options_of(
    spec: LayerSpec,
    prepared: Mapping[str, Prepared],
    menus: Mapping[str, Menu],
    settings: SensitivitySettings,
) -> list[Option]:
    """Return the options of a layer that are measured: forms in their order, low ranks last."""
    options: list[Option] = []
    low: list[Option] = []
    for section in menus[spec.name].sections[:-1]:
        family, form = section.family, form_named(section.form)
        if isinstance(form, Joint):
            if form.is_whole and spec.is_closing and len(section.levels):
                last = section.levels[:, -1:].ravel().tolist()
                options += [family.at(n) for n in _spread(last, settings.ranks)] or [family]
            continue
        most = prepared[spec.name].part(family).max_rank
        if family.is_low_rank or isinstance(form, FrequencyGroups):
            tries = min(settings.ranks, 2 * most)  # enough for all ranks
            ranks = {max(1, round(most * (step + 1) / (tries + 1))) for step in range(tries)}
            own = [family.at(rank) for rank in sorted(ranks)]
            if isinstance(form, FrequencyGroups):
                options += own
            else:
                low = low or own
        else:
            is_whole = isinstance(form, Based) and not isinstance(form, KeptRows)
            options.append(family.at(0 if is_whole else most))
    return options + low


def _spread(values: Sequence[int], count: int) -> list[int]:
    """Pick values evenly from within a list."""
    at = {(step + 1) * len(values) // (count + 1) for step in range(count)} if values else ()
    return [values[index] for index in sorted(at)]


def measure_losses(
    body: Segments,
    points: Sequence[tuple[LayerSpec, Option]],
    prepared: Mapping[str, Prepared],
    windows: Any,
    settings: SensitivitySettings,
    *,
    task: ModelTask,
    layers: Sequence[LayerSpec] = (),
    on_point: Callable[[int], None] = lambda _: None,
) -> list[Measurement]:
    """Measure the divergence of some layers as some options, each with all other layers dense.

    Hidden states of the dense model are computed once; a point runs only the blocks from its layer
    on, on average half of them, and twice the head. One of embedding or head is scored as a trial
    is.

    In half precision rounding alone diverges by more than many ranks do, 0.001 nats for
    SmolLM2-135M in bfloat16, so the divergence of each layer at the largest rank is subtracted.

    Args:
        body: Of the dense model.
        points: As of :func:`points_of`.
        prepared: With predicted losses, in the dtype and on the device of the model.
        windows: Examples, best none that predictions are made of; ``settings.windows`` of them are
            taken evenly.
        settings: The number of windows.
        task: Defines the divergence.
        layers: Of the model, which tell the layers of an attention or MLP; needed only for options
            of a whole one.
        on_point: Called with 1 after each point.

    Raises:
        NonFiniteError: If a divergence is not finite, naming the layer and option.
    """
    count = min(settings.windows, len(windows))
    ids = windows[[index * len(windows) // count for index in range(count)]]
    measurements = []
    scratch = Scratch()
    reference: list[Reference] = []
    with torch.no_grad():
        hidden = body.embed(ids)
        entering = []
        for index in range(len(body)):
            entering.append(scratch.empty(*hidden.shape, dtype=hidden.dtype).copy_(hidden))
            with body.open_block(index) as block:
                hidden = body.run(block, index, hidden)
        dense = body.finish(hidden)

        def of_table(modules: Mapping[str, nn.Module]) -> float:
            """Score the model with another embedding or head."""
            if not reference:
                reference.append(task.measure_dense(body.model, ids))
            with replaced(body.model, modules):
                _, divergences = task.compared(body.model, ids, reference[0], 0)
            return float(divergences.mean())

        def from_block(first: int, modules: Mapping[str, nn.Module]) -> float:
            """Run the body from a block on, in which some layers are other ones."""
            hidden = entering[first].to(body.device)
            for index in range(first, len(body)):
                with (
                    body.open_block(index) as block,
                    replaced(body.model, modules if index == first else {}),
                ):
                    hidden = body.run(block, index, hidden)
            return task.distance(body, dense, body.finish(hidden))

        def divergence(spec: LayerSpec, option: Option) -> float:
            """Measure with a layer, or all of its attention or MLP, as an option."""
            names = [spec.name]
            if is_joint(option.form):
                names = [each.name for each in layers if each.closing == spec.name]
            options = dict.fromkeys(names, option)
            modules = trial_modules(body.model, options, prepared, 0, {})
            first = spec.block
            measured = of_table(modules) if first is None else from_block(first, modules)
            if not math.isfinite(measured):
                raise NonFiniteError(
                    f"{spec.name} as {option.label}: the divergence from the dense model is "
                    f"{measured}; the model overflows in {dense.dtype}"
                )
            return measured

        rounding: dict[str, float] = {}
        for spec, option in points:
            own, added = prepared[spec.name], 0.0
            if dense.dtype.itemsize < 4 and isinstance(form_named(option.form), Factored):
                if spec.name not in rounding:
                    most = own.part(option.family).max_rank
                    rounding[spec.name] = divergence(spec, option.family.at(most))
                added = rounding[spec.name]
            measured = max(divergence(spec, option) - added, 0.0)
            numbers = np.array([option.level], dtype=np.int64)
            level = Section(option.form, numbers, np.zeros((1, 3), np.int64))
            losses = own.losses(level)
            assert losses is not None
            predicted = float(losses[0])
            measurements.append(Measurement(spec.name, spec.kind, str(option), predicted, measured))
            on_point(1)
    return measurements
