"""A disk of its own that can be full or read-only, where the system lets a test mount one."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

KIB = 1024


class SmallDisk:
    """A file system in memory, below a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ballast = folder / "ballast"

    def leave(self, kib: int) -> None:
        """Leave so much room, whatever is there already."""
        self._ballast.unlink(missing_ok=True)
        stats = os.statvfs(self.folder)
        size = stats.f_bavail * stats.f_frsize - kib * KIB
        assert size >= 0, f"the disk has no {kib} KiB left"
        with self._ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(size, 1))

    def make_room(self) -> None:
        """Leave all that there is."""
        self._ballast.unlink()

    @contextmanager
    def read_only(self) -> Iterator[None]:
        """Let nobody write, root neither."""
        subprocess.run(["mount", "-o", "remount,ro", str(self.folder)], check=True)
        try:
            yield
        finally:
            subprocess.run(["mount", "-o", "remount,rw", str(self.folder)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """Mount a disk of 16 MiB: a study of the tiny model with its page, twice."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(f"no file system may be mounted here: {mounted.stderr.strip()}")
    try:
        yield SmallDisk(folder)
    finally:
        # Lazily: mlflow keeps its store open until the process ends.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
