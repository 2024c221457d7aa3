"""What to type: values in Hydra's grammar, in quotes where the shell or Hydra needs them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lrbo.config.choices import STUDIES

# A text that is typed so is quoted for Hydra by the command itself.
TYPED = re.compile(r"(\w+=)?[\w.]+|[\w./-]+", re.ASCII)
SPECIAL = re.compile(r'["$`\\!\n]')  # also in double quotes


def command(name: str, **values: Any) -> str:
    """Write the command line that gives values by key, to be pasted into a shell."""
    line = ["lrbo", name]
    for key, value in values.items():
        is_plain = isinstance(value, str) and TYPED.fullmatch(value)
        line.append(f"{key}={value}" if is_plain else assigned(key, value))
    return joined(line)


def joined(words: Iterable[str]) -> str:
    r"""Write a command line as a person would.

    Example:
        >>> joined(["lrbo", "search", "study='7'", "space.forms=[int4,int8]"])
        'lrbo search "study=\'7\'" \'space.forms=[int4,int8]\''
    """
    return " ".join(map(quoted, words))


def quoted(word: str) -> str:
    """Quote a word for a shell: in double quotes if it has single ones."""
    has_single = "'" in word and not SPECIAL.search(word)
    return f'"{word}"' if has_single else shlex.quote(word)


def assigned(key: str, value: Any) -> str:
    """Write an override, its value in Hydra's grammar."""
    return f"{key}={grammar(value)}"


def key_of(override: str) -> str:
    """Return the key of an override, such as ``+key=value``."""
    return override.lstrip("+~").partition("=")[0]


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
    # Backslashes before a quote would escape it.
    quoted = re.sub(r"(\\*)'", r"\1\1\\'", literal(value))
    return "'" + re.sub(r"(\\+)\Z", r"\1\1", quoted) + "'"


def literal(value: str) -> str:
    """Write a text for OmegaConf, which would take ``${`` for a reference to another key."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)


def keys_of(folder: Path, studies: str | None = None) -> dict[str, str]:
    """Return the keys to type for a study: its name where that is enough, else its path.

    ``studies``, the folder in which its name was looked up, is typed as well, for it has the MLflow
    store; it is ``None`` for a study that was given as a path.
    """
    if folder == Path(STUDIES) / folder.name:
        return {"study": folder.name}
    if studies is not None and folder == Path(studies) / folder.name:
        return {"study": folder.name, "studies": studies}
    return {"study": str(folder if folder.parent.parts else Path.cwd() / folder)}
