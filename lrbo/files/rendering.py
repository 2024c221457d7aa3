"""Pages and Markdown from templates, which take whatever is put into them for plain text."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lrbo.terminal import printable

# What begins markup in the middle of a line, also in GitHub's dialect (tables, formulas).
_SPECIAL = re.compile(r"[\\`*_\[\]<>|~&$#]")


def render(template: str, **values: Any) -> str:
    """Fill a template of ``lrbo/templates``.

    Values are escaped for what the template is, HTML or Markdown, and lose control characters, with
    which they could command the terminal of whoever prints the file. Only what it marks with
    ``|safe``, and in Markdown the filters below, goes in as it is.

    Args:
        template: Name of the file, which ends with ``.html`` or ``.md``.
        **values: All that it names; one that is missing is an error.
    """
    text = _environment(template.endswith(".md")).get_template(template).render(values)
    # Half of a surrogate pair, which JSON and names of files may hold, is in no text file.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


@cache
def _environment(is_markdown: bool) -> Environment:
    made = Environment(
        loader=PackageLoader("lrbo", "templates"),
        autoescape=not is_markdown,
        finalize=_finalized(markdown if is_markdown else printable),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    if is_markdown:
        made.filters |= {"code": code, "fenced": fenced}
    return made


def _finalized(escape: Callable[[str], str]) -> Callable[[Any], str]:
    """Escape every value that a template prints, but what a filter made or marked as safe."""
    return lambda value: value if isinstance(value, Markup) else escape(str(value))


def markdown(text: str) -> str:
    """Escape a text for the middle of a line of Markdown, where it stays on that line."""
    return _SPECIAL.sub(r"\\\g<0>", _one_line(text))


def code(text: str) -> Markup:
    """Make a code span that the text cannot close, also in the cell of a table."""
    line = _one_line(text).replace("|", r"\|")
    fence = "`" * (_longest_run(line) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return Markup(f"{fence}{pad}{line}{pad}{fence}" if line else "")


def fenced(text: str, language: str) -> Markup:
    """Make a block of code that the text cannot close."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return Markup(f"{fence}{language}\n{printable(text)}\n{fence}")


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def _one_line(text: str) -> str:
    return printable(" ".join(text.split()))
