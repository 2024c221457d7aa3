"""Which packages a study runs with, and what it means if they changed since it was begun."""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from lrbo.optimization.study import Study
from lrbo.shell import command

log = logging.getLogger(__name__)

PACKAGES = ("lrbo", "torch", "transformers", "ax-platform", "botorch", "gpytorch", "mlflow")
# With another release (major or minor) of these a model may score otherwise, so that trials from
# before and after it are no longer comparable. Of all others only proposals depend, or the view.
SCORING = ("torch", "transformers")
KEY = "search.other_versions"


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def changes(study: Study) -> dict[str, tuple[str, str]]:
    """Return the versions that the study was last run with and those of now, where they differ.

    Raises:
        StudyError: If there is no study.
    """
    before: Mapping[str, str] = study.state.versions or study.about()["versions"]
    now = versions()
    return {
        package: (before[package], now[package])
        for package in now
        if package in before and before[package] != now[package]
    }


def refusals(study: Study, *, allowed: bool) -> list[str]:
    """Return why a study must not be continued with the packages of now, a sentence each.

    Args:
        study: Which exists.
        allowed: Whether the user accepts it.
    """
    if allowed:
        return []
    return [
        f"study {study.name} was run with {package} {before}, here is {now}: its next trials may "
        f"not be comparable with the {len(study.state.ended)} that it has. Install "
        f"{package}=={before}, begin another study=NEWNAME, or accept it with: "
        f"{command('search', **study.keys, **{KEY: True})}"
        for package, (before, now) in changes(study).items()
        if package in SCORING and _release(before) != _release(now)
    ]


def note_changes(study: Study) -> None:
    """Say once which versions changed, and write in the journal that trials have them from here.

    Args:
        study: Which exists, locked.
    """
    found = changes(study)
    if not found:
        return
    log.warning(
        "Study %s goes on with other versions: %s. Proposals may differ from those of a search "
        "that was not interrupted.",
        study.name,
        ", ".join(
            f"{package} {now} instead of {before}" for package, (before, now) in found.items()
        ),
    )
    study.record("versions", versions=versions())


def _release(text: str) -> list[str]:
    """Return major and minor of a version such as ``2.8.0+cpu``."""
    return text.partition("+")[0].split(".")[:2]
