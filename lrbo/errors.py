"""Errors that a user can correct, and the trial outcome that each one leads to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Literal

SHOWN = 200  # characters of a value in a message
# transformers lists every known name, hundreds, when it meets an unknown one.
LONG_LIST = re.compile(r"((?:[\w./-]+, ){2}[\w./-]+), ((?:[\w./-]+, ){8,}[\w./-]+)")

Outcome = Literal["completed", "stopped", "failed", "abandoned"]


def listed(problems: Sequence[str]) -> str:
    """Return problems as a list: their number, and a line for each."""
    head = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return f"{head}:\n" + "\n".join(f"  - {problem}" for problem in problems)


def cut(text: str, length: int = SHOWN) -> str:
    """Cut a text to a length, ending with dots where it was longer."""
    return text if len(text) <= length else f"{text[: length - 3]}..."


def some(names: Iterable[str], count: int, none: str = "nothing") -> str:
    """List the first names and the number of the others."""
    first = [*names]
    more = f" and {len(first) - count} more" if first[count:] else ""
    return f"{', '.join(first[:count])}{more}" if first else none


class LrboError(Exception):
    """Base of every error that a user can correct; its message says how."""


class ConfigError(LrboError):
    """The configuration cannot work; ``problems`` has one sentence for each of its faults."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__(listed(self.problems))


class BudgetError(LrboError):
    """No allocation fits the budget."""


class ModelError(LrboError):
    """A model or one of its layers cannot be mapped."""


class DataError(LrboError):
    """A text is missing, too short, or shared between roles; ``problems`` has a sentence each."""

    def __init__(self, *problems: str) -> None:
        self.problems = list(problems)
        super().__init__(problems[0] if len(problems) == 1 else listed(problems))


class StatisticsError(LrboError):
    """A calibration statistic is missing or not finite."""


class CacheError(LrboError):
    """A cache entry is missing or damaged."""


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


def outcome_of(error: Exception) -> Literal["failed", "abandoned"]:
    """Return the outcome of a trial that ended in ``error``, in Ax's sense.

    Errors of the machine, such as a lack of memory, are transient (``"failed"``). A budget that
    no allocation meets, or a loss that is not finite, would recur (``"abandoned"``). A defect,
    which is neither, is raised: it must stop the search.
    """
    if isinstance(error, BudgetError | StatisticsError | NonFiniteError):
        return "abandoned"
    if isinstance(error, OSError) or _is_out_of_memory(error):
        return "failed"
    raise error


def _is_out_of_memory(error: Exception) -> bool:
    # torch's OutOfMemoryError, and what its CPU allocator says, are RuntimeErrors.
    names_memory = isinstance(error, RuntimeError) and "memory" in str(error).lower()
    return names_memory or isinstance(error, MemoryError)


class Collecting(AbstractContextManager[object]):
    """Adds errors of these kinds, and no others, to problems that are reported together later."""

    def __init__(self, problems: list[str], *kinds: type[LrboError]) -> None:
        self.problems, self.kinds = problems, kinds

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        if not isinstance(error, self.kinds):
            return False
        new = error.problems if isinstance(error, ConfigError | DataError) else [str(error)]
        self.problems += [problem for problem in new if problem not in self.problems]
        return True


@contextmanager
def reading(kind: type[LrboError], what: str, own: type[LrboError] | None = None) -> Iterator[None]:
    """Turn whatever a library raises about a file into an error of one kind; ``what`` begins it.

    Libraries raise dozens of kinds without a common base, such as a KeyError for an unknown
    activation function. A lack of memory and our errors, but for a kind of our ``own``, stay.
    """
    try:
        yield
    except Exception as error:
        is_other = isinstance(error, LrboError) and not (own and isinstance(error, own))
        if is_other or _is_out_of_memory(error):
            raise
        is_plain = isinstance(error, OSError | ValueError | LrboError)
        prefix = "" if is_plain else f"{type(error).__name__}: "
        message = LONG_LIST.sub(lambda names: some(names[0].split(", "), 3), str(error))
        raise kind(f"{what}: {prefix}{message}") from error  # a KeyError is a single word
