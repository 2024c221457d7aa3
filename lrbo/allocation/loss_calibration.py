"""How measured loss follows from predicted loss, fitted to a few single layers of a study."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict  # that of Python 3.11 pydantic does not take

from lrbo.errors import StudyError
from lrbo.parsing import ContentError, Count, Number, parsed
from lrbo.storage import write_text

# A slope far from 1 says that a kind's few points are noise, not that its loss is flat or steep.
SLOPES = (0.5, 2.0)


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
        ranks = pd.DataFrame({"predicted": predicted, "measured": measured}).rank()
        return float(ranks.corr().loc["predicted", "measured"])

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
            raise StudyError(str(error)) from error
        measurements = tuple(Measurement(**fields) for fields in content["measurements"])
        return cls(content["fits"], measurements)


def sensitivity_file(folder: Path) -> Path:
    """Return where a study keeps its measurements."""
    return folder / "sensitivity.json"
