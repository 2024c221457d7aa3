"""Write beside, then rename: a file is either the old one or the whole new one."""

from __future__ import annotations

import errno
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout
from platformdirs import user_cache_path

from lrbo.errors import DiskFullError, LrboError, PathError

# Unfinished files lie in a folder of a short name: their own may be as long as the system takes.
BESIDE = ".lrbo-{host}-{random}.new"
HOST = re.sub(r"[^\w.-]", "_", platform.node())[:64]
LOCK = "lock"  # in it, held by the process that writes
# For leftovers of other hosts: there are file systems whose locks other hosts do not see.
STALE_SECONDS = 7 * 24 * 3600.0

CACHED = ("calibration", "factors", "models")  # folders in the cache


def has_errno(error: BaseException | None, codes: Collection[int]) -> bool:
    """Whether an error or its cause has a number of the system, or names it, as safetensors' do."""
    while error is not None:
        named = any(f"(os error {code})" in str(error) for code in codes)
        if named or (isinstance(error, OSError) and error.errno in codes):
            return True
        error = error.__cause__ or error.__context__
    return False


is_full = partial(has_errno, codes=(errno.ENOSPC, errno.EDQUOT, errno.EFBIG))  # or over `ulimit -f`
is_gone = partial(has_errno, codes=(errno.ENOENT, errno.ESTALE))  # a file or its folder


@contextmanager
def naming_system_errors() -> Iterator[None]:
    """Turn a full disk, in any library's words, and OSErrors of paths into errors with advice."""
    try:
        yield
    except LrboError:  # has its advice
        raise
    except Exception as error:
        if is_full(error):
            reason = f" ({error})" if str(error) else ""
            raise DiskFullError(
                f"a disk is full{reason}. What was finished is kept and whole; make room and "
                "type the same command again. Statistics, factors and models of the cache "
                "can be made again; LRBO_CACHE moves it."
            ) from error
        if not isinstance(error, OSError) or error.filename is None:
            raise
        raise PathError(
            f"{os.fsdecode(error.filename)}: {str(error.strerror).lower()}. Mend or move what is "
            "there, and type the same command again."
        ) from error


def cache_folder() -> Path:
    """Folder for what can be made again: ``$LRBO_CACHE`` or the user's cache."""
    folder = os.environ.get("LRBO_CACHE")
    return Path(folder).expanduser() if folder else user_cache_path("lrbo", appauthor=False)


@contextmanager
def _beside(parent: Path, name: str) -> Iterator[Path]:
    """Give a path of this name in a new folder in ``parent``; clean up after killed processes."""
    parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(parent)
    while True:
        holder = parent / BESIDE.format(host=HOST, random=secrets.token_hex(6))
        holder.mkdir()  # not mkdtemp, which keeps others out where the umask does not
        lock = FileLock(holder / LOCK)
        with suppress(Timeout, FileNotFoundError):  # another process removed it before that
            lock.acquire(timeout=0)
            if (holder / LOCK).exists():
                break
            lock.release()
    try:
        yield holder / name
    finally:
        _remove(holder, lock)


def _remove_leftovers(parent: Path) -> None:
    """Remove what dead processes were writing in a folder, whose locks the system released."""
    own = BESIDE.format(host=HOST, random="").rpartition("-")[0]
    for holder in parent.glob(BESIDE.format(host="*", random="*")):
        with suppress(OSError):  # of another user, locked (a TimeoutError), or removed meanwhile
            is_stale = time.time() - holder.stat().st_mtime > STALE_SECONDS
            if holder.name.rpartition("-")[0] != own and not is_stale:
                continue
            if (holder / LOCK).exists():
                lock = FileLock(holder / LOCK)
                lock.acquire(timeout=0)
                _remove(holder, lock)
            else:  # empty: a process died before, or after, it held the lock
                holder.rmdir()


def _remove(holder: Path, lock: FileLock) -> None:
    """Remove a folder whose lock is held; the lock last, so that nobody else begins in between."""
    for path in holder.glob("*"):
        if path.name != LOCK:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
    (holder / LOCK).unlink(missing_ok=True)
    lock.release()
    with suppress(OSError):  # removed by others, as a whole or with its parent
        holder.rmdir()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path beside ``path`` to write to; if all went well, move it there once on disk."""
    with _beside(path.parent, path.name) as beside:
        yield beside
        _sync(beside)
        beside.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write a small text file so that it is never seen half written."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Give a folder beside ``folder`` to write to, and rename it, once on disk, if all went well.

    Its files get the permissions of the folder: safetensors would make them their owner's alone.
    FileExistsError if ``folder`` exists, or another process made it meanwhile.
    """
    exists = FileExistsError(f"{folder} exists already; nothing is overwritten.")
    if folder.exists():
        raise exists
    with _beside(folder.parent, folder.name) as beside:
        beside.mkdir()
        yield beside
        mode = beside.stat().st_mode & 0o666
        for path in beside.rglob("*"):
            if path.is_file():
                path.chmod(mode)
                _sync(path)
        if folder.exists():  # a rename would replace an empty one
            raise exists
        beside.rename(folder)


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def remove_whole(path: Path) -> None:
    """Remove a file or folder, moving it away as a whole first."""
    with suppress(FileNotFoundError), _beside(path.parent, path.name) as beside:
        path.rename(beside)
