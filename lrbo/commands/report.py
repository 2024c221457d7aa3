"""Show what a study found, from its journal alone."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lrbo.config import saved
from lrbo.config.schema import ReportConfig
from lrbo.config.shell import assigned
from lrbo.errors import Collecting, StudyError, listed
from lrbo.pipeline import checks
from lrbo.progress import PlainConsole, Reporter
from lrbo.reports import comparison, mlflow_view
from lrbo.reports.pictures import draw_comparison, draw_figures
from lrbo.reports.results import summary
from lrbo.reports.terminal import print_comparison, print_report
from lrbo.study.study_record import StudyRecord, study_folder


def run(config: ReportConfig, reporter: Reporter) -> dict[str, Any]:
    """Show what a study found, or compare several, from their journals alone.

    Raises:
        StudyError: If there is no such study.
        TrackingError: If ``sync`` is asked for and MLflow cannot be reached.
    """
    checks.require_valid(config)
    names = _names(config)
    studies = _opened(config, names)
    for study in studies if config.sync else ():
        _sync(config, study, reporter)
    if isinstance(config.study, str) and names == [config.study]:
        (study,) = studies
        print_report(study, PlainConsole())
        for path in draw_figures(study) if config.figures else ():
            reporter.say(f"Figure: {path}")
        if config.format == "html":
            reporter.say(f"Page: {mlflow_view.write_page(study)}")
        return summary(study)
    table = comparison.compared(studies)
    print_comparison(studies, table, PlainConsole())
    fronts, drawn = comparison.fronts(studies), []
    if config.figures and table["best"].notna().any():
        drawn.append(("comparison.png", table))
    if config.figures and len(fronts):
        drawn.append(("fronts.png", fronts))
    for file, shown in drawn:
        path = Path(config.studies) / file
        draw_comparison(path, shown, names, comparison.common_task(studies).headline)
        reporter.say(f"Figure: {path}")
    return {"studies": [summary(study) for study in studies]}


def _names(config: ReportConfig) -> list[str]:
    """The names of the studies that are meant; a pattern must fit one."""
    if isinstance(config.study, list) and config.study:
        return [str(name) for name in config.study]
    if not isinstance(config.study, str):
        raise StudyError(f"study={config.study!r}: expected a name, a pattern or a list of names")
    if not checks.is_pattern(config.studies, config.study):
        return [config.study]
    folder = Path(config.studies)
    files = ("study.json", "journal.jsonl")  # one that lacks either is named as damaged
    inside = folder.iterdir() if folder.is_dir() else ()
    fitting = sorted(
        path.name
        for path in inside
        if fnmatchcase(path.name, config.study) and any((path / file).exists() for file in files)
    )
    if not fitting:
        raise StudyError(f"no study in {folder} fits study={config.study}; look with: ls {folder}")
    return fitting


def _opened(config: ReportConfig, names: Sequence[str]) -> list[StudyRecord]:
    """Open studies, all of them before anything is shown of one, or name all that are damaged."""
    studies: list[StudyRecord] = []
    problems: list[str] = []
    for name in names:
        with Collecting(problems, StudyError):
            study = StudyRecord(study_folder(config.studies, name), config.studies)
            _ = study.config  # refuses what is damaged
            studies.append(study)
    if problems:
        raise StudyError(problems[0] if len(problems) == 1 else listed(problems))
    return studies


def _sync(config: ReportConfig, study: StudyRecord, reporter: Reporter) -> None:
    """Write what MLflow lacks of a study."""
    changes = [assigned("studies", config.studies), "tracking.enabled=true"]
    stored = saved.continued(study.config, changes)
    tracker = mlflow_view.make_tracker(stored, study, strict=True)
    tracker.start(mlflow_view.params(stored, study))
    tracker.present(mlflow_view.presentation(study))
    written = tracker.sync(study.state.records)
    if study.state.dense:
        mlflow_view.show(study, tracker)
    for event in study.state.checkpoints:
        mlflow_view.show_checkpoint(study, tracker, event)
    mlflow_view.show_recoveries(study, tracker)
    tracker.finish(completed=len(study.state.searched) >= stored.search.trials)
    reporter.say(f"MLflow: {written} trials were missing and are there now")
