"""The only file that imports mlflow: a view of the study, which can be made again from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from lrbo.trial import TrialRecord


class Tracker(Protocol):
    """Shows a study to people; never decides, delays or loses anything."""

    def start(self, config: Mapping[str, Any]) -> None:
        """Begin or continue the study's parent run, with its flat configuration as params."""
        ...

    def trial(self, record: TrialRecord) -> None:
        """Show one trial that ended."""
        ...

    def sync(self, records: Iterable[TrialRecord]) -> int:
        """Show every ended trial that is not shown yet, and return how many those were."""
        ...

    def summary(self, metrics: Mapping[str, float], artifacts: Iterable[Path]) -> None:
        """Put study-wide numbers, figures and tables on the parent run."""
        ...

    def finish(self, *, completed: bool) -> None:
        """Close the parent run: finished, or killed if the search is to be continued."""
        ...


class NullTracker:
    """Shows nothing."""

    def start(self, config: Mapping[str, Any]) -> None:
        """Do nothing."""

    def trial(self, record: TrialRecord) -> None:
        """Do nothing."""

    def sync(self, records: Iterable[TrialRecord]) -> int:
        """Do nothing."""
        return 0

    def summary(self, metrics: Mapping[str, float], artifacts: Iterable[Path]) -> None:
        """Do nothing."""

    def finish(self, *, completed: bool) -> None:
        """Do nothing."""
