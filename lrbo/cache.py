"""Folders that can be made again: read whole as they were written, or made once more."""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict  # that of Python 3.11 pydantic does not take

from lrbo.errors import CacheError, LrboError, reading
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
    """A file of the folder: how long it is, and what it holds."""

    bytes: Count
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
    found = holds or {}
    files: dict[str, FileFields] = {
        path.name: {"bytes": path.stat().st_size, "holds": list(found.get(path.name, ()))}
        for path in sorted(folder.iterdir())
    }
    manifest: Manifest = {"format": FORMAT, "fingerprint": fingerprint, "files": files}
    write_text(folder / ABOUT, json.dumps(manifest) + "\n")


def opened(folder: Path, fingerprint: str) -> dict[str, list[str]]:
    """Check that a folder is as :func:`seal` left it, and return what its files hold.

    Args:
        folder: Of the cache.
        fingerprint: Of everything that it should depend on.

    Raises:
        CacheError: If a file is missing or of another length, or it was made for something else.
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
            size = (folder / name).stat().st_size
        except OSError as error:
            raise CacheError(f"{folder / name} cannot be read: {error.strerror}") from error
        if size != file["bytes"]:
            raise CacheError(f"{folder / name} has {size:,} bytes, expected {file['bytes']:,}")
    return {name: file["holds"] for name, file in manifest["files"].items()}


def kept(folder: Path, make: Callable[[], object], read: Callable[[], Opened]) -> Opened:
    """Return what a folder of the cache holds, made first where it is missing or not whole.

    Args:
        folder: That somebody may delete, or make, at any time.
        make: Makes it; may read other folders of the cache.
        read: Reads it.

    Raises:
        CacheError: If it cannot be written, or is deleted again and again.
    """
    reason: object = None
    for _ in range(ATTEMPTS):
        try:
            if folder.exists():
                return read()
            make()
        except FileExistsError:  # another process was faster, which made the same
            continue
        except CacheError as error:
            reason = error
        except LrboError:
            raise
        except OSError as error:
            if error.errno in LOCKED:
                raise _unwritable(folder, error) from error
            if not is_gone(error):
                raise
            reason = error
        except Exception as error:  # safetensors has errors of its own
            if not is_gone(error):
                raise
            reason = error
        else:
            continue
        log.warning("%s is not whole, and is made again: %s", folder, reason)
        try:
            remove_whole(folder)
        except OSError as error:
            raise _unwritable(folder, error) from error
    try:
        return read()
    except CacheError as error:
        raise CacheError(
            f"{folder} was made {ATTEMPTS} times and is not whole: {error}. Does another process "
            "delete it? LRBO_CACHE=FOLDER keeps it elsewhere"
        ) from error


def _unwritable(folder: Path, error: OSError) -> CacheError:
    """Return what to do where the cache cannot be written."""
    return CacheError(
        f"{folder} cannot be written: {error.strerror or error}. It holds what can be made again, "
        "and must be made now: set LRBO_CACHE to a folder that you may write"
    )
