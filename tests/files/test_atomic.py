"""A file or folder is the old one or the whole new one, and nothing is left beside it."""

import errno
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from lrbo.files import atomic
from lrbo.files.atomic import is_full, new_folder, remove_whole, replacing, write_text


class Interrupted(BaseException):
    """Stands for what ends a process in the middle: not even an Exception."""


def files(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}


def test_a_new_file_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    with replacing(path) as beside:
        assert beside.parent.parent == path.parent  # a rename is atomic inside one file system only
        assert beside != path
        beside.write_text("half", encoding="utf-8")
        assert not path.exists()
        beside.write_text("whole", encoding="utf-8")
    assert files(tmp_path) == {"result.json": "whole"}


def test_the_old_content_stays_readable_until_the_new_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("old", encoding="utf-8")
    with replacing(path) as beside:
        beside.write_text("new", encoding="utf-8")
        assert path.read_text(encoding="utf-8") == "old"
    assert files(tmp_path) == {"result.json": "new"}


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt, Interrupted])
@pytest.mark.parametrize("old", [None, "old"])
def test_a_failure_inside_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, error: type[BaseException], old: str | None
) -> None:
    path = tmp_path / "result.json"
    if old is not None:
        path.write_text(old, encoding="utf-8")

    def write_and_fail() -> None:
        with replacing(path) as beside:
            beside.write_text("half", encoding="utf-8")
            raise error("in the middle")

    with pytest.raises(error, match="in the middle"):
        write_and_fail()
    assert files(tmp_path) == ({} if old is None else {"result.json": old})


def test_a_failing_rename_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "result.json"
    path.write_text("old", encoding="utf-8")

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert files(tmp_path) == {"result.json": "old"}


def test_writing_nothing_is_an_error_and_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(FileNotFoundError), replacing(path):
        pass
    assert files(tmp_path) == {"result.json": "old"}


def test_missing_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "result.json"
    write_text(path, "text")
    assert files(path.parent) == {"result.json": "text"}


def test_two_files_in_one_folder_do_not_meet(tmp_path: Path) -> None:
    with replacing(tmp_path / "a") as one, replacing(tmp_path / "b") as two:
        assert one != two
        one.write_text("A", encoding="utf-8")
        two.write_text("B", encoding="utf-8")
    assert files(tmp_path) == {"a": "A", "b": "B"}


def test_text_is_written_as_utf_8_and_read_back(tmp_path: Path) -> None:
    text = "schön, 語, \U0001f40d\n"
    write_text(tmp_path / "text", text)
    assert (tmp_path / "text").read_bytes() == text.encode()


# --- folders -------------------------------------------------------------------------------------


def test_a_new_folder_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "statistics"
    with new_folder(folder) as beside:
        assert (
            beside.parent.parent == folder.parent
        )  # a rename is atomic inside one file system only
        (beside / "deep").mkdir()
        (beside / "deep" / "a").write_text("A", encoding="utf-8")
        (beside / "b").write_text("B", encoding="utf-8")
        assert not folder.exists()
    assert [path.name for path in folder.parent.iterdir()] == ["statistics"]
    assert files(folder / "deep") == {"a": "A"}
    assert (folder / "b").read_text(encoding="utf-8") == "B"
    assert folder.stat().st_mode & 0o777 == 0o755  # a temporary folder is its owner's alone


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_a_new_folder_follows_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with new_folder(tmp_path / "model") as beside:
            save_file({"x": torch.ones(1)}, beside / "weights")  # its owner's alone as it is made
            (beside / "inside").mkdir()
            (beside / "inside" / "text").write_text("x", encoding="utf-8")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    folder, file = 0o777 & ~umask, 0o666 & ~umask
    assert modes == {"model": folder, "inside": folder, "weights": file, "text": file}


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt, Interrupted])
def test_a_failure_inside_leaves_no_folder(tmp_path: Path, error: type[BaseException]) -> None:
    def write_and_fail() -> None:
        with new_folder(tmp_path / "statistics") as beside:
            (beside / "half").write_text("half", encoding="utf-8")
            raise error("in the middle")

    with pytest.raises(error, match="in the middle"):
        write_and_fail()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("A", encoding="utf-8")
    with (
        pytest.raises(FileExistsError, match=r"exists already; nothing is overwritten"),
        new_folder(tmp_path),
    ):
        pytest.fail("nothing may be written")
    assert files(tmp_path) == {"a": "A"}


@pytest.mark.parametrize("content", [None, "theirs"])
def test_a_folder_that_another_process_made_meanwhile_stays(
    tmp_path: Path, content: str | None
) -> None:
    """Two searches of one model prepare the same: the second finds that it is there."""
    folder = tmp_path / "statistics"

    def write() -> None:
        with new_folder(folder) as beside:
            (beside / "a").write_text("ours", encoding="utf-8")
            folder.mkdir()
            if content:
                (folder / "a").write_text(content, encoding="utf-8")

    with pytest.raises(FileExistsError):
        write()
    assert [path.name for path in tmp_path.iterdir()] == ["statistics"]
    assert files(folder) == ({"a": content} if content else {})


def test_contents_reach_the_disk_before_the_name_of_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, synced = tmp_path / "statistics", []

    def sync(descriptor: int) -> None:
        assert not folder.exists()
        synced.append(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    with new_folder(folder) as beside:
        (beside / "deep").mkdir()
        for name in ("a", "deep/b", "deep/c"):
            (beside / name).write_text(name, encoding="utf-8")
    assert len(synced) == 3


def caused(cause: BaseException, error: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (FULL, True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (OSError(errno.EFBIG, "File too large"), True),
        (RuntimeError("I/O error: File too large (os error 27)"), True),
        (SafetensorError("I/O error: No space left on device (os error 28)"), True),
        (caused(FULL, RuntimeError("could not save")), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (SafetensorError("I/O error: Permission denied (os error 13)"), False),
        (SafetensorError("I/O error: ... (os error 280)"), False),
        (ValueError("28"), False),
        (caused(ValueError("28"), RuntimeError("28")), False),
    ],
    ids=str,
)
def test_a_full_disk_is_distinguished_from_other_errors(error: BaseException, full: bool) -> None:
    assert is_full(error) is full


# --- leftovers of killed processes -------------------------------------------------------------

WRITER = """
import sys, time
from pathlib import Path
from lrbo.files.atomic import new_folder, replacing
path = Path(sys.argv[2])
with {"file": replacing, "folder": new_folder}[sys.argv[1]](path) as beside:
    if sys.argv[1] == "folder":
        beside = beside / "inside"
    beside.write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


@contextmanager
def writing(kind: str, path: Path) -> Iterator[subprocess.Popen[str]]:
    """Run a process that is in the middle of writing; it is killed at the end at the latest."""
    command = [sys.executable, "-c", WRITER, kind, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "writing\n"
            yield process
        finally:
            process.kill()


def test_leftovers_of_killed_processes_are_removed_and_those_of_living_ones_stay(
    tmp_path: Path,
) -> None:
    with writing("folder", tmp_path / "out") as alive:
        (of_alive,) = tmp_path.iterdir()
        for kind in ("file", "folder"):
            with writing(kind, tmp_path / kind) as process:
                process.kill()
            assert len(list(tmp_path.iterdir())) == 2  # the one before is gone already
        write_text(tmp_path / "text", "whole")
        assert {path.name for path in tmp_path.iterdir()} == {"text", of_alive.name}
        assert (of_alive / "out" / "inside").read_text() == "half"
        alive.kill()
        alive.wait()
    with new_folder(tmp_path / "made"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"text", "made"}


def test_leftovers_of_another_host_are_removed_when_they_are_old(tmp_path: Path) -> None:
    """Its locks may be invisible here."""
    with writing("file", tmp_path / "theirs") as process:
        process.kill()
    (left,) = tmp_path.iterdir()
    theirs = left.rename(tmp_path / ".lrbo-elsewhere-0123456789ab.new")
    write_text(tmp_path / "text", "whole")
    assert theirs.is_dir()
    then = time.time() - 2 * atomic.STALE_SECONDS
    os.utime(theirs, (then, then))
    write_text(tmp_path / "text", "whole")
    assert not theirs.exists()


def test_an_empty_folder_that_never_held_a_lock_is_removed(tmp_path: Path) -> None:
    """Killed between the making of the folder and of its lock."""
    (tmp_path / atomic.BESIDE.format(host=atomic.HOST, random="0123456789ab")).mkdir()
    write_text(tmp_path / "text", "whole")
    assert files(tmp_path) == {"text": "whole"}


@pytest.mark.parametrize("length", [246, 255])
def test_a_name_may_be_as_long_as_the_system_takes(tmp_path: Path, length: int) -> None:
    write_text(tmp_path / ("f" * length), "whole")
    with new_folder(tmp_path / ("d" * length)) as beside:
        (beside / "inside").write_text("x")
    assert sorted(len(path.name) for path in tmp_path.iterdir()) == [length, length]


def test_remove_whole_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "file").touch()
    for name in ("folder", "file", "nothing"):
        remove_whole(tmp_path / name)
    assert list(tmp_path.iterdir()) == []
