"""Write beside, then rename: a file is either the old one or the whole new one."""

from __future__ import annotations

import errno
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from platformdirs import user_cache_path

from lrbo.errors import DiskFullError, LrboError, PathError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the last: beyond `ulimit -f`
GONE = (errno.ENOENT, errno.ESTALE)

# What is written beside its place lies in a folder of a short name, for that of its place may be
# as long as the system takes.
BESIDE = ".lrbo-{host}-{random}.new"
LOCK = "lock"  # in it, held by the process that writes
# What a process of another host left is judged by its age too: there are file systems whose locks
# other hosts do not see.
STALE_SECONDS = 7 * 24 * 3600.0

CACHED = ("calibration", "factors", "models")  # folders in the cache


def is_full(error: BaseException | None) -> bool:
    """Return whether an error, or what caused it, says that a disk is full."""
    return _says(error, FULL)


def is_gone(error: BaseException | None) -> bool:
    """Return whether an error, or what caused it, says that a file or its folder was deleted."""
    return _says(error, GONE)


def _says(error: BaseException | None, codes: tuple[int, ...]) -> bool:
    """Return whether an error has, or tells, one of the system's numbers.

    safetensors has errors of its own, which only tell the number of the system's.
    """
    while error is not None:
        code = error.errno if isinstance(error, OSError) else None
        told = any(f"(os error {known})" in str(error) for known in codes)
        if code in codes or told:
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
def _beside(parent: Path, name: str) -> Iterator[Path]:
    """Give a path to write to, in a folder in ``parent`` that a killed process leaves to the next.

    Args:
        parent: Made if it is missing; what dead processes left there is removed.
        name: Of the last part of the path.
    """
    parent.mkdir(parents=True, exist_ok=True)
    remove_left(parent)
    while True:
        holder = parent / BESIDE.format(host=_host(), random=secrets.token_hex(6))
        holder.mkdir()  # not mkdtemp, which keeps others out where the umask does not
        lock = FileLock(holder / LOCK)
        try:
            lock.acquire(timeout=0)
        except (Timeout, FileNotFoundError):  # it was removed by another process before that
            continue
        if (holder / LOCK).exists():
            break
        lock.release()
    try:
        yield holder / name
    finally:
        _remove(holder, lock)


def _host() -> str:
    """Return the name of this machine as a part of a file's name."""
    return re.sub(r"[^\w.-]", "_", platform.node())[:64]


def remove_left(parent: Path) -> None:
    """Remove what processes that are gone were writing in a folder.

    Each holds a lock on what it writes, which the system releases when it dies.
    """
    own = BESIDE.format(host=_host(), random="").rpartition("-")[0]
    for holder in parent.glob(BESIDE.format(host="*", random="*")):
        with suppress(OSError):  # of another user, or another process is quicker
            is_stale = time.time() - holder.stat().st_mtime > STALE_SECONDS
            if holder.name.rpartition("-")[0] != own and not is_stale:
                continue
            if not (holder / LOCK).exists():
                holder.rmdir()  # empty: a process died before, or after, it held the lock
                continue
            lock = FileLock(holder / LOCK)
            with suppress(Timeout):
                lock.acquire(timeout=0)
                _remove(holder, lock)


def _remove(holder: Path, lock: FileLock) -> None:
    """Remove a folder whose lock is held; the lock last, so that nobody else begins in between."""
    for path in holder.glob("*"):
        if path.name != LOCK:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
    (holder / LOCK).unlink(missing_ok=True)
    lock.release()
    with suppress(OSError):  # somebody removed it, as a whole or what it lies in
        holder.rmdir()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path beside ``path`` to write to, and move it into place if all went well.

    The content reaches the disk before the new name does, so that a crash or a full disk
    leaves either what was there or the whole new file.
    """
    with _beside(path.parent, path.name) as beside:
        yield beside
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        beside.replace(path)


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
    with _beside(folder.parent, folder.name) as beside:
        beside.mkdir()
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


def remove_whole(path: Path) -> None:
    """Remove a file or folder, which is first out of its place as a whole."""
    with suppress(FileNotFoundError), _beside(path.parent, path.name) as beside:
        path.rename(beside)
