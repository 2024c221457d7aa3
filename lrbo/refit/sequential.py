"""Refit the layers of an allocation, block after block, on the compressed model's own inputs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from lrbo.allocation.allocate import Allocation
from lrbo.allocation.apply import on_device, replaced, trial_modules
from lrbo.calibration.collect import CalibrationWarning, batches_of
from lrbo.calibration.statistics import Statistic
from lrbo.config.options import BELOW_1, FROM_0, FROM_0_TO_1, Options, at_least, option
from lrbo.errors import DataError
from lrbo.factorization.cache import LayerStatistics
from lrbo.factorization.factors import LowRankFactors
from lrbo.factorization.prediction import PREDICTION_SHRINKAGE, shrunk
from lrbo.factorization.prepared import Prepared
from lrbo.layers.modules import PRODUCTS, replace_module
from lrbo.linalg import psd_eigenpairs
from lrbo.models.blockwise import BlockwiseBody, Scratch
from lrbo.models.families import writers_of
from lrbo.models.model_map import linear_bias, linear_weight
from lrbo.models.specs import LayerSpec, ModelMap
from lrbo.refit.hidden_states import Streams
from lrbo.refit.regression import OutputErrors, OutputMetric, PairMoments, solve
from lrbo.tasks.model_task import Segments

# A layer's name -> the weights of its output errors, (out, out), or None for plain squares.
Metric = Callable[[str], Tensor | None]


@dataclass(frozen=True)
class RefitSettings(Options):
    """How a refit is solved and judged; ``experiments/01_factorizations`` has what was measured.

    Attributes:
        blend: Share of the dense model's input in the target, in [0, 1].
        feedback: Share, at least 0, of the residual stream's error so far that enters the target
            of the layers that add to it.
        ridge: Pull towards the dense weight, as a share of the mean eigenvalue of the input's
            second moment.
        held_back: Share of the windows, in [0, 1), that only judge the result, at least one of
            them; 0 accepts every layer unjudged.
        batch_windows: Windows per forward pass.
        memory_bytes: Main memory for hidden states; what exceeds it goes to a temporary file.
    """

    blend: float = option(0.5, FROM_0_TO_1)
    feedback: float = option(1.0, FROM_0)
    ridge: float = option(0.03, FROM_0)
    held_back: float = option(0.125, BELOW_1)
    batch_windows: int = option(4, at_least(1))
    memory_bytes: int = option(4 * 2**30, at_least(0))


@dataclass(frozen=True)
class RefitRow:
    """The errors of one layer before and after, as shares of its target's mean square.

    They are those on the windows that the refit saw, and on those held back, which only judge
    whether the new factors are ``accepted``.
    """

    name: str
    rank: int
    fitted_before: float
    fitted_after: float
    held_back_before: float | None
    held_back_after: float | None
    accepted: bool


@dataclass(frozen=True)
class Refit:
    """Factors of exactly the allocation's ranks, float32 on the CPU, and a report row per layer."""

    factors: dict[str, LowRankFactors]
    report: tuple[RefitRow, ...]


def output_metric(layers: ModelMap, statistics: LayerStatistics, power: float) -> Metric:
    """Weigh a layer's output errors by the second moment of its output gradients, if gathered.

    Power 1 takes a moment as it is, 0 weighs all outputs alike.
    """

    def metric(name: str) -> Tensor | None:
        moment = statistics.of(layers.by_name[name]).get(Statistic.OUTPUT_GRADIENT)
        if moment is None or power == 0:
            return None
        moment = shrunk(moment, PREDICTION_SHRINKAGE)
        if power == 1:
            return moment
        strength, axes = psd_eigenpairs(moment, f"{name}: output gradient moment")
        return (axes * strength**power) @ axes.T

    return metric


def refit(
    model: PreTrainedModel,
    layers: ModelMap,
    allocation: Allocation,
    prepared: Mapping[str, Prepared],
    windows: Any,
    settings: RefitSettings | None = None,
    *,
    judging: Int[Tensor, "others width"] | None = None,
    metric: Metric = lambda _: None,
    body: Segments | None = None,
    on_layer: Callable[[str], None] = lambda _: None,
) -> Refit:
    """Solve every compressed layer again on the inputs that its compressed predecessors give it.

    Hidden states of both models pass through the blocks side by side. Within a block, sites are
    refit in order, with everything before already refit: layers are solved in closed form
    (:func:`lrbo.refit.regression.solve`), and the better of old and new on windows held back stay.
    Layers that add to the residual stream also correct its error so far (``feedback``), as far as
    their inputs predict it.

    Windows held back are spread evenly over all texts. Old factors made from the same windows have
    seen these judges; fresh windows as ``judging`` are fair. Use at least as many tokens as the
    factors were made from: with half of them most layers became worse on fresh text.

    Args:
        model: Dense, in evaluation mode; left unchanged, also after an error.
        layers: Its map.
        allocation: An option per layer.
        prepared: By layer name, with the options of the allocation. Layers whose option is more
            than a product of two factors stay what they are, and so do embedding and head.
        windows: Examples, such as ``(windows, tokens)`` token ids; every position enters.
        settings: How it is solved and judged.
        judging: Windows of the same length to judge by instead of holding some back.
        metric: Called once per layer; see :func:`output_metric`.
        body: Runs the blocks; by default those of ``model`` as they are.
        on_layer: Called with the name of each finished layer.

    Raises:
        KeyError: If a layer with a rank has too few factors or none, or is in no block.
        DataError: If there are too few windows to hold one back.
        StatisticsError: If an input is not finite, naming the site.

    Note:
        The time is that of about two passes of the dense model, as much again for second moments,
        and one to two seconds per layer of a thousand features for its metric and solution.
        ``memory_bytes`` hold the hidden states of all windows twice, one block's site inputs once
        and its residual stream twice; moments take up to twice ``(2 in)^2`` float64 elements, or
        ``(in + out)^2`` where a layer has a target of its own.
    """
    settings = settings or RefitSettings()
    options = allocation.compressed
    ends = {spec.name for spec in layers.compressible if spec.block is None}
    ranks = {
        n: each.level[0] for n, each in options.items() if each.form in PRODUCTS and n not in ends
    }
    if not ranks:
        return Refit({}, ())
    specs = [spec for spec in layers.compressible if spec.name in ranks]
    factors = {n: prepared[n].part(options[n].family) for n in ranks if n in prepared}
    others = {n: o for n, o in options.items() if n not in ranks}
    moved = on_device(model, prepared, {n: {o.family: o.rank} for n, o in others.items()})
    outside = {n: others.pop(n) for n in ends & others.keys()}
    first = trial_modules(model, outside, moved, 0, {})
    held: dict[int, dict[str, nn.Module]] = {}
    for name, other in others.items():
        spec = layers.by_name[name]
        module = moved[name].trial_module(name, other, 0, {})
        held.setdefault(spec.block or 0, {})[_inside(spec)] = module
    largest = {name: each.max_rank for name, each in factors.items()}
    usable = {spec.name for spec in specs if ranks[spec.name] <= largest.get(spec.name, -1)}
    if names := ranks.keys() - usable:
        raise KeyError(
            f"{len(names)} of {len(ranks)} layers with a rank are in no block of the model or have "
            f"no factors for it: {min(names)} first; refit with the allocation and the factors of "
            "this model."
        )
    windows, seen = _held_back_last(windows, judging, settings.held_back)
    fitting = batches_of(0, seen, settings.batch_windows)
    unseen = batches_of(seen, len(windows), settings.batch_windows)
    body = BlockwiseBody(model) if body is None else body
    writers = writers_of(model.config) if settings.feedback else ()
    scratch = Scratch(settings.memory_bytes)
    with torch.no_grad():
        shares = settings.blend, settings.feedback
        streams = Streams(body, scratch, windows, [*fitting, *unseen], *shares, writers, first)
        tokens, widest = seen * streams.length, max(specs, key=lambda spec: spec.in_features)
        if tokens < widest.in_features:
            warnings.warn(
                f"the refit has {tokens} tokens for the {widest.in_features} features that "
                f"{widest.name} reads; its ridge of {settings.ridge:g} decides the rest. Give it "
                "more calibration tokens.",
                CalibrationWarning,
                stacklevel=2,
            )
        parts = [part for part in (fitting, unseen) if part]
        work = _Work(body, streams, settings, ranks, factors, held, metric, on_layer, parts)
        last = max(spec.block or 0 for spec in specs)
        for index in range(last + 1):
            members = [spec for spec in specs if spec.block == index]
            work.block(index, members, is_last=index == last)
    return Refit(work.refit, tuple(work.report))


def _inside(spec: LayerSpec) -> str:
    """Return the path of a layer inside its block."""
    return spec.name.partition(f".{spec.block}.")[2]


def _held_back_last(windows: Tensor, judging: Tensor | None, share: float) -> tuple[Tensor, int]:
    """Return all windows, those to judge by last, and the number to solve from."""
    count = len(windows)
    if judging is not None:
        return torch.cat([windows, judging]), count
    back = max(1, math.floor(count * share)) if share else 0
    if count <= back:
        raise DataError(
            f"the refit has {count} windows and holds {back} back to judge by "
            f"(held_back={share:g}), which leaves none to solve from; give it at least 2, or "
            "set held_back to 0"
        )
    held = {(2 * index + 1) * count // (2 * back) for index in range(back)}
    order = [index for index in range(count) if index not in held] + sorted(held)
    return windows[order], count - back


@dataclass
class _Work:
    """Refits one block after the other.

    ``parts`` are the batches to solve from and, if any windows judge, those to judge by.
    """

    body: Segments
    streams: Streams
    settings: RefitSettings
    ranks: Mapping[str, int]
    old: Mapping[str, LowRankFactors]
    held: Mapping[int, Mapping[str, nn.Module]]  # of each block, what stays what it is
    metric: Metric
    on_layer: Callable[[str], None]
    parts: Sequence[Sequence[slice]]
    refit: dict[str, LowRankFactors] = field(default_factory=dict)
    report: list[RefitRow] = field(default_factory=list)

    def block(self, index: int, specs: list[LayerSpec], *, is_last: bool) -> None:
        """Refit the layers of one block, and advance both streams past it."""
        sites = [list(members) for _, members in groupby(specs, key=lambda spec: spec.site)]
        with self.body.open_block(index) as block:
            self.streams.advance_dense(block, index, [_inside(m[0]) for m in sites])
            dense = {spec.name: block.get_submodule(_inside(spec)) for spec in specs}
            old = {_inside(s): self._module(s, self.old[s.name], dense[s.name]) for s in specs}
            with replaced(block, {**old, **self.held.get(index, {})}):
                for members in sites:
                    self._refit_site(block, index, members, dense)
                if not is_last:
                    self.streams.advance_compressed(block, index)

    def _refit_site(
        self, block: nn.Module, index: int, members: list[LayerSpec], dense: Mapping[str, nn.Module]
    ) -> None:
        """Refit the layers that read one site."""
        (first, *others), site = members, _inside(members[0])  # of others it may not be run
        writes = site in self.streams.writers
        assert not (writes and others), f"{first.name} and {others} add to the stream together"
        # Where several layers share the site, or one has more outputs than inputs, the drift itself
        # is smaller than what they should add.
        shares = others or (first.out_features > first.in_features and not writes)
        own = None if shares else linear_weight(dense[first.name])
        moments = [self.streams.moments(block, index, site, part, own) for part in self.parts]
        for spec in members:
            module, pairs = dense[spec.name], moments
            if own is None:
                weight = linear_weight(module).to(moments[0].mean)
                pairs = [each.mapped(weight, self.settings.blend) for each in moments]
            factors, row = self._refit_layer(spec, module, pairs)
            if row.accepted:
                replace_module(block, _inside(spec), self._module(spec, factors, module))
            self.refit[spec.name] = factors
            self.report.append(row)
            self.on_layer(spec.name)

    def _refit_layer(
        self, spec: LayerSpec, module: nn.Module, pairs: Sequence[PairMoments]
    ) -> tuple[LowRankFactors, RefitRow]:
        """Solve one layer, and return the better of its new and its old factors."""
        rank, cpu, like = self.ranks[spec.name], torch.device("cpu"), pairs[0].mean
        old = self.old[spec.name].to(dtype=torch.float32, device=cpu, max_rank=rank)
        weight, bias = linear_weight(module).to(like), linear_bias(module)
        bias = None if bias is None else bias.to(like)
        matrix = self.metric(spec.name)
        metric = OutputMetric(None if matrix is None else matrix.to(like), spec.name)
        new = solve(
            weight,
            bias,
            pairs[0],
            rank,
            ridge=self.settings.ridge,
            metric=metric,
            restore_means=old.center is not None,
            name=spec.name,
        ).to(dtype=torch.float32, device=cpu)
        errors = OutputErrors(weight, bias, pairs, metric)
        fitted, *judged = zip(errors.of(old, rank), errors.of(new, rank), strict=True)
        before, after = judged[0] if judged else (None, None)
        accepted = before is None or after is None or after < before
        row = RefitRow(spec.name, rank, *fitted, before, after, accepted)
        return new if accepted else old, row

    def _module(self, spec: LayerSpec, factors: LowRankFactors, dense: nn.Module) -> nn.Module:
        """The low-rank layer, in the precision that the model runs in."""
        rank, weight = self.ranks[spec.name], linear_weight(dense)
        cast = factors.to(dtype=weight.dtype, device=weight.device, max_rank=rank)
        return cast.at_rank(rank)
