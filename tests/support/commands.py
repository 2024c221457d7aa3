"""Command lines in this process, and the study of the tiny model that tests read."""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lrbo import cli

# A small search, of which tests say space, forms, budget and study.
SMALL_SEARCH = ["experiment=tiny", "tracking.enabled=false", "output=json"]
SMALL_SEARCH += [f"data.{role}.tokens=512" for role in ("calibration", "validation", "test")]
TINY = ["experiment=tiny", "search.trials=5", "search.initial=4", "output=json"]


@dataclass
class Ran:
    """What a command answered."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Return the last line of stdout."""
        answer: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return answer


def lrbo_command(*arguments: str) -> Ran:
    """Run a command line in this process, in the current folder."""
    out, err = io.StringIO(), io.StringIO()
    status = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), same_logging():
        try:
            cli.main(arguments)
        except SystemExit as exit_:
            status = exit_.code if isinstance(exit_.code, int) else 0
    return Ran(status, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def same_logging() -> Iterator[None]:
    """Take back what a command line sets for its whole process."""
    handlers, level, show = logging.root.handlers[:], logging.root.level, warnings.showwarning
    try:
        yield
    finally:
        logging.root.handlers[:], warnings.showwarning = handlers, show
        logging.root.setLevel(level)


def in_folder(folder: Path, action: Callable[[], Ran]) -> Ran:
    """Run something in another folder."""
    with contextlib.chdir(folder):
        return action()


def searched_in(folder: Path, *arguments: str) -> tuple[Path, Ran]:
    """Run a search in a folder to its end, and return both."""
    ran = in_folder(folder, lambda: lrbo_command("search", *arguments))
    assert ran.status == 0, ran.err
    return folder, ran


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ran]:
    """Run one tiny search; tests may read its folder and add to it, but not change its trials."""
    folder = tmp_path_factory.mktemp("project")
    return folder, in_folder(folder, lambda: lrbo_command("search", *TINY))


@pytest.fixture
def project(searched: tuple[Path, Ran], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in the folder of the tiny search."""
    monkeypatch.chdir(searched[0])
    return searched[0]


def state_of(folder: Path) -> dict[str, bytes]:
    """Return every file of a study that must not change by accident."""
    names = ("journal.jsonl", "study.json", "config.yaml", "tokens.safetensors")
    return {name: (folder / name).read_bytes() for name in names}
