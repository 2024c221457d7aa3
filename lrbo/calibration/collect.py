"""One pass of text through the model, hooks in, moments out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lrbo.blockwise import BlockwiseBody, Scratch, watching_inputs
from lrbo.calibration.gradients import GradientMoments, Labels, loss_gradients, scored_tokens
from lrbo.calibration.sites import SiteMoments
from lrbo.factorization.base import GRADIENT_STATISTICS, Statistic
from lrbo.specs import LayerSpec, ModelMap

OnBlock = Callable[[int], None]
# Statistics by the name of the site or layer that they belong to.
Found = Mapping[str, Mapping[Statistic, Tensor]]


class CalibrationWarning(UserWarning):
    """Calibration text that leaves statistics poorer than they look."""


@dataclass(frozen=True)
class CalibrationSettings:
    """How statistics are gathered.

    Attributes:
        groups: Groups of the pooled covariance, at most one per window.
        batch_windows: Windows per forward pass.
        labels: What the loss of output gradients is taken of: ``"sampled"`` from the model
            itself, which gives the Fisher information, or the ``"data"``'s own next tokens.
        gradient_share: Share of the windows that output gradients are taken on, evenly spread.
        seed: Of the sampled labels.
        memory_gib: Main memory for hidden states between blocks; beyond it they are in files.
    """

    groups: int = 32
    batch_windows: int = 4
    labels: Labels = "sampled"
    gradient_share: float = 0.5
    seed: int = 0
    memory_gib: float = 2.0

    def gradient_windows(self, windows: int) -> list[int]:
        """Return which windows output gradients are taken on: at least one."""
        count = max(1, round(self.gradient_share * windows))
        return [index * windows // count for index in range(count)]


@dataclass(repr=False)
class Calibration:
    """What calibration found, in memory.

    Attributes:
        found: Statistics by the name of the site or layer that they belong to.
        weights: Samples of the parameters of the model that they were gathered from, by name.
    """

    found: dict[str, dict[Statistic, Tensor]] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Return which statistics there are, without the numbers."""
        kinds = sorted({key.value for statistics in self.found.values() for key in statistics})
        return f"<statistics of {len(self.found)} inputs and layers: {', '.join(kinds) or 'none'}>"

    @classmethod
    def gather(cls, parts: Iterator[Found]) -> Calibration:
        """Keep everything that :func:`calibrate` yields."""
        calibration = cls()
        for part in parts:
            for owner, statistics in part.items():
                calibration.found.setdefault(owner, {}).update(statistics)
        return calibration

    def of(self, spec: LayerSpec) -> dict[Statistic, Tensor]:
        """Return the statistics of a layer, those of its input and its own: what there are."""
        return merged_statistics(self.found.get(spec.site, {}), self.found.get(spec.name, {}))


def merged_statistics(
    inputs: Mapping[Statistic, Tensor], own: Mapping[Statistic, Tensor]
) -> dict[Statistic, Tensor]:
    """Return what belongs to a layer, of what is kept under its site's and its own name."""
    found = {key: value for key, value in inputs.items() if key not in GRADIENT_STATISTICS}
    return found | {key: value for key, value in own.items() if key in GRADIENT_STATISTICS}


def group_of_window(windows: int, groups: int) -> list[int]:
    """Deal windows out to groups; sizes differ by at most one window.

    Windows come text by text. Dealt out, every group has its part of each text, so that what
    tells texts apart counts as variation inside a group, not as a difference between groups.
    """
    groups = min(groups, windows)
    return [index % groups for index in range(windows)]


def calibrate(
    body: BlockwiseBody,
    layers: ModelMap,
    windows: Int[Tensor, "windows tokens"],
    needs: Collection[Statistic],
    settings: CalibrationSettings,
    *,
    on_block: OnBlock | None = None,
) -> Iterator[Found]:
    """Gather statistics block by block, and hand each block's out as soon as it is done.

    The text passes through the blocks once, in order, and once back from the last to the first
    if output gradients are needed; of a block, what enters it is kept and it is run again, so
    that the graph of one block and one batch is all that exists. No gradient of a parameter is
    ever formed. So memory holds the statistics and weights of one block, and the hidden states.

    Args:
        body: Of the model.
        layers: Its map.
        windows: ``(windows, tokens)`` token ids; every position enters.
        needs: What to gather. Nothing needed means no pass.
        settings: How.
        on_block: Told 1 after each block, in each direction.

    Yields:
        Statistics of a block, float64 on the CPU: of its sites, then (in a second round, from
        the last block to the first) of its layers.

    Raises:
        StatisticsError: If a site or layer saw a non-finite value, naming it, or not every token;
            or if no token has a loss.
    """
    wanted = set(needs)
    if not wanted:
        return
    of_inputs, of_gradients = wanted - GRADIENT_STATISTICS, wanted & GRADIENT_STATISTICS
    # Without pooling there is one group: the order of windows decides which labels are sampled.
    groups = settings.groups if Statistic.POOLED_INPUT_COVARIANCE in wanted else 1
    dealt = group_of_window(len(windows), groups)
    order = sorted(range(len(windows)), key=dealt.__getitem__)  # group by group
    _announce_few_tokens(layers, windows, settings, wanted)
    chosen = set(settings.gradient_windows(len(windows))) if of_gradients else set[int]()
    if not of_inputs:
        order = [index for index in order if index in chosen]
    windows, membership = windows[order], [dealt[index] for index in order]
    with_gradient = torch.tensor([place for place, index in enumerate(order) if index in chosen])
    scored = scored_tokens(windows[with_gradient], settings.labels) if of_gradients else 0
    batches = [
        slice(first, min(first + settings.batch_windows, len(windows)))
        for first in range(0, len(windows), settings.batch_windows)
    ]
    by_block = {
        index: [spec for spec in layers.compressible if spec.block == index]
        for index in range(len(body))
    }
    with Scratch(int(settings.memory_gib * 2**30)) as scratch:
        first = body.embed(windows[batches[0]])  # some models embed in more precision than they run
        hidden = scratch.empty(*windows.shape, first.shape[-1], dtype=first.dtype)
        for batch in batches:
            hidden[batch] = body.embed(windows[batch]).to(hidden)
        entering: list[Tensor] = []
        for index, specs in by_block.items():
            if of_gradients:
                entering.append(_picked(hidden, with_gradient, scratch))
            sites = _through_block(body, index, specs, hidden, batches, membership, of_inputs)
            if of_inputs:
                tokens = windows.numel()
                # Taken out one by one: sums and means of all would be twice the memory.
                yield {name: sites.pop(name).statistics(name, tokens) for name in list(sites)}
            del sites
            if on_block is not None:
                on_block(1)
        if not of_gradients:
            return
        ids, gradient = windows[with_gradient], _picked(hidden, with_gradient, scratch)
        loss_gradients(body, gradient, ids, settings)
        for index in reversed(by_block):
            found = _back_through_block(
                body, index, by_block[index], entering[index], gradient, settings, of_gradients
            )
            tokens = ids.numel()
            yield {name: found.pop(name).statistics(name, tokens, scored) for name in list(found)}
            if on_block is not None:
                on_block(1)


def _picked(
    hidden: Float[Tensor, "windows tokens d"], places: Int[Tensor, " picked"], scratch: Scratch
) -> Float[Tensor, "picked tokens d"]:
    """Copy some windows to where there is room, and nowhere else on the way."""
    found = scratch.empty(len(places), *hidden.shape[1:], dtype=hidden.dtype)
    return torch.index_select(hidden, 0, places, out=found)


def _through_block(
    body: BlockwiseBody,
    index: int,
    specs: Sequence[LayerSpec],
    hidden: Float[Tensor, "windows tokens d"],
    batches: Sequence[slice],
    membership: Sequence[int],
    needs: Collection[Statistic],
) -> dict[str, SiteMoments]:
    """Take the hidden states through a block, in place, and gather what its sites read."""
    found = {
        spec.site: SiteMoments.empty(needs, spec.in_features, body.device)
        for spec in specs
        if needs
    }
    spans: list[tuple[int, int, bool]] = []

    def watch(site: str, inputs: Tensor) -> None:
        found[site].update(inputs.reshape(-1, hidden.shape[1], inputs.shape[-1]), spans)

    watched = watching_inputs(body.model, found, watch)
    with body.open_block(index) as block, watched, torch.no_grad():
        for batch in batches:
            spans[:] = _spans(membership, batch.start, batch.stop - batch.start)
            out = body.run(block, index, hidden[batch].to(body.device))
            hidden[batch] = out.to(hidden)
    return found


def _back_through_block(
    body: BlockwiseBody,
    index: int,
    specs: Sequence[LayerSpec],
    entering: Float[Tensor, "windows tokens d"],
    gradient: Float[Tensor, "windows tokens d"],
    settings: CalibrationSettings,
    needs: Collection[Statistic],
) -> dict[str, GradientMoments]:
    """Take gradients back through a block, in place, and gather those of its layers."""
    found = {
        spec.name: GradientMoments.empty(needs, spec.out_features, spec.in_features, body.device)
        for spec in specs
    }

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def answered(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            del module
            x = inputs[0].detach()
            untyped: Any = output
            untyped.register_hook(
                lambda g: found[name].update(x.flatten(0, -2), g.detach().flatten(0, -2))
            )

        return answered

    with body.open_block(index) as block:
        handles = [
            body.model.get_submodule(name).register_forward_hook(hook(name)) for name in found
        ]
        try:
            for first in range(0, len(entering), settings.batch_windows):
                batch = slice(first, first + settings.batch_windows)
                inputs = entering[batch].to(body.device).requires_grad_()
                with torch.enable_grad():
                    out = body.run(block, index, inputs)
                (back,) = torch.autograd.grad(out, inputs, gradient[batch].to(out))
                gradient[batch] = back.to(gradient)
        finally:
            for handle in handles:
                handle.remove()
    return found


def _spans(membership: Sequence[int], first: int, count: int) -> list[tuple[int, int, bool]]:
    """Cut a batch of windows at the borders of groups: (start, stop, closes the group)."""
    spans: list[tuple[int, int, bool]] = []
    start = 0
    for index in range(count):
        here = first + index
        ends = here + 1 == len(membership) or membership[here + 1] != membership[here]
        if ends or index + 1 == count:
            spans.append((start, index + 1, ends))
            start = index + 1
    return spans


def _announce_few_tokens(
    layers: ModelMap,
    windows: Int[Tensor, "windows tokens"],
    settings: CalibrationSettings,
    needs: Collection[Statistic],
) -> None:
    """Warn where a covariance cannot have full rank."""
    tokens = windows.numel()
    widest = max(spec.in_features for spec in layers.compressible)
    matrices = {Statistic.INPUT_COVARIANCE, Statistic.POOLED_INPUT_COVARIANCE}
    if matrices & set(needs) and tokens <= widest:
        warnings.warn(
            f"{tokens} calibration tokens for inputs of up to {widest} features: covariances "
            "are singular, and directions that no token has are cut first. Use more "
            "data.calibration.tokens.",
            CalibrationWarning,
            stacklevel=3,
        )
    tallest = max(spec.out_features for spec in layers.compressible)
    seen = len(settings.gradient_windows(len(windows))) * windows.shape[1]
    if Statistic.OUTPUT_GRADIENT in needs and seen <= tallest:
        warnings.warn(
            f"{seen} tokens with gradients for outputs of up to {tallest} features: gradient "
            "moments are singular, and rest on method.output_shrinkage. Use more "
            "data.calibration.tokens, or a larger calibration.gradient_share.",
            CalibrationWarning,
            stacklevel=3,
        )
