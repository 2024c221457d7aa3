"""Check what is typed after a command: everything that is wrong with it, in one go."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lrbo.config import compose, refusals, saved, shell
from lrbo.config.schema import Config, SearchConfig
from lrbo.errors import Collecting, ConfigError
from lrbo.pipeline.checks import check, check_search

# Texts of a list, or of a sweep: in quotes, or up to the next comma or bracket.
TEXTS = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|[^\[\],'"]+""")

# How a problem of a key begins that only follows from the refusal of its override.
FOLLOWING = (" is required", "=")


def values_of(command: str, overrides: Sequence[object]) -> tuple[list[str], Config]:
    """Quote the overrides for Hydra, and compose the values of the command.

    Raises:
        ConfigError: Listing every override that cannot be taken, and what else is wrong then.
    """
    problems = [
        f"{override!r}: expected text such as 'seed=1', each an argument of its own"
        for override in overrides
        if not isinstance(override, str)
    ]
    if problems:
        raise ConfigError(problems)
    typed = [spelled(command, str(override)) for override in overrides]
    if problems := find_problems(command, typed):
        raise ConfigError(problems)
    return typed, compose.composed(command, typed)


def find_problems(command: str, overrides: Sequence[str], *, sweeps: bool = False) -> list[str]:
    """Find the problems of a command line of quoted overrides, or of any job of a sweep."""
    try:
        jobs = refusals.jobs(overrides) if sweeps else [list(overrides)]
    except ConfigError as error:
        return error.problems
    messages: dict[str, None] = {}
    for job in jobs:
        problems = refusals.find_problems(command, job)
        # A command checks its own values; the later jobs of a sweep would be checked hours too
        # late. What Hydra knows only inside a job (${hydra:job.num}) cannot be checked here.
        if problems or (sweeps and not any("hydra" in override for override in job)):
            rest = [override for override in job if override not in problems]
            given = tuple(
                f"{override.partition('=')[0]}{end}" for override in problems for end in FOLLOWING
            )
            others: list[str] = []
            with Collecting(others, ConfigError):
                config = compose.composed(command, rest)
                others += (
                    check_search(config) if isinstance(config, SearchConfig) else check(config)
                )
            others = [problem for problem in others if not problem.startswith(given)]
            messages |= dict.fromkeys([*problems.values(), *others])
    return list(messages) or (_shared_studies(command, jobs) if sweeps else [])


def _shared_studies(command: str, jobs: Sequence[Sequence[str]]) -> list[str]:
    """Find jobs of a sweep that differ and name the same study, which the second could not use."""
    first: dict[tuple[str, str], SearchConfig] = {}
    shared = {}
    for job in jobs:
        if any("hydra" in override for override in job):
            continue
        values = compose.composed(command, job)
        if not isinstance(values, SearchConfig):
            continue
        study = (values.studies, values.study)
        before = first.setdefault(study, values)
        if others := saved.differences(before, values):
            key = others[0].partition(":")[0]
            shared[study] = (
                f"study={values.study}: jobs of this sweep that differ in {key} have the same "
                f"study; name what differs: 'study={values.study}_${{{key}}}'"
            )
    return list(shared.values())


def spelled(command: str, argument: str) -> str:
    """Quote a text that Hydra would read as something else, so that it stays as it was typed.

    ``study=1e3`` would be called 1000.0, ``study=2026_11_28`` a number; ``point=keep=0.75`` is
    outside Hydra's grammar.
    """
    key, is_given, value = argument.partition("=")
    is_text, may_be_null = refusals.text_hint(command, key.lstrip("+"))
    if not is_given or not is_text or set(value) & set("({$"):
        return argument
    if re.fullmatch(r"\w+=[\w.]+", value):
        return f"{key}={shell.text(value)}"

    def quoted(part: re.Match[str]) -> str:
        word = part[0].strip()
        if not word or word[0] in "'\"":
            return part[0]
        read = compose.read_value(word)
        misread = not isinstance(read, str) and not (read is None and may_be_null)
        # Hydra's grammar has no ~ in a value.
        return part[0].replace(word, f"'{word}'") if misread or "~" in word else part[0]

    return f"{key}={TEXTS.sub(quoted, value)}"
