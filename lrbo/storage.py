"""Write beside, then rename: a file is either the old one or the whole new one."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from platformdirs import user_cache_path

from lrbo.errors import DiskFullError, LrboError, PathError

FULL = (errno.ENOSPC, errno.EDQUOT)


def is_full(error: BaseException | None) -> bool:
    """Return whether an error, or what caused it, says that a disk is full.

    safetensors has errors of its own, which only tell the number of the system's.
    """
    while error is not None:
        code = error.errno if isinstance(error, OSError) else None
        told = any(f"(os error {full})" in str(error) for full in FULL)
        if code in FULL or told:
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def naming_full_disk() -> Iterator[None]:
    """Turn what says that a disk is full, in whatever words, into one error that says what to do.

    Raises:
        DiskFullError: Where that is what came.
    """
    try:
        yield
    except LrboError:  # which says already what to do
        raise
    except Exception as error:
        if not is_full(error):
            raise
        place = f" ({error})" if str(error) else ""
        raise DiskFullError(
            f"a disk is full{place}. What was finished is kept and whole; make room and "
            "type the same command again. Statistics, factors and models of the cache "
            "can be made again; LRBO_CACHE moves it."
        ) from error


@contextmanager
def naming_paths() -> Iterator[None]:
    """Turn what the system says of a file or folder that stands in the way into one of our errors.

    Raises:
        PathError: With the path.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        raise PathError(
            f"{os.fsdecode(error.filename)}: {str(error.strerror).lower()}. Mend or move what is "
            "there, and type the same command again."
        ) from error


def cache_folder() -> Path:
    """Return the folder for what can be made again: ``$LRBO_CACHE`` or the user's cache."""
    chosen = os.environ.get("LRBO_CACHE")
    return Path(chosen).expanduser() if chosen else user_cache_path("lrbo", appauthor=False)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path beside ``path`` to write to, and move it into place if all went well.

    The content reaches the disk before the new name does, so that a crash or a full disk
    leaves either what was there or the whole new file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        yield beside
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a small text file so that it is never seen half written."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Give a folder beside ``folder`` to write to, and rename it if all went well.

    As with :func:`replacing`, contents reach the disk before the name does. Who may read the folder
    may read its files, whatever wrote them: safetensors makes them their owner's alone.

    Raises:
        FileExistsError: If ``folder`` exists, or was made by somebody else meanwhile.
    """
    taken = FileExistsError(f"{folder} exists already; nothing is overwritten.")
    if folder.exists():
        raise taken
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    beside.mkdir()  # not mkdtemp, which keeps others out where the umask does not
    try:
        yield beside
        mode = beside.stat().st_mode & 0o666
        for path in beside.rglob("*"):
            if path.is_file():
                path.chmod(mode)
                with path.open("rb+") as file:
                    os.fsync(file.fileno())
        if folder.exists():  # a rename would replace an empty one
            raise taken
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
