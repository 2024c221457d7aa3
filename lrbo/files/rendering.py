"""Pages and Markdown from templates, which escape the values that are filled in."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lrbo.progress import printable

# What begins markup in the middle of a line, also in GitHub's dialect (tables, formulas).
_SPECIAL = re.compile(r"[\\`*_\[\]<>|~&$#]")


def render(template: str, **values: Any) -> str:
    """Fill a template of ``lrbo/files/templates``, which must be given each value that it names.

    Values are escaped for HTML or Markdown, except what the template marks with ``|safe`` or a
    filter below, and lose control characters, which could command a terminal.
    """
    text = _environment(template.endswith(".md")).get_template(template).render(values)
    # Half of a surrogate pair, which JSON and names of files may hold, is in no text file.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


@cache
def _environment(is_markdown: bool) -> Environment:
    escape = markdown if is_markdown else printable
    environment = Environment(
        loader=PackageLoader("lrbo", "files/templates"),
        autoescape=not is_markdown,
        finalize=lambda value: value if isinstance(value, Markup) else escape(str(value)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"code": code, "fenced": fenced}
    return environment


def markdown(text: str) -> str:
    """Escape a text for the middle of a line of Markdown."""
    return _SPECIAL.sub(r"\\\g<0>", printable(" ".join(text.split())))


def code(text: str) -> Markup:
    """Write a code span that the text cannot close, also in the cell of a table."""
    line = printable(" ".join(text.split())).replace("|", r"\|")
    fence = "`" * (_longest_run(line) + 1)
    pad = " " if "`" in (line[:1], line[-1:]) else ""
    return Markup(f"{fence}{pad}{line}{pad}{fence}" if line else "")


def fenced(text: str, language: str) -> Markup:
    """Write a code block that the text cannot close."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return Markup(f"{fence}{language}\n{printable(text)}\n{fence}")


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
