"""Judge what is typed after a command: everything that is wrong with it, in one go."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lrbo import config, shell
from lrbo.checks import check, check_search
from lrbo.errors import ConfigError
from lrbo.schema import Config, SearchConfig

# Texts of a list, or of a sweep: in quotes, or up to the next comma or bracket.
TEXTS = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|[^\[\],'"]+""")

# How a problem begins that a key would not have with the value that was refused.
SAID = (" is required", "=")


def chosen_by(command: str, overrides: Sequence[object]) -> tuple[list[str], Config]:
    """Return overrides as Hydra reads them, and the values of the command that they choose.

    Args:
        command: Name of the command.
        overrides: As typed.

    Raises:
        ConfigError: Listing every override that cannot be taken, and what else is wrong then.
    """
    strange = [override for override in overrides if not isinstance(override, str)]
    if strange:
        raise ConfigError(
            [
                f"{override!r}: expected text such as 'seed=1', each an argument of its own"
                for override in strange
            ]
        )
    typed = [spelled(command, str(override)) for override in overrides]
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
            given = tuple(
                f"{override.partition('=')[0]}{said}" for override in problems for said in SAID
            )
            values = [p for p in _value_problems(command, rest) if not p.startswith(given)]
            found |= dict.fromkeys([*problems.values(), *values])
    return list(found) or (_shared_studies(command, jobs) if sweeps else [])


def _shared_studies(command: str, jobs: Sequence[Sequence[str]]) -> list[str]:
    """Return which jobs of a sweep would each go on with the study of another one.

    The second would be refused when it begins, which may be the day after.
    """
    first: dict[tuple[str, str], SearchConfig] = {}
    found = {}
    for job in jobs:
        if any("hydra" in override for override in job):
            continue
        chosen = config.composed(command, job)
        if not isinstance(chosen, SearchConfig):
            continue
        place = (chosen.studies, chosen.study)
        before = first.setdefault(place, chosen)
        if others := config.differences(before, chosen):
            key = others[0].partition(":")[0]
            found[place] = (
                f"study={chosen.study}: jobs of this sweep that differ in {key} have the same "
                f"study; name what differs: 'study={chosen.study}_${{{key}}}'"
            )
    return list(found.values())


def spelled(command: str, argument: str) -> str:
    """Quote a text that Hydra would read as something else, so that it stays as it was typed.

    ``study=1e3`` would be called 1000.0, ``study=2026_11_28`` a number; ``point=keep=0.75`` has
    no place in Hydra's grammar.

    Args:
        command: Name of the command.
        argument: As typed.
    """
    key, is_given, value = argument.partition("=")
    is_text, may_be_null = config.text_hint(command, key.lstrip("+"))
    if not is_given or not is_text or set(value) & set("({$"):
        return argument
    if re.fullmatch(r"\w+=[\w.]+", value):
        return f"{key}={shell.text(value)}"

    def kept(part: re.Match[str]) -> str:
        word = part[0].strip()
        if not word or word[0] in "'\"":
            return part[0]
        read = config.read_value(word)
        misread = not isinstance(read, str) and not (read is None and may_be_null)
        # The sign of a home folder has no place in Hydra's grammar.
        return part[0].replace(word, f"'{word}'") if misread or "~" in word else part[0]

    return f"{key}={TEXTS.sub(kept, value)}"


def _value_problems(command: str, overrides: Sequence[str]) -> list[str]:
    """Return what else is wrong, so that one message says everything."""
    try:
        chosen = config.composed(command, overrides)
    except ConfigError as error:
        return error.problems
    return check_search(chosen) if isinstance(chosen, SearchConfig) else check(chosen)
