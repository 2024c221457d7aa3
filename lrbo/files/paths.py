"""Paths that commands read and write, judged before the work: what is tried is taken away again."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from lrbo.errors import cut

BELOW = 160  # bytes of the names of files below a folder that is written
PATH_MAX = 4096
# What opens like a file, and then waits for ever, or swallows what is written.
SPECIAL = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def kind_of(path: Path) -> str:
    """Say what is at a path: ``folder``, ``file``, ``nothing``, or in words what else."""
    try:
        if path.is_symlink() and not os.path.exists(path):  # noqa: PTH110  # takes any name
            return f"a link to {os.readlink(path)}, which is not there"  # noqa: PTH115
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "nothing"
    except OSError as error:
        return str(error.strerror).lower()
    except ValueError as error:  # a null byte
        return str(error)
    if stat.S_ISREG(mode):
        return "file"
    return SPECIAL.get(stat.S_IFMT(mode), "folder")


def check_folder(key: str, path: str) -> list[str]:
    """Find the problem if there is no folder to read."""
    if (kind := _named(path)) == "folder":
        return []
    return [f"{_given(key, path)}: expected a folder, there is {_an(kind)}"]


def check_new(key: str, path: str) -> list[str]:
    """Find the problem if a folder exists already or cannot be made."""
    if os.path.lexists(path) and "\0" not in path:
        return [f"{_given(key, path)} exists already; lrbo overwrites nothing, choose another"]
    return check_writable(key, path)


def check_writable(key: str, path: str) -> list[str]:
    """Find the problem if a folder cannot be made or written."""
    if problem := _unfit(path):
        return [f"{_given(key, path)}: {problem}"]
    folder, new = Path(path).absolute(), []
    while not os.path.lexists(folder):
        new.append(folder.name)
        folder = folder.parent
    if (kind := kind_of(folder)) != "folder":
        what = "is a file, not a folder" if kind == "file" else f"is {kind}; expected a folder"
        return [f"{_given(key, path)}: {folder} {what}"]
    if ".." in new:  # what is before the dots would be made on the way, and left there
        return [
            f"{_given(key, path)}: there is no {folder / new[-1]} to go up from; expected a path "
            f"such as {_without_dots(path)}"
        ]
    longest, limit = max((len(os.fsencode(name)) for name in new), default=0), _longest_name(folder)
    if longest > limit:
        return [f"{_given(key, path)}: a name of {longest} bytes; expected at most {limit}"]
    if not os.access(folder, os.W_OK | os.X_OK):
        return [f"{_given(key, path)}: no permission to write in {folder}"]
    try:  # permissions do not tell of /proc, of read-only disks, or of quotas on files
        Path(tempfile.mkdtemp(prefix=".lrbo-", dir=folder)).rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):  # room may be made meanwhile
            return [f"{_given(key, path)}: cannot write in {folder}: {error.strerror}"]
    return []


def check_appended(key: str, path: str) -> list[str]:
    """Find the problem if a file cannot be made, or be added to."""
    if problem := _unfit(path):
        return [f"{_given(key, path)}: {problem}"]
    if not os.path.lexists(path) and not path.endswith(os.sep):
        return check_writable(key, path)
    if (kind := kind_of(Path(path))) != "file":
        return [f"{_given(key, path)}: expected a file, there is {_an(kind)}"]
    if not os.access(path, os.W_OK):
        return [f"{_given(key, path)}: no permission to write to it"]
    return []


def check_name(key: str, path: str, *, root: bool = False) -> list[str]:
    """Find the problem of a folder that others are made in or that is called by its name.

    Args:
        key: Of the configuration.
        path: What it is set to.
        root: Whether the folder only holds others, so that ``.`` will do.
    """
    parts = path.split("/")
    if not path.strip():
        return [f"{_given(key, path)}: expected a folder, came nothing"]
    if upwards := _check_upwards(key, path):
        return upwards
    if not [part for part in parts if part not in ("", ".")] and not (root and path[0] == "."):
        return [f"{_given(key, path)}: expected a folder with a name of its own"]
    problem = _unfit(path)
    return [f"{_given(key, path)}: {problem}"] if problem else []


def _check_upwards(key: str, path: str) -> list[str]:
    """Find the problem if a path goes up: where to, nobody knows before what it names is there."""
    if ".." not in path.split("/"):
        return []
    expected = f"a folder without '..' in it, such as {_without_dots(path)}"
    return [f"{_given(key, path)}: expected {expected}"]


def _without_dots(path: str) -> str:
    """Write a path without ``..``; links stay links."""
    return os.path.normpath(os.path.abspath(path))  # noqa: PTH100


def check_place(key: str, path: str) -> list[str]:
    """Find the problem if neither a folder is at a path nor one could be, so that nothing is read.

    A file is said by whoever reads or writes there.
    """
    kind = kind_of(Path(path))
    return [] if kind in ("folder", "file", "nothing") else [f"{_given(key, path)}: {kind}"]


def _given(key: str, path: str) -> str:
    """Write what was given, cut where nobody reads on."""
    return f"{key}={cut(path)!r}"


def _named(path: str) -> str:
    """Say what a value stands for; an empty one is not the working folder."""
    return kind_of(Path(path)) if path.strip() else "no name"


def _an(kind: str) -> str:
    """Put an article before what is a thing."""
    return f"a {kind}" if kind in ("folder", "file") else kind


def _unfit(path: str) -> str:
    """Say why no system or no terminal takes a path, if so."""
    if not path.strip():
        return "expected a name, came nothing"
    if not path.isprintable():
        return "it has characters that cannot be printed; leave them out"
    if path.startswith("~"):
        return "there is no such user; write the folder as it is"
    if len(os.fsencode(Path(path).absolute())) + BELOW > PATH_MAX:
        return f"a path of more than {PATH_MAX - BELOW:,} bytes; choose a shorter one"
    return ""


def _longest_name(folder: Path) -> int:
    """Ask how many bytes a name may have in a folder."""
    with suppress(OSError, ValueError):
        return os.pathconf(folder, "PC_NAME_MAX")
    return 255
