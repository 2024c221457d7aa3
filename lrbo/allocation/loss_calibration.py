"""Predicted and measured loss of a few layers of a study, how well they agree, and mends."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict  # that of Python 3.11 pydantic does not take

from lrbo.errors import StudyError
from lrbo.files.atomic import write_text
from lrbo.files.parsing import ContentError, Number, parsed
from lrbo.layers.forms import is_joint
from lrbo.layers.options import Menu, Option


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

    @property
    def ratios(self) -> dict[tuple[str, str], float]:
        """Measured to predicted loss by kind of layer and form: the geometric mean over levels."""
        logarithms: dict[tuple[str, str], list[float]] = {}
        for each in self.measurements:
            if each.predicted > 0 and each.measured > 0:
                key = each.kind, Option.parse(each.option).form
                logarithms.setdefault(key, []).append(math.log(each.measured / each.predicted))
        return {key: math.exp(math.fsum(own) / len(own)) for key, own in logarithms.items()}

    def corrected(self, menus: Mapping[str, Menu]) -> dict[str, Menu]:
        """Scale the losses of embedding, head and of options of whole attentions and MLPs.

        Their predictions are off by more than those of other options, which stay as they are; and
        each of these parts is one of few, so that alone it shows most of what it costs.
        """
        ratios, result = self.ratios, dict[str, Menu]()
        for name, menu in menus.items():
            factors = [
                ratios.get((menu.unit.kind, section.form), 1.0)
                if menu.unit.block is None or is_joint(section.form)
                else 1.0
                for section in menu.sections
            ]
            sizes = [len(section.levels) for section in menu.sections]
            losses = None if menu.losses is None else menu.losses * np.repeat(factors, sizes)
            result[name] = replace(menu, losses=losses)
        return result

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
