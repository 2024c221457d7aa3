"""A file is the old one or the whole new one, and nothing is left beside it."""

from pathlib import Path

import pytest

from lrbo.storage import replacing, write_text


class Interrupted(BaseException):
    """Stands for what ends a process in the middle: not even an Exception."""


def files(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}


def test_a_new_file_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    with replacing(path) as beside:
        assert beside.parent == path.parent  # a rename is atomic inside one file system only
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
