"""Pass text through the model block by block, and gather the statistics of its layers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from lrbo.calibration.moments import GradientMoments, HeadMoments, SiteMoments, TokenCounts
from lrbo.calibration.statistics import GRADIENT_STATISTICS, MATRICES, Statistic
from lrbo.models.blockwise import Scratch, States, watching
from lrbo.models.specs import LayerSpec, ModelMap
from lrbo.tasks.causal_lm import CausalLM
from lrbo.tasks.model_task import Labels, ModelTask, Segments

# By owner: the name of a site or layer.
StatisticsByOwner = Mapping[str, Mapping[Statistic, Tensor]]


class CalibrationWarning(UserWarning):
    """Calibration has fewer tokens than a moment needs for full rank."""


@dataclass(frozen=True)
class CalibrationSettings:
    """How statistics are gathered."""

    groups: int = 32  # of the pooled covariance, at most one per window
    batch_windows: int = 4  # per forward pass
    # "sampled" from the model itself, which gives the Fisher information, or those of the "data".
    labels: Labels = "sampled"
    gradient_share: float = 0.5  # of the windows, evenly spread
    seed: int = 0  # of the sampled labels
    memory_gib: float = 2.0  # for hidden states between blocks; what exceeds it goes to files

    def gradient_windows(self, windows: int) -> list[int]:
        """Return the indices of the windows for output gradients: at least one."""
        count = max(1, round(self.gradient_share * windows))
        return [index * windows // count for index in range(count)]


@dataclass(repr=False)
class Calibration:
    """Statistics in memory."""

    statistics: dict[str, dict[Statistic, Tensor]] = field(default_factory=dict)  # by owner
    weights: dict[str, Tensor] = field(default_factory=dict)  # samples of the model's parameters

    def __repr__(self) -> str:
        kinds = sorted({kind.value for each in self.statistics.values() for kind in each})
        owners = f"{len(self.statistics)} inputs and layers"
        return f"<statistics of {owners}: {', '.join(kinds) or 'none'}>"

    @classmethod
    def gather(cls, parts: Iterator[StatisticsByOwner]) -> Calibration:
        """Collect everything that :func:`calibrate` yields."""
        calibration = cls()
        for part in parts:
            for owner, statistics in part.items():
                calibration.statistics.setdefault(owner, {}).update(statistics)
        return calibration

    def of(self, spec: LayerSpec) -> dict[Statistic, Tensor]:
        """Return the statistics of a layer: those of its input and its own."""
        read = self.statistics.get
        return merged_statistics(read(spec.site, {}), read(spec.name, {}))


def merged_statistics(
    inputs: Mapping[Statistic, Tensor], own: Mapping[Statistic, Tensor]
) -> dict[Statistic, Tensor]:
    """Return the statistics of a layer, from those stored under its site's and its own name."""
    # A site has the name of its first layer, and so that layer's own statistics beside its own.
    shared = {key: value for key, value in inputs.items() if key not in GRADIENT_STATISTICS}
    return {**shared, **own}


def batches_of(start: int, stop: int, size: int) -> list[slice]:
    """Cut a range of windows into batches of ``size``; the last may be smaller."""
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]


def calibrate(
    body: Segments,
    layers: ModelMap,
    windows: Any,
    needs: Collection[Statistic],
    settings: CalibrationSettings,
    *,
    task: ModelTask | None = None,
    on_block: Callable[[int], object] = lambda _: None,
) -> Iterator[StatisticsByOwner]:
    """Gather statistics block by block, yielding each block's as soon as they are complete.

    The text passes once forward, and once backward if output gradients are needed: each block then
    runs again on its stored inputs, so that only the graph of one block and one batch exists.

    Args:
        body: Of the model.
        layers: Its map.
        windows: Examples of the task, such as ``(windows, tokens)`` token ids.
        needs: The statistics; none means no pass.
        settings: How to gather them.
        task: Whose loss is meant; by default that of causal language models.
        on_block: Called with 1 after each block, in each direction.

    Yields:
        Statistics of a block's sites on the CPU; then of its layers, last block first. All are
        float64 but gradients of weights, float32.
        Those of embedding and head, if the map covers them, come before, between and after these.

    Raises:
        StatisticsError: Naming a site or layer with a non-finite value or not every token; or if
            no token has a loss.
    """
    wanted = set(needs)
    if not wanted:
        return
    task = task or CausalLM()
    count = len(windows)
    of_inputs = wanted - GRADIENT_STATISTICS - {Statistic.TOKEN_FREQUENCY}
    of_gradients = wanted & GRADIENT_STATISTICS
    # Without pooling there is one group: the order of windows decides which labels are sampled.
    groups = settings.groups if Statistic.POOLED_INPUT_COVARIANCE in wanted else 1
    # Windows come text by text, and each group gets its part of each text: differences between
    # texts count as variation inside a group, not between groups.
    order = sorted(range(count), key=lambda window: window % groups)
    with_loss = set(settings.gradient_windows(count)) if of_gradients else set[int]()
    if not of_inputs:
        order = [index for index in order if index in with_loss]
    windows, membership = windows[order], [window % groups for window in order]
    with_gradient = torch.tensor([at for at, index in enumerate(order) if index in with_loss])
    scratch = Scratch(int(settings.memory_gib * 2**30))
    blocks = _Blocks(body, layers, scratch, settings.batch_windows)
    batches = batches_of(0, len(windows), settings.batch_windows)
    first = body.embed(windows[batches[0]])  # in some models more precise than the blocks
    length = first.shape[1]
    _announce_few_tokens(layers, count * length, len(with_loss) * length, wanted)
    hidden = scratch.empty(len(windows), *first.shape[1:], dtype=first.dtype)
    ends = _Ends(body, layers, wanted)
    with watching(body.model, ends.counts, lambda name, ids, _: ends.counts[name].update(ids)):
        for batch in batches:
            hidden[batch] = body.embed(windows[batch]).to(hidden)
    for name, counts in ends.counts.items():
        for owner in ends.with_rows_of(name):  # a tensor of its own for each, as files need
            yield {owner: counts.statistics(name, len(windows) * length)}
    entering: list[Tensor] = []
    for index in range(len(body)):
        if of_gradients:
            entering.append(_selected(hidden, with_gradient, scratch))
        sites, hidden = blocks.forward(index, hidden, membership, of_inputs)
        if of_inputs:
            tokens = len(windows) * length
            # One by one: sums and means of all at once would take twice the memory.
            yield {name: sites.pop(name).statistics(name, tokens) for name in list(sites)}
        del sites
        on_block(1)
    if not of_gradients:
        return
    examples, gradient = windows[with_gradient], _selected(hidden, with_gradient, scratch)
    scored = task.output_gradients(
        body,
        gradient,
        examples,
        labels=settings.labels,
        seed=settings.seed,
        batch_windows=settings.batch_windows,
        on_logits=None if ends.head is None else ends.head.update,
    )
    tokens = len(examples) * length
    if ends.head is not None:
        yield {ends.head.name: ends.head.statistics(tokens)}
    for index in reversed(range(len(body))):
        moments, gradient = blocks.backward(index, entering[index], gradient, of_gradients)
        yield {name: moments.pop(name).statistics(name, tokens, scored) for name in list(moments)}
        on_block(1)
    for name, rows in ends.rows.items():
        for batch in batches_of(0, len(gradient), settings.batch_windows):
            part = gradient[batch].to(body.device)
            rows.update(part, part)
        gathered = rows.statistics(name, tokens, scored)
        yield {name: {Statistic.ROW_GRADIENT: gathered[Statistic.OUTPUT_GRADIENT]}}


class _Ends:
    """What is gathered of embedding and head, by name, if a budget covers them."""

    def __init__(self, body: Segments, layers: ModelMap, needs: Collection[Statistic]) -> None:
        tables = [spec for spec in layers.compressible if spec.block is None]
        device, squares = body.device, {Statistic.OUTPUT_GRADIENT}
        lookups = {spec.name: spec for spec in tables if spec.is_lookup}
        self.counts = {
            name: TokenCounts(spec.out_features)
            for name, spec in lookups.items()
            if Statistic.TOKEN_FREQUENCY in needs
        }
        self.rows = {
            name: GradientMoments(squares, replace(spec, out_features=spec.in_features), device)
            for name, spec in lookups.items()
            if Statistic.ROW_GRADIENT in needs
        }
        heads = (HeadMoments(spec, device) for spec in tables if spec.multiplies)
        self.head = next(heads, None) if Statistic.LABEL_VARIANCE in needs else None

    def with_rows_of(self, name: str) -> list[str]:
        """Name an embedding, and the head with a weight of its own that has a row for each."""
        head = self.head
        if head is None or len(head.variance) != len(self.counts[name].counts):
            return [name]
        return list(dict.fromkeys([name, head.name]))


def _selected(hidden: States, indices: Int[Tensor, " selected"], scratch: Scratch) -> Tensor:
    """Copy some windows into new scratch space, without a temporary copy."""
    copy = scratch.empty(len(indices), *hidden.shape[1:], dtype=hidden.dtype)
    return torch.index_select(hidden, 0, indices, out=copy)


@dataclass(frozen=True)
class _Blocks:
    """Takes hidden states forward and gradients backward through single blocks."""

    body: Segments
    layers: ModelMap
    scratch: Scratch
    batch_windows: int

    def forward(
        self, index: int, hidden: States, membership: Sequence[int], needs: Collection[Statistic]
    ) -> tuple[dict[str, SiteMoments], Tensor]:
        """Run a block; return the moments by site, and its output."""
        device = self.body.device
        specs = self._specs(index) if needs else []
        moments = {spec.site: SiteMoments(needs, spec.in_features, device) for spec in specs}

        def step(batch: slice) -> Tensor:
            groups, closes_last = _groups_in(membership, batch)

            def watch(site: str, inputs: Tensor, _output: Tensor) -> None:
                windows = inputs.reshape(-1, hidden.shape[1], inputs.shape[-1])
                moments[site].update(windows, groups, closes_last=closes_last)

            with watching(self.body.model, moments, watch):
                return self.body.run(block, index, hidden[batch].to(device))

        with self.body.open_block(index) as block, torch.no_grad():
            return moments, self._replaced(hidden, step)

    def backward(
        self, index: int, entering: States, gradient: Tensor, needs: Collection[Statistic]
    ) -> tuple[dict[str, GradientMoments], Tensor]:
        """Backpropagate through a block; return the moments by layer, and its input's gradients."""
        device = self.body.device
        moments = {spec.name: GradientMoments(needs, spec, device) for spec in self._specs(index)}

        def by_window(rows: Tensor) -> Tensor:
            return rows.detach().reshape(-1, entering.shape[1], rows.shape[-1])

        def watch(name: str, inputs: Tensor, output: Any) -> None:
            x = by_window(inputs)
            output.register_hook(lambda g: moments[name].update(x, by_window(g)))

        def step(batch: slice) -> Tensor:
            inputs = entering[batch].to(device).requires_grad_()
            with torch.enable_grad():
                out = self.body.run(block, index, inputs)
            return torch.autograd.grad(out, inputs, gradient[batch].to(out))[0]

        model = self.body.model
        with self.body.open_block(index) as block, watching(model, moments, watch):
            return moments, self._replaced(gradient, step)

    def _specs(self, index: int) -> list[LayerSpec]:
        return [spec for spec in self.layers.compressible if spec.block == index]

    def _replaced(self, states: Tensor, step: Callable[[slice], Tensor]) -> Tensor:
        """Replace states batch by batch, in place where their shape stays the same."""
        result = states
        for batch in batches_of(0, len(states), self.batch_windows):
            part = step(batch)
            if part.shape[1:] != result.shape[1:]:
                result = self.scratch.empty(len(states), *part.shape[1:], dtype=states.dtype)
            result[batch] = part.to(result)
        return result


def _groups_in(membership: Sequence[int], batch: slice) -> tuple[list[int], bool]:
    """Return the windows of each group in a batch, and whether its last group ends with it."""
    sizes = [len(list(windows)) for _, windows in groupby(membership[batch])]
    following = membership[batch.stop : batch.stop + 1]
    return sizes, not following or following[0] != membership[batch.stop - 1]


def _announce_few_tokens(
    layers: ModelMap, tokens: int, seen: int, needs: Collection[Statistic]
) -> None:
    """Warn where a matrix cannot have full rank."""
    messages = []
    inside = [spec for spec in layers.compressible if spec.block is not None]
    widest = max(spec.in_features for spec in inside)
    tallest = max(spec.out_features for spec in inside)
    if (MATRICES - GRADIENT_STATISTICS) & set(needs) and tokens <= widest:
        messages.append(
            f"{tokens} calibration tokens for inputs of up to {widest} features: covariances are "
            "singular. Use more data.calibration.tokens."
        )
    if Statistic.OUTPUT_GRADIENT in needs and seen <= tallest:
        messages.append(
            f"{seen} tokens with gradients for outputs of up to {tallest} features: their moments "
            "are singular, and rest on method.output_shrinkage. Use more data.calibration.tokens, "
            "or a larger calibration.gradient_share."
        )
    for message in messages:
        warnings.warn(message, CalibrationWarning, stacklevel=3)
