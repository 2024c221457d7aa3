"""Folders that can be made again: read whole as they were written, or made once more."""

from __future__ import annotations

import errno
import json
import logging
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TypeVar

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict  # that of Python 3.11 pydantic does not take

from lrbo.errors import CacheError, LrboError, PathError, reading
from lrbo.parsing import ContentError, Count, parsed
from lrbo.storage import is_gone, remove_whole, write_text

log = logging.getLogger(__name__)

ABOUT = "about.json"
FORMAT = 1
ATTEMPTS = 3  # to read what may be deleted while it is made or read
LOCKED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)

Opened = TypeVar("Opened")


@with_config(ConfigDict(extra="forbid"))
class FileFields(TypedDict):
    """A file of the folder: its length and checksum, and what it holds."""

    bytes: Count
    crc32: Count
    holds: list[str]


@with_config(ConfigDict(extra="forbid"))
class Manifest(TypedDict):
    """``about.json``, written last: a folder without it, or unlike it, is not whole."""

    format: Count
    fingerprint: str
    files: dict[str, FileFields]


def seal(folder: Path, fingerprint: str, holds: Mapping[str, Sequence[str]] | None = None) -> None:
    """Write down which files a folder has, by which it is known to be whole.

    Args:
        folder: With all its files.
        fingerprint: Of everything that they depend on.
        holds: Names of what is in a file, by the file's.
    """
    named = holds or {}
    files: dict[str, FileFields] = {}
    for path in sorted(folder.iterdir()):
        size, checksum = _content(path)
        files[path.name] = {"bytes": size, "crc32": checksum, "holds": [*named.get(path.name, ())]}
    manifest: Manifest = {"format": FORMAT, "fingerprint": fingerprint, "files": files}
    write_text(folder / ABOUT, json.dumps(manifest) + "\n")


def opened(folder: Path, fingerprint: str) -> dict[str, list[str]]:
    """Check that a folder is as :func:`seal` left it, and return what its files hold.

    Args:
        folder: Of the cache.
        fingerprint: Of everything that it should depend on.

    Raises:
        CacheError: If a file is missing or holds anything else, or all of it was made for
            something else.
    """
    path = folder / ABOUT
    with reading(CacheError, f"{path} cannot be read"):
        content = path.read_bytes()
    try:
        manifest: Manifest = parsed(content, Manifest, str(path))
    except ContentError as error:
        raise CacheError(str(error)) from error
    if (manifest["format"], manifest["fingerprint"]) != (FORMAT, fingerprint):
        raise CacheError(
            f"{path} has format {manifest['format']} and fingerprint {manifest['fingerprint']}, "
            f"expected {FORMAT} and {fingerprint}"
        )
    for name, file in manifest["files"].items():
        try:
            size, checksum = _content(folder / name)
        except OSError as error:
            raise CacheError(f"{folder / name} cannot be read: {error.strerror}") from error
        if size != file["bytes"]:
            raise CacheError(f"{folder / name} has {size:,} bytes, expected {file['bytes']:,}")
        if checksum != file["crc32"]:
            raise CacheError(f"{folder / name} is damaged: its checksum is another one")
    return {name: file["holds"] for name, file in manifest["files"].items()}


def _content(path: Path) -> tuple[int, int]:
    """Return the length of a file, and the CRC-32 of its content."""
    about = path.stat()
    return about.st_size, _crc32(path, about.st_size, about.st_mtime_ns)


@cache  # a file is opened several times in a command, and read whole for this once
def _crc32(path: Path, _size: int, _changed_ns: int) -> int:
    """Return the CRC-32 of a file's content: 0.05 s for 100 MB, less than to read them."""
    checksum = 0
    with path.open("rb") as file:
        while piece := file.read(2**20):
            checksum = zlib.crc32(piece, checksum)
    return checksum


def kept(folder: Path, make: Callable[[], object], read: Callable[[], Opened]) -> Opened:
    """Return what a folder of the cache holds, made first where it is missing or not whole.

    Args:
        folder: That somebody may delete, or make, at any time.
        make: Makes it; may read other folders of the cache.
        read: Reads it.

    Raises:
        PathError: If it cannot be written, or is deleted or damaged again and again.
    """
    last: Exception | None = None
    for _ in range(ATTEMPTS):
        try:
            if not folder.exists():
                _make(folder, make)
            return _read(folder, read)
        except Exception as error:
            if not _is_lost(error):
                raise
            last = error
        log.warning("%s; %s is made again", last, folder)
    raise PathError(
        f"{folder} was not whole {ATTEMPTS} times, the last time because {last}. Does another "
        "process delete it? LRBO_CACHE=FOLDER keeps it elsewhere"
    ) from last


def _make(folder: Path, make: Callable[[], object]) -> None:
    """Make a folder of the cache, unless another process is faster, which makes the same.

    Raises:
        PathError: If it cannot be written.
    """
    try:
        with suppress(FileExistsError):
            make()
    except OSError as error:
        if error.errno in LOCKED:
            raise _unwritable(folder, error) from error
        raise


def _read(folder: Path, read: Callable[[], Opened]) -> Opened:
    """Read a folder of the cache, and remove it where it is not whole.

    Raises:
        PathError: If it cannot be removed.
    """
    try:
        return read()
    except Exception as error:
        if _is_lost(error):
            try:
                remove_whole(folder)
            except OSError as locked:
                raise _unwritable(folder, locked) from locked
        raise


def _is_lost(error: Exception) -> bool:
    """Return whether an error says that something of the cache is gone or damaged.

    That may be told by the system, or by safetensors, which has errors of its own.
    """
    return isinstance(error, CacheError) or (not isinstance(error, LrboError) and is_gone(error))


def _unwritable(folder: Path, error: OSError) -> PathError:
    """Return what to do where the cache cannot be written."""
    return PathError(
        f"{folder} cannot be written: {error.strerror or error}. It holds what can be made again, "
        "and must be made now: set LRBO_CACHE to a folder that you may write"
    )
