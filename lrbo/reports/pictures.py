"""Pictures that say what they show, so that one is drawn again only where that has changed."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from lrbo import __version__
from lrbo.storage import replacing

KEY = "lrbo-shows"  # of the text that a PNG carries in front of its pixels
HEAD = 1024  # bytes within which it is


def digest_of(*content: object) -> str:
    """Return a digest of what a picture shows, and of the code that draws it."""
    return hashlib.sha256(repr((__version__, content)).encode()).hexdigest()


def is_of(path: Path, digest: str) -> bool:
    """Return whether a file is the picture of some content."""
    try:
        with path.open("rb") as file:
            return digest.encode() in file.read(HEAD)
    except OSError:
        return False


def write_picture(path: Path, figure: Any, digest: str) -> None:
    """Write a figure of matplotlib as a PNG that says what it shows, in place of an older one."""
    with replacing(path) as beside:
        figure.savefig(beside, format="png", metadata={KEY: digest})
