"""Which packages a study runs with, and what it means if they changed since it was begun."""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from lrbo.config.shell import command
from lrbo.study.journal import Study
from lrbo.study.study_record import StudyRecord

log = logging.getLogger(__name__)

PACKAGES = ("lrbo", "torch", "transformers", "ax-platform", "botorch", "gpytorch", "mlflow")
# Another release (major or minor) of these may score otherwise, so that trials do not compare.
SCORING = ("torch", "transformers")
KEY = "search.other_versions"


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            installed[package] = "not installed"
    return installed


def changes(study: StudyRecord) -> dict[str, tuple[str, str]]:
    """Return the versions of the last run of a study and of now, where they differ."""
    before: Mapping[str, str] = study.state.versions or study.about.versions
    return {
        package: (before[package], now)
        for package, now in versions().items()
        if before.get(package, now) != now
    }


def refusals(study: StudyRecord, *, allowed: bool) -> list[str]:
    """Why a study must not go on with the installed packages; empty where it may."""
    return [
        f"study {study.name} was run with {package} {before}, here is {now}: its next trials may "
        f"not be comparable with the {len(study.state.ended)} that it has. Install "
        f"{package}=={before}, begin another study=NEWNAME, or accept it with: "
        f"{command('search', **study.keys, **{KEY: True})}"
        for package, (before, now) in changes(study).items()
        if not allowed and package in SCORING and _release(before) != _release(now)
    ]


def note_changes(study: Study) -> None:
    """Log which versions changed since the last run of a locked study, and record them."""
    changed = [
        f"{name} {now} instead of {before}" for name, (before, now) in changes(study).items()
    ]
    if changed:
        log.warning(
            "Study %s goes on with other versions: %s. Proposals may differ from those of a search "
            "that was not interrupted.",
            study.name,
            ", ".join(changed),
        )
        study.record("versions", versions=versions())


def _release(text: str) -> list[str]:
    """Return major and minor of a version such as ``2.8.0+cpu``."""
    return text.partition("+")[0].split(".")[:2]
