"""Cache folders, which are made again where they are not whole."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lrbo.errors import CacheError, LrboError, PathError, reading
from lrbo.files.atomic import is_gone, new_folder, remove_whole, write_text
from lrbo.files.parsing import ContentError, Count, parsed

log = logging.getLogger(__name__)

ABOUT = "about.json"
FORMAT = 1
ATTEMPTS = 3  # to make and read a folder that others may delete meanwhile
LOCKED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)

Opened = TypeVar("Opened")


@dataclass(frozen=True)
class FileFields:
    """A file of the folder; ``holds`` are the owners of its tensors."""

    bytes: Count
    crc32: Count
    holds: list[str]


@dataclass(frozen=True)
class Manifest:
    """``about.json``, written last: the folder is whole if it agrees."""

    format: Count
    fingerprint: str
    files: dict[str, FileFields]


def fingerprint_of(content: Mapping[str, Any]) -> str:
    """Return a short digest of all that a folder of the cache depends on, as values of JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def seal(folder: Path, fingerprint: str, holds: Mapping[str, Sequence[str]] | None = None) -> None:
    """Write the manifest of a folder with all its files; ``holds`` are the owners by file."""
    files = {
        path.name: _described(path, (holds or {}).get(path.name, ()))
        for path in sorted(folder.iterdir())
    }
    manifest = Manifest(format=FORMAT, fingerprint=fingerprint, files=files)
    write_text(folder / ABOUT, json.dumps(asdict(manifest)) + "\n")


def opened(folder: Path, fingerprint: str) -> dict[str, list[str]]:
    """Return the owners of each file's tensors; CacheError for other files or fingerprints."""
    path = folder / ABOUT
    try:
        manifest: Manifest = parsed(path.read_bytes(), Manifest, str(path))
    except (OSError, ContentError) as error:
        raise CacheError(str(error)) from error  # which names the file
    if (manifest.format, manifest.fingerprint) != (FORMAT, fingerprint):
        raise CacheError(
            f"{path} has format {manifest.format} and fingerprint {manifest.fingerprint}, "
            f"expected {FORMAT} and {fingerprint}"
        )
    for name, file in manifest.files.items():
        with reading(CacheError, f"{folder / name} cannot be read"):
            actual = _described(folder / name, file.holds)
        if actual != file:
            raise CacheError(f"{folder / name} is damaged: its size or checksum is another one")
    return {name: file.holds for name, file in manifest.files.items()}


def save_parts(
    folder: Path, parts: Iterator[Mapping[str, Mapping[str, Tensor]]], fingerprint: str
) -> None:
    """Write tensors by owner (a layer or a site) and name, one file per part as they come."""
    with new_folder(folder) as beside:
        owners: dict[str, list[str]] = {}
        for index, part in enumerate(parts):
            file = f"part_{index:05d}.safetensors"
            owners[file] = list(part)
            tensors = {
                f"{owner}|{name}": tensor.contiguous()
                for owner, named in part.items()
                for name, tensor in named.items()
            }
            save_file(tensors, beside / file)
        seal(beside, fingerprint, owners)


def read_part(path: Path, owner: str | None = None) -> dict[str, dict[str, Tensor]]:
    """Map the tensors of a file by owner (or of one) and name; CacheError if gone or damaged."""
    tensors: dict[str, dict[str, Tensor]] = {}
    with reading(CacheError, f"{path} is damaged"), safe_open(str(path), framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 (not a mapping)
            of, _, name = key.rpartition("|")
            if owner in (None, of):
                tensors.setdefault(of, {})[name] = file.get_tensor(key)
    return tensors


def _described(path: Path, holds: Sequence[str]) -> FileFields:
    status = path.stat()
    checksum = _crc32(path, status.st_size, status.st_mtime_ns)
    return FileFields(bytes=status.st_size, crc32=checksum, holds=[*holds])


@cache  # a command opens a file several times
def _crc32(path: Path, _size: int, _changed_ns: int) -> int:
    checksum = 0
    with path.open("rb") as file:
        while piece := file.read(2**20):  # 0.05 s for 100 MB
            checksum = zlib.crc32(piece, checksum)
    return checksum


def cached(folder: Path, make: Callable[[], object], read: Callable[[], Opened]) -> Opened:
    """Read a folder of the cache, after making it where it is missing or not whole.

    Other processes may delete or make it at any time.

    Raises:
        PathError: If it cannot be written, or is lost or damaged at each attempt.
    """
    last: Exception | None = None
    try:
        for _ in range(ATTEMPTS):
            try:
                if not folder.exists():
                    with suppress(FileExistsError):  # another process was faster
                        make()
                return _read(folder, read)
            except Exception as error:
                if not _is_lost(error):
                    raise
                last = error
            log.warning("%s; %s is made again", last, folder)
    except OSError as error:
        if error.errno not in LOCKED:
            raise
        raise PathError(
            f"{folder} cannot be written: {error.strerror or error}; set LRBO_CACHE to a folder "
            "that you may write"
        ) from error
    raise PathError(
        f"{folder} was not whole {ATTEMPTS} times, the last time because {last}. Does another "
        "process delete it? LRBO_CACHE=FOLDER keeps it elsewhere"
    ) from last


def _read(folder: Path, read: Callable[[], Opened]) -> Opened:
    """Read a folder of the cache, and remove it where it is not whole."""
    try:
        return read()
    except Exception as error:
        if _is_lost(error):
            remove_whole(folder)
        raise


def _is_lost(error: Exception) -> bool:
    """Whether an error says that part of the cache is gone or damaged."""
    return isinstance(error, CacheError) or (not isinstance(error, LrboError) and is_gone(error))
