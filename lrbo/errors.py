"""The few exceptions, and the trial status each one leads to."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

SHOWN = 200  # characters of a value in a message

Outcome = Literal["completed", "stopped", "failed", "abandoned"]


def listed(problems: Sequence[str]) -> str:
    """Return problems as a list: their number, and a line for each."""
    head = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return f"{head}:\n" + "\n".join(f"  - {problem}" for problem in problems)


def cut(text: str, length: int = SHOWN) -> str:
    """Return a text of at most so many characters, the last of them dots where it was longer."""
    return text if len(text) <= length else f"{text[: length - 3]}..."


class LrboError(Exception):
    """Base of every error that a user can mend; its message says how."""


class ConfigError(LrboError):
    """The configuration cannot work; lists every problem at once.

    Attributes:
        problems: One sentence per problem.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__(listed(self.problems))


class BudgetError(LrboError):
    """No allocation fits the budget."""


class ModelError(LrboError):
    """A model or one of its layers cannot be mapped."""


class DataError(LrboError):
    """A text is missing, too short, or shared between roles.

    Attributes:
        problems: One sentence per problem.
    """

    def __init__(self, *problems: str) -> None:
        self.problems = list(problems)
        super().__init__(problems[0] if len(problems) == 1 else listed(problems))


class StatisticsError(LrboError):
    """A calibration statistic is missing or not finite."""


class CacheError(LrboError):
    """What can be made again is missing or damaged."""


class NonFiniteError(LrboError):
    """A loss is NaN or infinite."""


class StudyError(LrboError):
    """A study folder is locked, damaged, or was made with another configuration."""


class PathError(LrboError):
    """A file or folder cannot be read or written as it is."""


class DiskFullError(LrboError):
    """There is no room for what must be written."""


class CheckpointError(LrboError):
    """A compressed checkpoint cannot be written or read."""


class WorkerError(LrboError):
    """No process that evaluates trials can start."""


class TrackingError(LrboError):
    """MLflow does not take what it was asked to show."""


class TrialError(LrboError):
    """A trial has no value.

    Attributes:
        outcome: ``"failed"`` (transient: may be tried again) or ``"abandoned"``
            (deterministic: the same request would end the same way).
    """

    def __init__(self, message: str, outcome: Literal["failed", "abandoned"]) -> None:
        self.outcome: Literal["failed", "abandoned"] = outcome
        super().__init__(message)


def outcome_of(error: Exception) -> Literal["failed", "abandoned"]:
    """Return how a trial that ended in ``error`` counts, in Ax's sense.

    Running out of memory, and every other error of the machine, is transient
    (``"failed"``). A budget that no allocation meets, or a loss that is not finite, would
    come back (``"abandoned"``).

    Args:
        error: What the worker raised.

    Raises:
        Exception: ``error`` itself where it is neither: a defect must stop the search, not
            be recorded as a property of the trial.
    """
    if isinstance(error, TrialError):
        return error.outcome
    if isinstance(error, BudgetError | StatisticsError | NonFiniteError):
        return "abandoned"
    if isinstance(error, MemoryError | OSError | TimeoutError):
        return "failed"
    if is_out_of_memory(error):
        return "failed"
    raise error


def is_out_of_memory(error: Exception) -> bool:
    """Return whether memory ran out.

    torch's OutOfMemoryError, and what its CPU allocator says, are RuntimeErrors.
    """
    told = isinstance(error, RuntimeError) and "memory" in str(error).lower()
    return told or isinstance(error, MemoryError)


@contextmanager
def reading(kind: type[LrboError], what: str) -> Iterator[None]:
    """Turn whatever a library raises of a file that it cannot read into one error.

    They raise dozens of kinds (a KeyError for an activation function that nobody knows), without
    a common base.

    Args:
        kind: Of the error that is raised instead.
        what: How its message begins.

    Raises:
        LrboError: Of that kind, where anything came but lack of memory.
    """
    try:
        yield
    except LrboError:  # which says already what to do
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        plain = isinstance(error, OSError | ValueError)  # others may be one word
        said = NAMES.sub(_first_names, str(error))
        raise kind(f"{what}: {said if plain else f'{type(error).__name__}: {said}'}") from error


# transformers answers what it does not know with the names of all that it knows, hundreds.
NAMES = re.compile(r"(?:[\w./-]+, ){11,}[\w./-]+")


def _first_names(names: re.Match[str]) -> str:
    """Return the first names of a list, and how many there are more."""
    each = names[0].split(", ")
    return f"{', '.join(each[:3])} and {len(each) - 3} more"
