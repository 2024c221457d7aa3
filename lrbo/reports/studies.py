"""Studies to read in Python: tables, figures, the best trial and the front."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from lrbo import comparison, figures, results
from lrbo.checks import study_folder
from lrbo.errors import StudyError
from lrbo.optimization.front import KEEP_RATIO
from lrbo.optimization.study import Study
from lrbo.options import STUDIES
from lrbo.report import print_report
from lrbo.terminal import PlainConsole
from lrbo.trial import TrialRecord


class StudyResults:
    """What a study has found so far, read from its journal.

    Nothing in here changes the study. Open it again to see what was added since.
    """

    def __init__(self, study: Study) -> None:
        """Read a study as it is now.

        Raises:
            StudyError: If there is none.
        """
        study.about()
        self._study = Study(study.folder.absolute())  # a notebook may change its folder

    def __repr__(self) -> str:
        """Return name, number of trials, and the best of them."""
        best, count = self.best, len(self._study.state.ended)
        found = "none with a value"
        if best is not None:
            found = (
                f"best perplexity {best.metrics['perplexity']:.4g} at keep ratio "
                f"{best.metrics[KEEP_RATIO]:.3g} (trial {best.request.trial_index})"
            )
        return f"<study {self.name}: {count} trials, {found}>"

    @property
    def name(self) -> str:
        """Return the name of the study."""
        return self._study.name

    @property
    def folder(self) -> Path:
        """Return where the study is."""
        return self._study.folder

    @property
    def best(self) -> TrialRecord | None:
        """Return the trial of the lowest objective, with ``request.allocation`` and ``metrics``."""
        return self._study.state.best()

    @property
    def trials(self) -> pd.DataFrame:
        """Return a row per trial that ended; see :func:`lrbo.results.frame` for the columns."""
        return results.frame(self._study)

    @property
    def front(self) -> pd.DataFrame:
        """Return the trials on the Pareto front of loss against size, from small to large."""
        size = results.size_metric(self._study) or KEEP_RATIO
        table = self.trials
        return table[table["on_front"]].sort_values([size, "objective"])

    @property
    def summary(self) -> dict[str, Any]:
        """Return the results as plain values; see :func:`lrbo.results.summary` for the keys."""
        return results.summary(self._study)

    @property
    def config(self) -> dict[str, Any]:
        """Return the configuration that the study was begun with, as nested dicts."""
        return asdict(self._study.config())

    def ranks(self, trial: int | None = None) -> pd.DataFrame:
        """Return a row per layer: its rank and what it keeps.

        Args:
            trial: Number of the trial; ``None`` is the best.

        Raises:
            StudyError: If there is no such trial.
        """
        record = self.best if trial is None else self._study.state.trials.get(trial)
        if record is None:
            raise StudyError(
                f"study {self.name} has no trial {'with a value' if trial is None else trial}; it "
                f"has the trials {sorted(self._study.state.trials)}"
            )
        return results.ranks_frame(self._study, record)

    def figures(self) -> dict[str, Figure]:
        """Draw what there is to draw: see :func:`lrbo.figures.figures` for the names."""
        return figures.figures(self._study)

    def report(self) -> None:
        """Print what ``lrbo report`` prints."""
        print_report(self._study, PlainConsole())


def open_study(study: str | Path, *, studies: str | Path = STUDIES) -> StudyResults:
    """Read a study, finished or not; a search may be adding trials to it.

    Args:
        study: A name, or the path of a folder: text with a slash, or a ``Path``.
        studies: Folder that names are looked up in.

    Raises:
        StudyError: If there is no such study, or its files are damaged.
    """
    folder = study if isinstance(study, Path) else study_folder(str(studies), study)
    return StudyResults(Study(folder))


def compare(*studies: StudyResults | str | Path) -> pd.DataFrame:
    """Return a table with one row per study; see :func:`lrbo.comparison.compared`.

    Args:
        *studies: Studies, or what :func:`open_study` takes.

    Raises:
        StudyError: If there is no such study, or none was given.
    """
    if not studies:
        raise StudyError('no study to compare: lrbo.compare("one", "other")')
    opened = [s if isinstance(s, StudyResults) else open_study(s) for s in studies]
    return comparison.compared([study._study for study in opened])
