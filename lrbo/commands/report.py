"""Show what a study found, from its journal alone."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from lrbo import checks, config
from lrbo.commands.view import digests, make_tracker, show
from lrbo.progress import Reporter
from lrbo.report import print_report
from lrbo.results import draw_figures, summary
from lrbo.schema import ReportConfig
from lrbo.search.study import Study


def run(chosen: ReportConfig, reporter: Reporter) -> dict[str, Any]:
    """Show what a study found, from its journal alone.

    Raises:
        StudyError: If there is no such study.
        TrackingError: If ``sync`` is asked for and MLflow cannot be reached.
    """
    checks.require_valid(chosen)
    study = Study(checks.study_folder(chosen.studies, chosen.study))
    study.about()  # there must be one
    if chosen.sync:
        changes = [f"studies={chosen.studies}", "tracking.enabled=true"]
        stored = config.stored_config(study.config_yaml(), changes)
        tracker = make_tracker(stored, study, strict=True)
        tracker.start(config.flat(stored) | digests(study))
        written = tracker.sync(study.state.records)
        if study.state.dense:
            show(study, tracker)
        tracker.finish(completed=len(study.state.ended) >= stored.search.trials)
        reporter.say(f"MLflow: {written} trials were missing and are there now")
    print_report(study, Console(highlight=False))
    if chosen.figures:
        for path in draw_figures(study):
            reporter.say(f"Figure: {path}")
    return summary(study)
