"""The commands as functions: they take what the command line takes, and give results back.

Each override is an argument of its own. Quote a path that a program puts together,
``f"out='{folder}'"``: Hydra reads brackets, commas and letters beyond ASCII in its own way.
"""

from __future__ import annotations

from typing import Any

from lrbo.cores import prepare_torch
from lrbo.files.atomic import naming_system_errors
from lrbo.pipeline.overrides import values_of
from lrbo.progress import Reporter, imported
from lrbo.reports.studies import StudyResults


def search(*overrides: str) -> StudyResults:
    """Find the best model at a budget, or continue a study: ``lrbo search``.

    Progress is on stderr. A search that is interrupted loses nothing: the same call continues.

    Args:
        *overrides: As on the command line: ``"experiment=tiny"``, ``"search.trials=4"``;
            ``lrbo search --help`` lists them.

    Raises:
        LrboError: If anything prevents it that can be mended; the message says how. Everything that
            is wrong with the values is said at once, before a model is loaded.
    """
    typed, config = values_of("search", overrides)
    prepare_torch(Reporter().say)
    with naming_system_errors():
        return StudyResults(imported("lrbo.commands.search").search(config, typed, Reporter()))


def compress(*overrides: str) -> dict[str, Any]:
    """Write a model of a study as a checkpoint: ``lrbo compress``.

    Args:
        *overrides: As on the command line: ``"study=tiny"``, ``"out=tiny-best"``,
            ``"point=keep=0.7"``; ``lrbo compress --help`` lists them.

    Returns:
        ``folder``, for :func:`lrbo.load`; ``parameters`` of the model, ``keep_ratio``,
        ``forms`` of its layers, and how ``bases`` made again and the ``refit`` went.

    Raises:
        LrboError: As :func:`search` does.
    """
    return _result("compress", overrides)


def recover(*overrides: str) -> dict[str, Any]:
    """Train the small parameters of a checkpoint a little, at the same size: ``lrbo recover``.

    A recovery that is interrupted goes on with the same call, after its last finished block.

    Args:
        *overrides: As on the command line: ``"checkpoint=tiny-best"``, ``"out=tiny-recovered"``,
            ``"recover.minutes=5"``; ``lrbo recover --help`` lists them.

    Returns:
        ``folder``, for :func:`lrbo.load`; ``validation`` and ``test``, the scores of the dense
        model, before and after; and a report of each of the ``stages``.

    Raises:
        LrboError: As :func:`search` does.
    """
    return _result("recover", overrides)


def evaluate(*overrides: str) -> dict[str, Any]:
    """Score a checkpoint or a dense model on texts and tasks: ``lrbo evaluate``.

    Args:
        *overrides: As on the command line: ``"checkpoint=tiny-best"``,
            ``"protocols=[wikitext2_2048]"``; ``lrbo evaluate --help`` lists them.

    Returns:
        What is printed: ``perplexity`` and ``nll`` of a text, or ``protocols`` and ``tasks``.

    Raises:
        LrboError: As :func:`search` does.
    """
    return _result("evaluate", overrides)


def _result(command: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    _, config = values_of(command, overrides)
    prepare_torch(Reporter().say)
    with naming_system_errors():
        result: dict[str, Any] = imported(f"lrbo.commands.{command}").run(config, Reporter())
    return result
