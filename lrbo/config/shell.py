"""What to type: values in Hydra's grammar, in quotes where the shell or Hydra needs them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from lrbo.options import STUDIES

TYPED = re.compile(r"(\w+=)?[\w.]+|[\w./-]+", re.ASCII)


def command(name: str, **values: Any) -> str:
    """Write the command line that gives some texts, to be pasted into a shell.

    Args:
        name: Of the command.
        **values: By key, which holds a text or takes no other; a dotted one is given as
            ``**{"search.other_versions": True}``.
    """
    line = [
        # A text that is typed so is quoted for Hydra by the command itself.
        f"{key}={value}"
        if isinstance(value, str) and TYPED.fullmatch(value)
        else assigned(key, value)
        for key, value in values.items()
    ]
    return shlex.join(["lrbo", name, *line])


def assigned(key: str, value: Any) -> str:
    """Write an override, its value in Hydra's grammar."""
    return f"{key}={grammar(value)}"


def grammar(value: Any) -> str:
    r"""Write a value in Hydra's grammar.

    Example:
        >>> grammar([None, True, 0.5, "plain", "it's", "1e3"])
        "[null,true,0.5,plain,'it\\'s','1e3']"
    """
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{','.join(map(grammar, value))}]"
    return text(value) if isinstance(value, str) else str(value)


def text(value: str) -> str:
    """Write a text in Hydra's grammar, in quotes where it would be read as something else."""
    plain = re.fullmatch(r"(\.{0,2}/|[A-Za-z_])[\w./-]*", value, re.ASCII)
    if plain and value.lower() not in ("null", "true", "false", "nan", "inf"):
        return value
    return "'" + re.sub(r"(\\*)('|\Z)", _escaped, literal(value)) + "'"


def literal(value: str) -> str:
    """Write a text for OmegaConf, which would take ``${`` for a reference to another key."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)


def _escaped(match: re.Match[str]) -> str:
    """Double the backslashes before a quote, where they would escape it, and escape the quote."""
    slashes, quote = match.groups()
    return slashes * 2 + ("\\'" if quote else "")


def keys_of(folder: Path, studies: str | None = None) -> dict[str, str]:
    """Return what is typed to mean a study: ``studies=`` too, which has its MLflow store.

    Args:
        folder: Of the study.
        studies: The folder that its name was looked up in; ``None`` if it was given as a path.
    """
    if studies not in (None, STUDIES) and folder == Path(str(studies)) / folder.name:
        return {"study": folder.name, "studies": str(studies)}
    return {"study": study_at(folder)}


def study_at(folder: Path) -> str:
    """Write what ``study=`` must be to mean a folder: a name where the name is enough."""
    named = folder == Path(STUDIES) / folder.name
    return folder.name if named else str(folder if folder.parent.parts else Path.cwd() / folder)
