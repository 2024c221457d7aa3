"""Refuse what cannot work by values and journals alone: without torch, in no time."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lrbo.config import saved
from lrbo.config.choices import KEEP_RATIO, SIZING, STUDY, WARM_START, ceiling_of
from lrbo.config.schema import (
    BenchmarkConfig,
    CompressConfig,
    Config,
    EvaluateConfig,
    RecoverConfig,
    SearchConfig,
)
from lrbo.config.shell import command, key_of
from lrbo.errors import Collecting, ConfigError, StudyError
from lrbo.pipeline import checks
from lrbo.study import versions
from lrbo.study.front import pareto_front
from lrbo.study.journal import Study
from lrbo.study.study_record import StudyRecord, study_folder
from lrbo.trials.records import TrialRecord

ALWAYS_THERE = ("auto", "cpu")  # devices that no machine lacks


def require_possible(config: Config, typed: Sequence[str] = ()) -> None:
    """Refuse what cannot work before the modules are imported that would do it.

    Those check again, because programs call them too, and they alone can check devices, clusters
    and tasks: where one of these is named, everything is left to them, to be reported at once.
    ``typed`` are the overrides of a search.

    Raises:
        ConfigError: Listing every problem.
        StudyError: If there is no such study or trial.
    """
    if _names_more(config):
        return
    if isinstance(config, SearchConfig):
        _, problems = search_asked(config, typed, study_of(config))
        if problems:
            raise ConfigError(problems)
    else:
        checks.require_valid(config)
    if isinstance(config, CompressConfig):
        study = study_of(config)
        study.require()
        points(study, config.point, config.refit.candidates)


def _names_more(config: Config) -> bool:
    if isinstance(config, BenchmarkConfig):
        return config.device not in ALWAYS_THERE
    if isinstance(config, RecoverConfig):
        return config.model.device not in ALWAYS_THERE
    if isinstance(config, EvaluateConfig):
        return config.model.device not in ALWAYS_THERE or bool(config.tasks)
    if isinstance(config, SearchConfig):
        return config.model.device not in ALWAYS_THERE or config.executor.name == "ray"
    return False


def study_of(config: SearchConfig | CompressConfig) -> Study:
    """Open the study that is meant, or raise ConfigError if nothing can be at its path."""
    if checks.check_study_path("study", config.studies, config.study):
        raise ConfigError(checks.check(config))
    return Study(study_folder(config.studies, config.study), config.studies)


def search_asked(
    config: SearchConfig, typed: Sequence[str], study: Study
) -> tuple[SearchConfig, list[str]]:
    """The values of a search, and their problems, with those of the studies that it begins with.

    If none of the overrides in ``typed`` changes what is measured, an existing study continues with
    its own values, so that its name is all one needs to type.
    """
    problems: list[str] = []
    if study.exists:
        begun = study.config
        if all(saved.is_free(key_of(override)) for override in typed):
            config = saved.continued(begun, typed, config)
        elif differences := _differences(study, config, typed):
            other = f"study {study.name} was begun with another configuration"
            again = command("search", **study.keys)
            problems = [f"{other}; {difference}" for difference in differences]
            problems.append(f"to continue it: {again}; to begin another: study=NEWNAME")
        problems += versions.refusals(study, allowed=config.search.other_versions)
    return config, [*problems, *checks.check_search(config), *donor_problems(config, study)]


def donor_problems(config: SearchConfig, study: StudyRecord) -> list[str]:
    """Problems of the studies that a new search is to begin with."""
    stored = {donor.name for donor in study.about.donors} if study.exists else set()
    problems: list[str] = []
    for name in dict.fromkeys(config.warm_start):
        if not name.startswith(STUDY) or name in stored or not WARM_START.fullmatch(name):
            continue
        folder = name.split(":")[1]
        if checks.check_study_path("donor", config.studies, folder):  # is among the problems
            continue
        with Collecting(problems, StudyError):
            donor_records(name, config.studies)
    return problems


def donor_records(name: str, studies: str) -> tuple[StudyRecord, list[TrialRecord]]:
    """Open ``study:NAME`` and select its best trial or front, or that of ``study:NAME:TRIAL``.

    Raises:
        StudyError: If there is no such study, or no such trial with a value.
    """
    donor = name.removeprefix(STUDY)
    folder, _, index = donor.partition(":")
    try:
        study = StudyRecord(study_folder(studies, folder))
        study.require()
    except StudyError as error:
        raise StudyError(f"donor {donor}: {error}") from error
    completed = study.state.completed
    if index:
        records = [r for r in completed if str(r.request.trial_index) == index]
    elif any(SIZING & r.request.variables.keys() for r in completed):
        records = pareto_front(completed, KEEP_RATIO)
    else:
        records = [best] if (best := study.state.best()) else []
    if not records:
        which = f"trial {index}" if index else "trial"
        raise StudyError(
            f"donor {donor}: study {study.name} has no completed {which}; it has the trials "
            f"{[r.request.trial_index for r in completed]}"
        )
    return study, records


def _differences(study: StudyRecord, config: SearchConfig, typed: Sequence[str]) -> list[str]:
    """Differences between a command and its study; keys that were not typed are only counted."""
    differences = saved.differences(study.config, config)
    starts = tuple(f"{key_of(override)}{end}" for override in typed for end in (":", "."))
    named = [difference for difference in differences if difference.startswith(starts)]
    others = [difference.partition(":")[0] for difference in differences if difference not in named]
    if not named or not others:
        return differences
    return [*named, f"{len(others)} keys that were not typed differ too: {others[0]} first"]


def points(study: StudyRecord, point: str, candidates: int) -> list[TrialRecord]:
    """Return the trials of ``point``, best first: best, a number, or METRIC=CEILING.

    Raises:
        StudyError: If there is no such trial with a value, naming those that there are.
    """
    completed = study.state.completed
    metric, ceiling = ceiling_of(point) or (KEEP_RATIO, math.inf)
    if point.isdecimal():
        records = [r for r in completed if r.request.trial_index == int(point)]
    else:
        records = [r for r in completed if r.metrics.get(metric, math.inf) <= ceiling]
        records.sort(key=lambda r: r.metrics["objective"])  # stable: the first of equals is first
    if not records:
        ratios = sorted(r.metrics[metric] for r in completed if metric in r.metrics)
        indices = [r.request.trial_index for r in completed]
        stopped = [r.request.trial_index for r in study.state.stopped]
        raise StudyError(
            f"study {study.name} has no completed trial for point={point}; it has the trials "
            f"{indices}"
            + (f", and stopped early: {stopped}" if stopped else "")
            + (f" with {metric} from {ratios[0]:.4f} to {ratios[-1]:.4f}" if ratios else "")
            + ("" if ratios or not completed else f", of which {metric} was not measured")
        )
    return records[:candidates]
