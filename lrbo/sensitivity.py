"""Loss curves: what each layer costs at each rank, in nats per token, calibrated by measurement."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from pydantic import ConfigDict, with_config
from scipy.stats import spearmanr
from torch import Tensor
from typing_extensions import TypedDict  # that of Python 3.11 pydantic does not take

from lrbo.blockwise import BlockwiseBody, Scratch
from lrbo.compression import replace_module
from lrbo.errors import NonFiniteError, StudyError
from lrbo.model import LayerSpec, ModelMap, body_and_head
from lrbo.nested import LowRankFactors
from lrbo.parsing import ContentError, Count, Number, parsed
from lrbo.storage import write_text

Curves = Mapping[str, NDArray[np.float64]]
CHUNK_TOKENS = 256  # rows of logits at a time
# A slope far from 1 says that a kind's few points are noise, not that its loss is flat or steep.
SLOPES = (0.5, 2.0)


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
                ranks = {
                    max(1, round(most * (step + 1) / (self.ranks + 1)))
                    for step in range(self.ranks)
                }
                chosen += [(spec, rank) for rank in sorted(ranks)]
        return chosen


@dataclass(frozen=True)
class Measurement:
    """One layer at one rank, all others dense.

    Attributes:
        layer: Its name.
        kind: Its kind.
        rank: Its rank.
        predicted: Increase of the loss, nats per token.
        measured: Divergence of the model from the dense one, nats per token, without that of
            rounding.
    """

    layer: str
    kind: str
    rank: int
    predicted: float
    measured: float


@with_config(ConfigDict(extra="forbid"))
class _Measured(TypedDict):
    """A measurement in a file."""

    layer: str
    kind: str
    rank: Count
    predicted: Number
    measured: Number


@with_config(ConfigDict(extra="forbid"))
class _Stored(TypedDict):
    """What a file of measurements holds."""

    fits: dict[str, tuple[Number, Number]]
    rank_correlation: Number | None
    measurements: list[_Measured]


@dataclass(frozen=True)
class LossCalibration:
    """How measured loss follows from predicted loss, by kind: ``exp(intercept) * p ** slope``.

    Attributes:
        fits: Intercept and slope by kind; a kind without one is taken as predicted.
        measurements: What they were fitted to.
    """

    fits: Mapping[str, tuple[float, float]]
    measurements: tuple[Measurement, ...]

    @classmethod
    def fit(cls, measurements: Sequence[Measurement]) -> LossCalibration:
        """Fit straight lines to the logarithms, rising ones, by least squares.

        Points without a positive prediction and measurement say nothing and are left out. A
        kind with a single point, or with one prediction only, gets an intercept and slope 1.
        """
        fits = {}
        for kind in dict.fromkeys(m.kind for m in measurements):
            points = [m for m in measurements if m.kind == kind]
            points = [m for m in points if m.predicted > 0 and m.measured > 0]
            if not points:
                continue
            x = np.log([m.predicted for m in points])
            y = np.log([m.measured for m in points])
            spread = float(((x - x.mean()) ** 2).sum())
            slope = float((x - x.mean()) @ y) / spread if spread > 0 else 1.0
            slope = min(max(slope, SLOPES[0]), SLOPES[1])
            fits[kind] = (float(y.mean() - slope * x.mean()), slope)
        return cls(fits, tuple(measurements))

    def apply(self, kind: str, predicted: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return a curve in measured nats, never rising and never negative."""
        if kind not in self.fits:
            return predicted
        intercept, slope = self.fits[kind]
        # Rounding below 0 would have no power, and one of small losses magnifies a rise.
        falling = np.minimum.accumulate(np.maximum(predicted, 0.0))
        return np.asarray(math.exp(intercept) * falling**slope, dtype=np.float64)

    @property
    def rank_correlation(self) -> float:
        """Return Spearman's correlation of predicted and measured loss, NaN if there is none."""
        predicted = [m.predicted for m in self.measurements]
        measured = [m.measured for m in self.measurements]
        if min(len(set(predicted)), len(set(measured))) < 2:
            return math.nan
        return float(spearmanr(predicted, measured).statistic)

    def save(self, path: Path) -> None:
        """Write as JSON."""
        correlation = self.rank_correlation
        content = {
            "fits": {kind: list(fit) for kind, fit in self.fits.items()},
            "rank_correlation": None if math.isnan(correlation) else correlation,
            "measurements": [asdict(measurement) for measurement in self.measurements],
        }
        write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> LossCalibration:
        """Read what :meth:`save` wrote.

        Raises:
            StudyError: If it is not that, naming the field.
        """
        try:
            content: _Stored = parsed(path.read_bytes(), _Stored, str(path))
        except (OSError, ContentError) as error:
            raise StudyError(
                f"{error}. Delete the file: the next search of the study measures it again"
            ) from error
        measurements = tuple(Measurement(**fields) for fields in content["measurements"])
        return cls(content["fits"], measurements)


def sensitivity_file(folder: Path) -> Path:
    """Return where a study keeps its measurements."""
    return folder / "sensitivity.json"


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
