"""What a study is shown with beside its numbers: texts, a description, views, checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

LABELS = ("dense", "uniform", "analytic", "best")  # what every table of results shows


@dataclass(frozen=True)
class Dataset:
    """A text as a study uses it.

    Attributes:
        role: ``calibration``, ``validation`` or ``test``.
        name: Of the text.
        digest: Of its token windows.
        windows: How many.
        tokens: In all of them.
    """

    role: str
    name: str
    digest: str
    windows: int
    tokens: int


@dataclass(frozen=True)
class Checkpoint:
    """A compressed model that was written.

    Attributes:
        identity: What it is found by; never changes.
        trial: Number of the trial whose ranks it has.
        folder: Where it was written, absolute.
        copied: Whether the store is to hold the files too, instead of their place only.
        tags: What is to be read of it.
    """

    identity: str
    trial: int
    folder: Path
    copied: bool
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Presentation:
    """What stands around the runs of a study.

    Attributes:
        note: Description of the study, Markdown.
        datasets: Its texts.
        views: Tags of the experiment, by name, which hold saved views.
    """

    note: str = ""
    datasets: Sequence[Dataset] = ()
    views: Mapping[str, str] = field(default_factory=dict)


def perplexity_text(value: float) -> str:
    """Return a perplexity with as many digits as matter.

    Example:
        >>> perplexity_text(17.2345), perplexity_text(1234.5), perplexity_text(3.2e9)
        ('17.23', '1,234', '3.2e+09')
    """
    if value < 1_000:
        return f"{value:.2f}"
    return f"{value:,.0f}" if value < 1_000_000 else f"{value:.1e}"


def count_text(value: float) -> str:
    """Return a large number in thousands, millions or billions.

    Example:
        >>> count_text(960), count_text(1234567), count_text(7e9)
        ('960', '1.235M', '7B')
    """
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.4g}{name}"
    return f"{value:.0f}"
