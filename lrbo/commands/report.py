"""Show what a study found, from its journal alone."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lrbo import checks, comparison, config
from lrbo.commands.view import (
    digests,
    make_tracker,
    presentation,
    show,
    show_checkpoint,
    write_page,
)
from lrbo.errors import StudyError, listed
from lrbo.optimization.study import Study
from lrbo.pictures import digest_of, is_of, write_picture
from lrbo.progress import Reporter, imported
from lrbo.report import print_comparison, print_report
from lrbo.results import draw_figures, summary
from lrbo.schema import ReportConfig
from lrbo.shell import assigned
from lrbo.terminal import PlainConsole


def run(chosen: ReportConfig, reporter: Reporter) -> dict[str, Any]:
    """Show what a study found, or compare several, from their journals alone.

    Raises:
        StudyError: If there is no such study.
        TrackingError: If ``sync`` is asked for and MLflow cannot be reached.
    """
    checks.require_valid(chosen)
    names = _names(chosen)
    studies = _opened(chosen, names)
    for study in studies if chosen.sync else ():
        _sync(chosen, study, reporter)
    if isinstance(chosen.study, str) and names == [chosen.study]:
        return _one(chosen, studies[0], reporter)
    table = comparison.compared(studies)
    print_comparison(studies, table, PlainConsole())
    if chosen.figures and table["best"].notna().any():
        path = Path(chosen.studies) / "comparison.png"
        digest = digest_of(table.to_csv(), names)
        if not is_of(path, digest):
            figure = imported("lrbo.plots").comparison(table, about=", ".join(names))
            write_picture(path, figure, digest)
        reporter.say(f"Figure: {path}")
    return {"studies": [summary(study) for study in studies]}


def _names(chosen: ReportConfig) -> list[str]:
    """Return the names of the studies that are meant.

    Raises:
        StudyError: If a pattern fits none.
    """
    if not isinstance(chosen.study, str):
        names = [str(name) for name in chosen.study] if isinstance(chosen.study, list) else []
        if not names:
            raise StudyError(
                f"study={chosen.study!r}: expected a name, a pattern or a list of names"
            )
        return names
    if not checks.is_pattern(chosen.studies, chosen.study):
        return [chosen.study]
    folder = Path(chosen.studies)
    files = ("study.json", "journal.jsonl")  # one that lacks either is named as damaged
    inside = folder.iterdir() if folder.is_dir() else ()
    found = sorted(
        path.name
        for path in inside
        if fnmatchcase(path.name, chosen.study) and any((path / file).exists() for file in files)
    )
    if not found:
        raise StudyError(f"no study in {folder} fits study={chosen.study}; look with: ls {folder}")
    return found


def _opened(chosen: ReportConfig, names: Sequence[str]) -> list[Study]:
    """Open studies, all of them before anything is shown of one.

    Raises:
        StudyError: Naming every one that is missing or damaged.
    """
    studies, problems = [], []
    for name in names:
        try:
            study = Study(checks.study_folder(chosen.studies, name), chosen.studies)
            study.config()
        except StudyError as error:
            problems.append(str(error))
        else:
            studies.append(study)
    if problems:
        raise StudyError(problems[0] if len(problems) == 1 else listed(problems))
    return studies


def _sync(chosen: ReportConfig, study: Study, reporter: Reporter) -> None:
    """Show MLflow what it lacks of a study."""
    changes = [assigned("studies", chosen.studies), "tracking.enabled=true"]
    stored = config.continued(study.config(), changes)
    tracker = make_tracker(stored, study, strict=True)
    tracker.start(config.flat(stored) | digests(study))
    tracker.present(presentation(study))
    written = tracker.sync(study.state.records)
    if study.state.dense:
        show(study, tracker)
    for written_before in study.state.checkpoints:
        show_checkpoint(tracker, written_before)
    tracker.finish(completed=len(study.state.searched) >= stored.search.trials)
    reporter.say(f"MLflow: {written} trials were missing and are there now")


def _one(chosen: ReportConfig, study: Study, reporter: Reporter) -> dict[str, Any]:
    """Show what one study found."""
    print_report(study, PlainConsole())
    if chosen.figures:
        for path in draw_figures(study):
            reporter.say(f"Figure: {path}")
    if chosen.format == "html":
        reporter.say(f"Page: {write_page(study)}")
    return summary(study)
