"""The terminal as everything here writes to it: what is printed is text, and commands nothing."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment


class PlainConsole(Console):
    """A console on which names from files are only read.

    Rich would take ``[red]`` and ``:smile:`` in a name for markup, and pass on the control
    characters with which a name could recolour, overwrite or answer for the terminal. Rich's own
    controls are segments of their own and stay.
    """

    def __init__(self, **options: Any) -> None:
        """Take what :class:`rich.console.Console` takes."""
        super().__init__(**{"highlight": False, "markup": False, "emoji": False, **options})

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Render as rich does, without control characters in texts."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


def printable(text: str) -> str:
    """Leave control characters out, but the ends of lines."""
    if text.isprintable():
        return text
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")
