"""The commands as functions: they take what the command line takes, and give results back.

Each override is an argument of its own. A path that is put together wants quotes in its value,
``f"out='{folder}'"``: Hydra reads brackets, commas and letters beyond ASCII in its own way.
"""

from __future__ import annotations

from typing import Any

from lrbo.overrides import chosen_by
from lrbo.progress import Reporter, imported
from lrbo.storage import naming_full_disk, naming_paths
from lrbo.studies import StudyResults


def search(*overrides: str) -> StudyResults:
    """Find the best low-rank model at a budget, or continue a study: ``lrbo search``.

    Progress is on stderr. A search that is interrupted loses nothing: the same call continues.

    Args:
        *overrides: As on the command line: ``"experiment=tiny"``, ``"search.trials=4"``;
            ``lrbo search --help`` lists them.

    Returns:
        The study, to read.

    Raises:
        ConfigError: Listing everything that is wrong, before a model is loaded.
        StudyError: If the study is locked, damaged or stuck.
        LrboError: If anything else prevents it that can be mended; the message says how.
    """
    typed, chosen = chosen_by("search", overrides)
    with naming_paths(), naming_full_disk():
        return StudyResults(_command("search").search(chosen, typed, Reporter()))


def compress(*overrides: str) -> dict[str, Any]:
    """Write a model of a study as a checkpoint: ``lrbo compress``.

    Args:
        *overrides: As on the command line: ``"study=tiny"``, ``"out=tiny-best"``,
            ``"point=keep=0.7"``; ``lrbo compress --help`` lists them.

    Returns:
        ``folder``, for :func:`lrbo.load`; ``parameters`` of the model, ``keep_ratio``,
        ``storage``, and how the ``refit`` went.

    Raises:
        ConfigError: Listing everything that is wrong.
        StudyError: If there is no such study or trial.
        LrboError: If anything else prevents it that can be mended; the message says how.
    """
    _, chosen = chosen_by("compress", overrides)
    with naming_paths(), naming_full_disk():
        found: dict[str, Any] = _command("compress").run(chosen, Reporter())
    return found


def evaluate(*overrides: str) -> dict[str, Any]:
    """Score a checkpoint or a dense model on texts and tasks: ``lrbo evaluate``.

    Args:
        *overrides: As on the command line: ``"checkpoint=tiny-best"``,
            ``"protocols=[wikitext2_2048]"``; ``lrbo evaluate --help`` lists them.

    Returns:
        What is printed: ``perplexity`` and ``nll`` of a text, or ``protocols`` and ``tasks``.

    Raises:
        ConfigError: Listing everything that is wrong, before a model is loaded.
        LrboError: If anything else prevents it that can be mended; the message says how.
    """
    _, chosen = chosen_by("evaluate", overrides)
    with naming_paths(), naming_full_disk():
        found: dict[str, Any] = _command("evaluate").run(chosen, Reporter())
    return found


def _command(name: str) -> Any:
    """Import what does the work of a command; the search brings Ax, which others need not."""
    return imported(f"lrbo.commands.{name}")
