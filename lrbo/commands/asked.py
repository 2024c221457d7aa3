"""What a command is asked for, judged by values and journals alone: without torch, in no time."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lrbo import checks, config, versions
from lrbo.donors import lent
from lrbo.errors import ConfigError, StudyError
from lrbo.optimization.front import KEEP_RATIO, ceiling_of
from lrbo.optimization.study import Study
from lrbo.options import STUDY
from lrbo.schema import BenchmarkConfig, CompressConfig, Config, EvaluateConfig, SearchConfig
from lrbo.shell import command
from lrbo.trial import TrialRecord

ALWAYS_THERE = ("auto", "cpu")  # devices that no machine lacks


def require_possible(chosen: Config, typed: Sequence[str] = ()) -> None:
    """Refuse what cannot work before the modules are imported that would do it.

    They judge again, for they are called by programs too, and with all that they alone can judge:
    where a device, a cluster or tasks are named, nothing is said before, to say all at once.

    Args:
        chosen: The composed values.
        typed: Overrides of a search, as typed.

    Raises:
        ConfigError: Listing every problem.
        StudyError: If there is no such study or trial.
    """
    if _names_more(chosen):
        return
    if isinstance(chosen, SearchConfig):
        study = study_of(chosen)
        chosen, problems = search_asked(chosen, typed, study)
        problems += donor_problems(chosen, study)
        if problems:
            raise ConfigError(problems)
        return
    checks.require_valid(chosen)
    if isinstance(chosen, CompressConfig):
        study = study_of(chosen)
        study.about()
        points(study, chosen.point, chosen.refit.candidates)


def _names_more(chosen: Config) -> bool:
    """Tell whether a command names what only the modules that do the work can look for."""
    if isinstance(chosen, BenchmarkConfig):
        return chosen.device not in ALWAYS_THERE
    if isinstance(chosen, EvaluateConfig):
        return chosen.model.device not in ALWAYS_THERE or bool(chosen.tasks)
    if isinstance(chosen, SearchConfig):
        return chosen.model.device not in ALWAYS_THERE or chosen.executor.name == "ray"
    return False


def study_of(chosen: SearchConfig | CompressConfig) -> Study:
    """Open the study that is meant, unless nothing can be at its path.

    Raises:
        ConfigError: Listing every problem of the values.
    """
    if checks.check_study(chosen):
        raise ConfigError(checks.check(chosen))
    return Study(checks.study_folder(chosen.studies, chosen.study), chosen.studies)


def search_asked(
    chosen: SearchConfig, typed: Sequence[str], study: Study
) -> tuple[SearchConfig, list[str]]:
    """Give the values of a search, those of its study where it goes on, and their problems.

    Args:
        chosen: The composed values.
        typed: Overrides as typed. If none of them changes what is measured, an existing study
            is continued with its own values, so that its name is all one needs to type.
        study: That is meant.
    """
    problems: list[str] = []
    if study.exists:
        begun = study.config()
        if all(config.is_free(override.lstrip("+~").partition("=")[0]) for override in typed):
            chosen = config.continued(begun, typed, chosen)
        else:
            problems += [
                f"study {study.name} was begun with another configuration; {difference}"
                for difference in _differences(study, chosen, typed)
            ]
            if problems:
                again = command("search", **study.keys)
                problems.append(f"to continue it: {again}; to begin another: study=NEWNAME")
        problems += versions.refusals(study, allowed=chosen.search.other_versions)
    return chosen, problems + checks.check_search(chosen)


def donor_problems(chosen: SearchConfig, study: Study) -> list[str]:
    """Find the studies that a search is to begin with but that have no such trial, or are not.

    A study that goes on keeps what it began with.
    """
    kept = {donor["name"] for donor in study.about()["donors"]} if study.exists else set()
    problems = []
    for name in dict.fromkeys(chosen.warm_start):
        if not name.startswith(STUDY) or name in kept or not checks.WARM_START.fullmatch(name):
            continue
        folder = name.split(":")[1]
        if checks.check_study_path("donor", chosen.studies, folder):  # is among the problems
            continue
        try:
            lent(name, chosen.studies)
        except StudyError as error:
            problems.append(str(error))
    return problems


def _differences(study: Study, chosen: SearchConfig, typed: Sequence[str]) -> list[str]:
    """Return what a command has other than the study; what nobody typed is counted only.

    Whoever types one key of a study gets the defaults of all others, and looks for that one.
    """
    found = config.differences(study.config(), chosen)
    keys = [override.lstrip("+~").partition("=")[0] for override in typed]
    starts = tuple(f"{key}{end}" for key in keys for end in (":", "."))
    named = [difference for difference in found if difference.startswith(starts)]
    others = [difference.partition(":")[0] for difference in found if difference not in named]
    if not named or not others:
        return found
    return [*named, f"{len(others)} keys that were not typed differ too: {others[0]} first"]


def points(study: Study, point: str, candidates: int) -> list[TrialRecord]:
    """Look up the trials that ``point`` names, best first: best, a number, or METRIC=CEILING.

    Raises:
        StudyError: If there is no such trial with a value; says which there are.
    """
    completed = study.state.completed
    metric, ceiling = ceiling_of(point) or (KEEP_RATIO, math.inf)
    if point.isdecimal():
        found = [r for r in completed if r.request.trial_index == int(point)]
    else:
        found = [r for r in completed if r.metrics.get(metric, math.inf) <= ceiling]
        found.sort(key=lambda r: r.metrics["objective"])  # stable: the first of equals is first
    if not found:
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
    return found[:candidates]
