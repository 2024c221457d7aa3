"""What another study lends to a search: its best trial, its front, or the trial that is named."""

from __future__ import annotations

from lrbo.checks import study_folder
from lrbo.errors import StudyError
from lrbo.optimization.front import KEEP_RATIO, pareto_front
from lrbo.optimization.study import Study
from lrbo.options import STUDY
from lrbo.trial import TrialRecord


def lent(name: str, studies: str) -> tuple[Study, list[TrialRecord]]:
    """Look up the study of a donor and the trials that it lends.

    Args:
        name: ``study:NAME`` or ``study:NAME:TRIAL``.
        studies: Folder of the studies.

    Raises:
        StudyError: If there is no such study, or no such trial with a value.
    """
    donor = name.removeprefix(STUDY)
    folder, _, number = donor.partition(":")
    try:
        study = Study(study_folder(studies, folder))
        study.about()
    except StudyError as error:
        raise StudyError(f"donor {donor}: {error}") from error
    completed = study.state.completed
    if number:
        records = [r for r in completed if str(r.request.trial_index) == number]
    elif any(KEEP_RATIO in r.request.variables for r in completed):
        records = pareto_front(completed, KEEP_RATIO)
    else:
        records = [record for record in [study.state.best()] if record is not None]
    if not records:
        which = f"trial {number}" if number else "trial"
        raise StudyError(
            f"donor {donor}: study {study.name} has no completed {which}; it has the trials "
            f"{[r.request.trial_index for r in completed]}"
        )
    return study, records
