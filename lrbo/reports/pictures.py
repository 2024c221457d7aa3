"""Pictures that say what they show, so that one is drawn again only where that has changed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lrbo import __version__
from lrbo.files.atomic import replacing
from lrbo.progress import imported
from lrbo.reports.results import sensitivity, size_metric
from lrbo.study.study_record import StudyRecord
from lrbo.tasks.metrics import Metric

KEY = "lrbo-shows"  # of the text that a PNG carries in front of its pixels
HEAD = 1024  # bytes within which it is
PLOTS = "lrbo.reports.plots"  # asks for matplotlib, which nothing else does


def draw_figures(study: StudyRecord) -> list[Path]:
    """Draw what there is to draw into ``figures/``, unless it is there; return the paths."""
    state, measured = study.state, sensitivity(study)
    if state.best() is None:
        return []
    names = ["convergence", "ranks"]
    names += ["front"] if size_metric(study) is not None else []
    names += ["sensitivity"] if measured is not None else []
    paths = [study.folder / f"figures/{name}.png" for name in sorted(names)]
    content = (study.about.fields, study.config_yaml(), state.dense, state.trials, state.tests)
    _draw_changed(paths, (content, measured), lambda: imported(PLOTS).figures(study))
    return paths


def draw_comparison(path: Path, table: pd.DataFrame, names: Sequence[str], metric: Metric) -> None:
    """Draw a table of :mod:`lrbo.reports.comparison`, unless it is there already.

    The file is named after the figure, ``comparison.png`` or ``fronts.png``.
    """

    def draw() -> dict[str, Any]:
        figure = getattr(imported(PLOTS), path.stem)
        return {path.stem: figure(table, metric, subtitle=", ".join(names))}

    _draw_changed([path], (table.to_csv(), names), draw)


def _draw_changed(
    paths: Sequence[Path], content: object, draw: Callable[[], Mapping[str, Any]]
) -> None:
    """Write the figures that paths are named after, unless the files show this content already."""
    digest = hashlib.sha256(repr((__version__, content)).encode()).hexdigest()
    if all(_says(path, digest) for path in paths):
        return
    figures = draw()
    for path in paths:
        with replacing(path) as beside:
            figures[path.stem].savefig(beside, format="png", metadata={KEY: digest})


def _says(path: Path, digest: str) -> bool:
    try:
        with path.open("rb") as file:
            return digest.encode() in file.read(HEAD)
    except OSError:
        return False
