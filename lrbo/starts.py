"""The trials that a search begins with, as the configuration names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from lrbo.checks import study_folder
from lrbo.errors import ConfigError, StudyError
from lrbo.optimization.base import STARTS, Start
from lrbo.optimization.front import KEEP_RATIO, pareto_front
from lrbo.optimization.study import Study, layers_of, stored_parameters
from lrbo.options import STUDY
from lrbo.specs import LayerSpec
from lrbo.transfer import PAPER, Donor, DonorTrial, profile_of, transferred_ratios
from lrbo.trial import TrialRecord


def build_starts(
    wanted: Sequence[str],
    layers: Sequence[LayerSpec],
    *,
    studies: str,
    kept: Sequence[Mapping[str, object]] = (),
) -> tuple[Start, ...]:
    """Return what a search begins with.

    Args:
        wanted: Names as in ``warm_start``; checked.
        layers: Those that the budget covers.
        studies: Folder of the studies.
        kept: Donors as they were when the study was begun. Their studies may have gone on since,
            or be gone; the search must begin as it did.

    Raises:
        ConfigError: Listing donors that do not exist, have no trial with a value, or lack kinds
            of layers.
    """
    donors = {donor.name: donor for donor in map(Donor.from_dict, kept)} | {"paper": PAPER}
    found: list[Start] = []
    problems: list[str] = []
    for name in wanted:
        if name in STARTS:
            found.append(name)
            continue
        try:
            donor = donors.get(name) or donor_study(name, studies)
            for trial in donor.trials:
                transferred_ratios(name, trial.profile, layers)
        except ConfigError as error:
            problems += error.problems
        except StudyError as error:
            problems.append(f"warm_start: {name}: {error}")
        else:
            found.append(donor)
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return tuple(found)


def donor_study(name: str, studies: str) -> Donor:
    """Return what a study can lend: its best trial, of a front every trial on it.

    Args:
        name: ``study:NAME`` or ``study:NAME:TRIAL``.
        studies: Folder of the studies.

    Raises:
        StudyError: If there is no such study, or no such trial with a value.
    """
    folder, _, number = name.removeprefix(STUDY).partition(":")
    study = Study(study_folder(studies, folder))
    about = study.about()
    completed = study.state.completed
    if number:
        records = [record for record in completed if record.request.trial_index == int(number)]
    elif any(KEEP_RATIO in record.request.variables for record in completed):
        records = pareto_front(completed, KEEP_RATIO)
    else:
        records = [record for record in [study.state.best()] if record is not None]
    if not records:
        which = f"trial {number}" if number else "any trial"
        raise StudyError(f"study {study.name} has no value of {which} yet; let it run first")
    return Donor(name, tuple(_lent(record, about) for record in records))


def _lent(record: TrialRecord, about: Mapping[str, Any]) -> DonorTrial:
    """Return a trial without the names of its layers."""
    allocation = record.request.allocation
    specs = layers_of(about)
    layers = [specs[name] for name in specs if name in allocation.ranks]
    profile = profile_of(layers, allocation, partial(stored_parameters, about=about))
    return DonorTrial(record.metrics[KEEP_RATIO], record.request.variables, profile)
