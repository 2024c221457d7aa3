"""Judge what is typed after a command: everything that is wrong with it, in one go."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence

from lrbo import config
from lrbo.errors import ConfigError
from lrbo.schema import Config


def chosen_by(command: str, overrides: Sequence[str]) -> tuple[list[str], Config]:
    """Return overrides as Hydra reads them, and the values of the command that they choose.

    Args:
        command: Name of the command.
        overrides: As typed.

    Raises:
        ConfigError: Listing every override that cannot be taken, and what else is wrong then.
    """
    typed = [quoted(override) for override in overrides]
    problems = find_problems(command, typed)
    if problems:
        raise ConfigError(problems)
    return typed, config.composed(command, typed)


def find_problems(command: str, overrides: Sequence[str], *, sweeps: bool = False) -> list[str]:
    """Return what is wrong with a command line, of a sweep with any of its jobs.

    Args:
        command: Name of the command.
        overrides: As typed, quoted.
        sweeps: Whether ``seed=0,1`` stands for two jobs.
    """
    try:
        jobs = config.jobs(overrides) if sweeps else [list(overrides)]
    except ConfigError as error:
        return error.problems
    found: dict[str, None] = {}
    for job in jobs:
        problems = config.find_problems(command, job)
        # A command judges its own values; a sweep's later jobs would be judged hours too late.
        # What Hydra only knows inside a job (${hydra:job.num}) cannot be judged here.
        if problems or (sweeps and not any("hydra" in override for override in job)):
            rest = [override for override in job if override not in problems]
            found |= dict.fromkeys([*problems.values(), *_value_problems(command, rest)])
    return list(found)


def quoted(argument: str) -> str:
    """Quote a value like that of ``point=keep=0.75``, which Hydra's grammar has no place for."""
    return re.sub(r"^([\w.]+)=(\w+=[\w.]+)$", r"\1='\2'", argument)


def _value_problems(command: str, overrides: Sequence[str]) -> list[str]:
    """Return what else is wrong, so that one message says everything."""
    try:
        chosen = config.composed(command, overrides)
    except ConfigError as error:
        return error.problems
    # It imports torch, which --help and TAB must not cost.
    found: list[str] = importlib.import_module("lrbo.checks").check(chosen)
    return found
