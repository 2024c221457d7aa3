"""Studies to read in Python: tables, figures, the best trial and the front."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from lrbo.config.choices import KEEP_RATIO, STUDIES
from lrbo.errors import StudyError
from lrbo.progress import PlainConsole
from lrbo.reports import comparison, plots, results
from lrbo.reports.allocations import options_frame
from lrbo.reports.terminal import print_report
from lrbo.study.study_record import StudyRecord, study_folder
from lrbo.trials.records import TrialRecord


class StudyResults:
    """The results of a study so far, read from its journal.

    Nothing in here changes the study. Open it again to see what was added since.
    """

    def __init__(self, study: StudyRecord) -> None:
        study.require()
        self._study = StudyRecord(study.folder.absolute())  # a notebook may change its folder
        self.name, self.folder = self._study.name, self._study.folder

    def __repr__(self) -> str:
        best, metric = self.best, self._study.task.headline
        result = "none with a value"
        if best is not None:
            result = (
                f"best {metric.label} {metric.text(best.metrics[metric.name])} at keep ratio "
                f"{best.metrics[KEEP_RATIO]:.3g} (trial {best.request.trial_index})"
            )
        return f"<study {self.name}: {len(self._study.state.ended)} trials, {result}>"

    @property
    def best(self) -> TrialRecord | None:
        """Trial of the lowest objective, with ``request.allocation`` and ``metrics``."""
        return self._study.state.best()

    @property
    def trials(self) -> pd.DataFrame:
        """A row per trial that ended; columns: :func:`lrbo.reports.results.frame`."""
        return results.frame(self._study)

    @property
    def front(self) -> pd.DataFrame:
        """The trials on the Pareto front of loss against size, from small to large."""
        size = results.size_metric(self._study) or KEEP_RATIO
        table = self.trials
        return table[table["on_front"]].sort_values([size, "objective"])

    @property
    def summary(self) -> dict[str, Any]:
        """The results as plain values; keys: :func:`lrbo.reports.results.summary`."""
        return results.summary(self._study)

    @property
    def config(self) -> dict[str, Any]:
        """The configuration that the study was begun with, as nested dicts."""
        return asdict(self._study.config)

    def options(self, trial: int | None = None) -> pd.DataFrame:
        """A row per layer; columns: :func:`lrbo.reports.allocations.options_frame`.

        Args:
            trial: Number of the trial; ``None`` is the best.

        Raises:
            StudyError: If there is no such trial.
        """
        trials = self._study.state.trials
        record = self.best if trial is None else trials.get(trial)
        if record is None:
            raise StudyError(
                f"study {self.name} has no trial {'with a value' if trial is None else trial}; it "
                f"has the trials {sorted(trials)}"
            )
        return options_frame(self._study.about, record.request.allocation)

    def figures(self) -> dict[str, Figure]:
        """Draw what there is to draw; names: :func:`lrbo.reports.plots.figures`."""
        return plots.figures(self._study)

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
    return StudyResults(StudyRecord(folder))


def compare(*studies: StudyResults | str | Path) -> pd.DataFrame:
    """Table with one row per study; see :func:`lrbo.reports.comparison.compared`.

    Args:
        *studies: Studies, or what :func:`open_study` takes.

    Raises:
        StudyError: If there is no such study, or none was given.
    """
    if not studies:
        raise StudyError('no study to compare: lrbo.compare("one", "other")')
    opened = [s if isinstance(s, StudyResults) else open_study(s) for s in studies]
    return comparison.compared([study._study for study in opened])
