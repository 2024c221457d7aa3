"""Solve chosen ranks again, block after block, on the inputs that the compressed model sees."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from lrbo.allocation import Allocation
from lrbo.blockwise import BlockwiseBody
from lrbo.compression import replace_module
from lrbo.errors import DataError
from lrbo.families import writers_of
from lrbo.model import linear_bias, linear_weight
from lrbo.nested import LowRankFactors
from lrbo.reduced_rank import OutputError, OutputMetric, PairMoments, solve
from lrbo.specs import LayerSpec, ModelMap
from lrbo.streams import Asked, Streams

# Of a layer, by name: what weighs its output errors, or None for plain squares.
Metric = Callable[[str], Tensor | None]


class FewTokensWarning(UserWarning):
    """A refit has fewer tokens than features: the ridge decides more than the data."""


@dataclass(frozen=True)
class RefitSettings:
    """How a refit is solved and judged; ``experiments/01_factorizations`` has what was measured.

    Attributes:
        blend: Share of the dense model's input in the target, in [0, 1].
        feedback: Share, from 0 on, of what the residual stream lacks so far that the layers which
            add to it are asked to bring.
        ridge: Pull towards the dense weight, as a share of the mean eigenvalue of the input's
            second moment.
        held_back: Share of the windows that judge the result and do not enter it, in [0, 1);
            at least one window, unless 0: then nothing is judged and every layer is taken.
        centred: Whether layers whose factors restore the mean output do so after the refit too;
            else they are solved around zero and keep the dense bias.
        batch_windows: Windows per forward pass.
        memory_bytes: Hidden states and inputs of one block are kept in main memory up to this
            size, and beyond it in a temporary file.
    """

    blend: float = 0.5
    feedback: float = 1.0
    ridge: float = 0.03
    held_back: float = 0.125
    centred: bool = True
    batch_windows: int = 4
    memory_bytes: int = 4 * 2**30

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if not 0.0 <= self.blend <= 1.0:
            raise ValueError(f"blend={self.blend} is outside [0, 1].")
        if not 0.0 <= self.feedback < math.inf:
            raise ValueError(f"feedback={self.feedback} is negative or not finite.")
        if not 0.0 <= self.ridge < math.inf:
            raise ValueError(f"ridge={self.ridge} is negative or not finite.")
        if not 0.0 <= self.held_back < 1.0:
            raise ValueError(f"held_back={self.held_back} is outside [0, 1).")
        if self.batch_windows < 1:
            raise ValueError(f"batch_windows={self.batch_windows} is below 1.")


@dataclass(frozen=True)
class RefitRow:
    """What became of one layer. Errors are mean squares as shares of the target's.

    Attributes:
        name: The layer.
        rank: Its rank.
        fitted_before: Error of the old factors on the windows that the refit saw.
        fitted_after: Error of the new factors there.
        held_back_before: Error of the old factors on the windows held back, or ``None``
            without such.
        held_back_after: Error of the new factors there.
        taken: Whether the new factors replaced the old.
    """

    name: str
    rank: int
    fitted_before: float
    fitted_after: float
    held_back_before: float | None
    held_back_after: float | None
    taken: bool


@dataclass(frozen=True)
class Refit:
    """Factors of exactly the chosen ranks, and how they were come by.

    Attributes:
        factors: By layer name, for every layer with a rank: float32, on the CPU.
        report: One row per layer, in the order in which they were solved.
    """

    factors: dict[str, LowRankFactors]
    report: tuple[RefitRow, ...]


def refit(
    model: PreTrainedModel,
    layers: ModelMap,
    allocation: Allocation,
    factors: Mapping[str, LowRankFactors],
    windows: Int[Tensor, "windows tokens"],
    settings: RefitSettings | None = None,
    *,
    judging: Int[Tensor, "others width"] | None = None,
    metric: Metric | None = None,
    body: BlockwiseBody | None = None,
    on_layer: Callable[[str], None] | None = None,
) -> Refit:
    r"""Solve every compressed layer again on inputs that its compressed predecessors give it.

    Two streams of hidden states go through the model, one of the dense and one of the
    compressed model. In each block the inputs of one site after the other are gathered with
    everything before it already refit, the layers of the site are solved in closed form
    (:func:`lrbo.reduced_rank.solve`), compared with the old ones on windows held back, and
    put in place where they are better.

    The layers that add to the residual stream are also asked for what it lacks by then
    (``feedback``), as far as their inputs tell: what blocks before have lost is not carried on.

    Held back are windows spread evenly over all, so that each text has its part. Where the old
    factors were made from the same windows, they know those held back and the new ones do not:
    windows that neither has seen, as ``judging``, are the fair judges, and leave all others to
    solve from. Give the refit no fewer tokens than the factors were made from: with half of them
    most layers became worse on fresh text.

    Args:
        model: Dense, in evaluation mode; afterwards as before, whatever happens.
        layers: Its map.
        allocation: Ranks by layer name; ``None`` is dense.
        factors: By layer name; of any rank from the chosen one on.
        windows: ``(windows, tokens)`` token ids; every position enters.
        settings: How; by default :class:`RefitSettings`.
        judging: Windows of the same length to judge by; nothing is held back then.
        metric: Gives the ``(out, out)`` weights of a layer's output errors by its name, such as
            the second moment of the loss's gradient, or ``None`` for plain squares; asked once
            for each layer.
        body: Runs the blocks; by default from ``model`` as it is.
        on_layer: Told the name of each finished layer.

    Raises:
        KeyError: If a layer with a rank has no factors, or is in no block of the model.
        ValueError: If factors have fewer directions than the chosen rank.
        DataError: If there are too few windows to hold one back.
        StatisticsError: If an input is not finite, naming the site.

    Note:
        Per block one pass of the dense model, which stores what the sites read, and one of the
        compressed model, and one pass per site that stops where the site begins: for a block
        of llama's form these come to 1.2 passes more. Second moments cost about as much again.
        Main memory holds the hidden states of all windows twice, one block's site inputs once
        and its residual stream twice, up to ``memory_bytes``; moments are float64, twice
        ``(2 in)^2`` numbers, or ``(in + out)^2`` for a layer that adds to the stream or is
        alone at its site and no taller than wide.
    """
    settings = RefitSettings() if settings is None else settings
    chosen = _chosen(layers, allocation, factors)
    if not chosen:
        return Refit({}, ())
    windows, seen = _held_back_last(windows, judging, settings.held_back)
    step = settings.batch_windows
    fitting = [slice(first, min(first + step, seen)) for first in range(0, seen, step)]
    unseen = [
        slice(first, min(first + step, len(windows))) for first in range(seen, len(windows), step)
    ]
    body = BlockwiseBody(model) if body is None else body
    writers = writers_of(model.config) if settings.feedback else ()
    with torch.no_grad():
        streams = Streams(body, windows, [*fitting, *unseen], settings.memory_bytes, writers)
        try:
            work = _Work(
                body, streams, settings, factors, metric or _plain, on_layer, (fitting, unseen)
            )
            last = max(chosen)
            for index in range(last + 1):
                work.block(index, chosen.get(index, {}), is_last=index == last)
        finally:
            streams.close()
    return Refit(work.found, tuple(work.report))


# Of one block: the layers of each site with their ranks, both in forward order.
_Sites = dict[str, list[tuple[LayerSpec, int]]]


def _plain(name: str) -> None:
    """Weigh every output alike."""
    del name


def _chosen(
    layers: ModelMap, allocation: Allocation, factors: Mapping[str, LowRankFactors]
) -> dict[int, _Sites]:
    """Return the layers with a rank by block and, in forward order, by site."""
    ranks = {name: rank for name, rank in allocation.ranks.items() if rank is not None}
    known = {spec.name for spec in layers.compressible}
    for what, names in (
        ("are in no block of the model", set(ranks) - known),
        ("have no factors", set(ranks) - set(factors)),
    ):
        if names:
            raise KeyError(
                f"{len(names)} of {len(ranks)} layers with a rank {what}: {min(names)} first; "
                "refit with the allocation and the factors of this model."
            )
    found: dict[int, _Sites] = {}
    for spec in layers.compressible:
        if (rank := ranks.get(spec.name)) is None:
            continue
        if rank > factors[spec.name].max_rank:
            raise ValueError(
                f"{spec.name}: rank {rank} is chosen and its factors end at "
                f"{factors[spec.name].max_rank}; factor it for every rank first."
            )
        assert spec.block is not None
        found.setdefault(spec.block, {}).setdefault(_inside(spec.site, spec.block), []).append(
            (spec, rank)
        )
    return found


def _inside(name: str, block: int) -> str:
    """Return the path of a layer inside its block."""
    return name.partition(f".{block}.")[2]


def _held_back_last(windows: Tensor, judging: Tensor | None, share: float) -> tuple[Tensor, int]:
    """Return all windows, those to judge by last, and how many there are to solve from."""
    count = len(windows)
    if judging is not None:
        if judging.shape[1] != windows.shape[1]:
            raise DataError(
                f"the refit has windows of {windows.shape[1]} tokens to solve from and of "
                f"{judging.shape[1]} to judge by; cut both to one length"
            )
        return torch.cat([windows, judging]), count
    back = max(1, math.floor(count * share)) if share else 0
    if count <= back:
        raise DataError(
            f"the refit has {count} windows and holds {back} back to judge by "
            f"(held_back={share:g}), which leaves none to solve from; give it at least 2, or "
            "set held_back to 0"
        )
    held = {(2 * place + 1) * count // (2 * back) for place in range(back)}
    order = [place for place in range(count) if place not in held] + sorted(held)
    return windows[order], count - back


class _Work:
    """The refit of one block after the other; collects factors and report."""

    def __init__(
        self,
        body: BlockwiseBody,
        streams: Streams,
        settings: RefitSettings,
        factors: Mapping[str, LowRankFactors],
        metric: Metric,
        on_layer: Callable[[str], None] | None,
        parts: tuple[list[slice], list[slice]],
    ) -> None:
        self._body, self._streams, self._settings = body, streams, settings
        self._old, self._metric, self._on_layer = factors, metric, on_layer
        self._fitting, self._judging = parts
        self._warned: set[str] = set()
        self.found: dict[str, LowRankFactors] = {}
        self.report: list[RefitRow] = []

    def block(self, index: int, sites: _Sites, *, is_last: bool) -> None:
        """Refit the layers of one block, and take both streams past it."""
        streams = self._streams
        with self._body.open_block(index) as block:
            streams.advance_dense(block, index, list(sites))
            dense = {
                _inside(spec.name, index): block.get_submodule(_inside(spec.name, index))
                for chosen in sites.values()
                for spec, _ in chosen
            }
            try:
                for chosen in sites.values():
                    for spec, rank in chosen:
                        self._put(block, spec, self._old[spec.name], rank)
                for site, chosen in sites.items():
                    self._site(block, index, site, chosen, dense)
                if not is_last:
                    streams.advance_compressed(block, index)
            finally:
                for path, module in dense.items():
                    replace_module(block, path, module)

    def _site(
        self,
        block: nn.Module,
        index: int,
        site: str,
        chosen: list[tuple[LayerSpec, int]],
        dense: Mapping[str, nn.Module],
    ) -> None:
        """Refit the layers that read one site."""
        asked = self._asked(site, chosen, dense)
        fitted = self._streams.moments(block, index, site, self._fitting, asked)
        judged = None
        if self._judging:
            judged = self._streams.moments(block, index, site, self._judging, asked)
        kind, size = chosen[0][0].kind, len(fitted.mean)
        if fitted.tokens < size and kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(
                f"the refit has {fitted.tokens} tokens for the {size} features that {kind} reads "
                f"(first: {chosen[0][0].name}); its ridge of {self._settings.ridge:g} decides "
                "the rest. Give it more calibration tokens.",
                FewTokensWarning,
                stacklevel=4,
            )
        for spec, rank in chosen:
            old = self._old[spec.name].to(
                dtype=torch.float32, device=torch.device("cpu"), max_rank=rank
            )
            module = dense[_inside(spec.name, index)]
            pairs = fitted, judged
            if asked is None:
                matrix = self._settings.blend * linear_weight(module).to(fitted.mean)
                pairs = fitted.mapped(matrix), None if judged is None else judged.mapped(matrix)
            new, row = self._layer(spec, rank, module, old, *pairs)
            if row.taken:
                self._put(block, spec, new, rank)
            self.found[spec.name] = new if row.taken else old
            self.report.append(row)
            if self._on_layer is not None:
                self._on_layer(spec.name)

    def _asked(
        self, site: str, chosen: list[tuple[LayerSpec, int]], dense: Mapping[str, nn.Module]
    ) -> Asked | None:
        """Return what the layer of a site is asked for beyond its dense answer, token by token.

        That is ``blend W d``, and of a layer that adds to the residual stream ``feedback`` times
        what the stream lacks. ``None`` where several layers share the site, or one that answers
        with more than it reads: the drift itself is smaller then.
        """
        (spec, _), *others = chosen
        writes = site in self._streams.writers
        assert not (writes and others), f"{spec.name} and {others} add to the stream together"
        if others or (spec.out_features > spec.in_features and not writes):
            return None
        weight = linear_weight(dense[_inside(spec.name, spec.block or 0)])
        blend, feedback = self._settings.blend, self._settings.feedback

        def asked(drift: Tensor, lacking: Tensor | None) -> Tensor:
            found = blend * (drift @ weight.to(drift).T)
            return found if lacking is None else found + feedback * lacking

        return asked

    def _layer(
        self,
        spec: LayerSpec,
        rank: int,
        module: nn.Module,
        old: LowRankFactors,
        fitted: PairMoments,
        judged: PairMoments | None,
    ) -> tuple[LowRankFactors, RefitRow]:
        """Solve one layer and compare it with what it was."""
        place = fitted.mean
        weight, bias = linear_weight(module).to(place), linear_bias(module)
        bias = None if bias is None else bias.to(place)
        matrix = self._metric(spec.name)
        metric = OutputMetric(None if matrix is None else matrix.to(place), spec.name)
        new = solve(
            weight,
            bias,
            fitted,
            rank,
            ridge=self._settings.ridge,
            metric=metric,
            restore_means=self._settings.centred and old.center is not None,
            name=spec.name,
        ).to(dtype=torch.float32, device=torch.device("cpu"))
        seen = OutputError(weight, bias, fitted, metric)
        unseen = None if judged is None else OutputError(weight, bias, judged, metric)
        before = None if unseen is None else unseen.of(old, rank)
        after = None if unseen is None else unseen.of(new, rank)
        row = RefitRow(
            name=spec.name,
            rank=rank,
            fitted_before=seen.of(old, rank),
            fitted_after=seen.of(new, rank),
            held_back_before=before,
            held_back_after=after,
            taken=before is None or after is None or after < before,
        )
        return new, row

    def _put(self, block: nn.Module, spec: LayerSpec, factors: LowRankFactors, rank: int) -> None:
        """Put a low-rank layer into the block, in the precision that the model runs in."""
        assert spec.block is not None
        path = _inside(spec.name, spec.block)
        like = next(block.get_submodule(path).parameters())
        running = factors.to(dtype=like.dtype, device=like.device, max_rank=rank)
        replace_module(block, path, running.at_rank(rank))
