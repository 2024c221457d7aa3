"""Predicted and measured loss of a few single layers of a study, and how well they agree."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict  # that of Python 3.11 pydantic does not take

from lrbo.errors import StudyError
from lrbo.files.atomic import write_text
from lrbo.files.parsing import ContentError, Number, parsed


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class Measurement:
    """How much the loss rises with one layer as an option, all others dense, in nats per token.

    The divergence from the dense model is measured, less that of rounding.
    """

    layer: str
    kind: str
    option: str
    predicted: Number
    measured: Number


@with_config(ConfigDict(extra="forbid"))
class _Stored(TypedDict):
    rank_correlation: Number | None
    measurements: list[Measurement]


@dataclass(frozen=True)
class LossCalibration:
    """Predicted and measured loss of single layers, a measurement per layer and option."""

    measurements: tuple[Measurement, ...]

    @property
    def rank_correlation(self) -> float:
        """Spearman's correlation of predicted and measured loss, NaN if there is none."""
        table = pd.DataFrame([(m.predicted, m.measured) for m in self.measurements])
        if table.empty or table.nunique().min() < 2:
            return math.nan
        return float(table.rank().corr().iloc[0, 1])

    def save(self, path: Path) -> None:
        """Write as JSON."""
        correlation = self.rank_correlation
        content = {
            "rank_correlation": None if math.isnan(correlation) else correlation,
            "measurements": [asdict(measurement) for measurement in self.measurements],
        }
        write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> LossCalibration:
        """Read what :meth:`save` wrote, or raise StudyError naming the field that is another."""
        try:
            content: _Stored = parsed(path.read_bytes(), _Stored, str(path))
        except (OSError, ContentError) as error:
            raise StudyError(str(error)) from error
        return cls(tuple(content["measurements"]))


def sensitivity_file(folder: Path) -> Path:
    """Return the path of a study's measurements."""
    return folder / "sensitivity.json"
