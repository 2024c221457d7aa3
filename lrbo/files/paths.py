"""Checks of paths that commands read and write, before the work."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from pathlib import Path

from lrbo.errors import cut

BASE, ADAPTER = "base", "adapter"  # folders of a checkpoint that is written in parts
BELOW = 160  # bytes of the names of files below a folder that is written
PATH_MAX = 4096
# These open like files, then wait forever or swallow what is written.
SPECIAL = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def kind_of(path: Path) -> str:
    """Name what is at a path: ``folder``, ``file``, ``nothing``, or another thing in words."""
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
    """List the problem if there is no folder to read."""
    kind = kind_of(Path(path)) if path.strip() else "no name"  # not the working folder
    there = "a file" if kind == "file" else kind
    problem = "" if kind == "folder" else f"expected a folder, there is {there}"
    return _problems(key, path, problem)


def check_new(key: str, path: str) -> list[str]:
    """List the problem if a folder exists already or cannot be made."""
    if os.path.lexists(path) and "\0" not in path:
        return [f"{key}={cut(path)!r} exists already; lrbo overwrites nothing, choose another"]
    return check_writable(key, path)


def check_writable(key: str, path: str) -> list[str]:
    """List the problem if a folder cannot be made or written."""
    return _problems(key, path, _unfit(path) or _unwritable(path))


def _unwritable(path: str) -> str:
    folder, new = Path(path).absolute(), []
    while not os.path.lexists(folder):
        new.append(folder.name)
        folder = folder.parent
    if (kind := kind_of(folder)) != "folder":
        what = "is a file, not a folder" if kind == "file" else f"is {kind}; expected a folder"
        return f"{folder} {what}"
    if ".." in new:  # the folder before the dots would be made on the way, and left there
        missing, example = folder / new[-1], os.path.abspath(path)  # noqa: PTH100  # keeps links
        return f"there is no {missing} to go up from; expected a path such as {example}"
    longest = max((len(os.fsencode(name)) for name in new), default=0)
    if longest > (limit := os.pathconf(folder, "PC_NAME_MAX")):
        return f"a name of {longest} bytes; expected at most {limit}"
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"no permission to write in {folder}"
    try:  # permissions do not tell of /proc, of read-only disks, or of quotas on files
        Path(tempfile.mkdtemp(prefix=".lrbo-", dir=folder)).rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):  # room may be made meanwhile
            return f"cannot write in {folder}: {error.strerror}"
    return ""


def check_appended(key: str, path: str) -> list[str]:
    """List the problem if a file cannot be made or appended to."""
    problem = _unfit(path)
    if not problem and not os.path.lexists(path) and not path.endswith(os.sep):
        problem = _unwritable(path)
    elif not problem and (kind := kind_of(Path(path))) != "file":
        problem = f"expected a file, there is {'a folder' if kind == 'folder' else kind}"
    elif not problem and not os.access(path, os.W_OK):
        problem = "no permission to write to it"
    return _problems(key, path, problem)


def check_name(key: str, path: str, *, root: bool = False) -> list[str]:
    """List the problem of a name of a folder; the ``root`` of others may also be ``.``."""
    parts = path.split("/")
    if not path.strip():
        problem = "expected a folder, got nothing"
    elif ".." in parts:  # what they lead to depends on links that may not be there yet
        example = os.path.abspath(path)  # noqa: PTH100  # keeps links
        problem = f"expected a folder without '..' in it, such as {example}"
    elif not {*parts} - {"", "."} and not (root and path[0] == "."):
        problem = "expected a folder with a name of its own"
    else:
        problem = _unfit(path)
    return _problems(key, path, problem)


def check_place(key: str, path: str) -> list[str]:
    """List the problem if something is at a path that is neither a folder nor a file."""
    kind = kind_of(Path(path))
    return _problems(key, path, "" if kind in ("folder", "file", "nothing") else kind)


def _problems(key: str, path: str, problem: str) -> list[str]:
    return [f"{key}={cut(path)!r}: {problem}"] if problem else []


def _unfit(path: str) -> str:
    """Say why no system or no terminal takes a path, if so."""
    if not path.strip():
        return "expected a name, got nothing"
    if not path.isprintable():
        return "it has characters that cannot be printed; leave them out"
    if path.startswith("~"):
        return "there is no such user; write the folder as it is"
    if len(os.fsencode(Path(path).absolute())) + BELOW > PATH_MAX:
        return f"a path of more than {PATH_MAX - BELOW:,} bytes; choose a shorter one"
    return ""


def model_folder(folder: str) -> str:
    """Return where the model of a checkpoint is: beside its adapter if it is written in parts."""
    base = os.path.join(folder, BASE)  # noqa: PTH118  # keeps what was typed
    in_parts = os.path.isdir(base) and not os.path.exists(os.path.join(folder, "config.json"))  # noqa: PTH110, PTH112, PTH118
    return base if in_parts else folder
