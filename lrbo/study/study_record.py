"""The study folder as it is read: what was fixed at the start, and what the journal says."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

from lrbo.config.choices import STORED_ITEMSIZES
from lrbo.config.conflicts import check_values
from lrbo.config.options import check_options
from lrbo.config.saved import from_yaml
from lrbo.config.schema import SearchConfig
from lrbo.config.shell import command, keys_of
from lrbo.errors import StudyError
from lrbo.factorization.options import METHOD_OPTIONS
from lrbo.files.atomic import write_text
from lrbo.files.parsing import ContentError, parse_json, shown
from lrbo.files.paths import SPECIAL, kind_of
from lrbo.layers.options import Budget, dense_cost
from lrbo.models.specs import LayerSpec
from lrbo.study.about import About, about_of
from lrbo.study.events import event_of
from lrbo.study.state import StudyState
from lrbo.tasks.metrics import Task


def study_folder(studies: str, study: str) -> Path:
    """Return the folder of a study: a name is one under ``studies``, a path is itself."""
    return Path(study) if os.sep in study else Path(studies) / study


log = logging.getLogger(__name__)


class StudyRecord:
    """A folder that holds everything about one search.

    ``journal.jsonl``, a line per event, is the only truth, and ``study.json`` what was fixed at the
    start: where one of them is missing or damaged, the study is refused. All others can be made
    again, and are: ``config.yaml``, to read; ``tokens.safetensors``, the windows;
    ``dense.safetensors``, what the dense model says about the validation tokens; ``figures/``.
    """

    def __init__(self, folder: Path, studies: str | None = None) -> None:
        """Open a study folder, which need not exist yet; damage of it is a StudyError.

        ``studies`` is the folder that its name was looked up in, for commands that are printed.
        """
        self.folder, self.name = folder, folder.name
        self.journal, self._file = folder / "journal.jsonl", folder / "study.json"
        self.keys = keys_of(folder, studies)  # typed to mean this study
        self._restore = (
            "Restore the file (MLflow keeps a copy of study.json among the artifacts of a "
            f"finished study), or move {folder} away and begin again"
        )
        self.refresh()

    def refresh(self) -> None:
        """Read the files again."""
        for name in ("about", "config"):
            vars(self).pop(name, None)
        self.state = self._read()

    def require(self) -> None:
        """Raise StudyError where no study was begun."""
        _ = self.about

    @property
    def exists(self) -> bool:
        """Whether the study was begun."""
        return self._file.is_file()

    @cached_property
    def about(self) -> About:
        """What was fixed at the start; a StudyError if nothing was, or its file is damaged."""
        try:
            content = self._file.read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise StudyError(
                f"there is no study at {self.folder}; start one with: "
                f"{command('search', **self.keys)}"
            ) from error
        except OSError as error:
            raise StudyError(f"{self._file} cannot be read: {error.strerror}") from error
        try:
            return about_of(parse_json(content, str(self._file)), str(self._file))
        except ContentError as error:
            raise StudyError(f"{error}. {self._restore}") from error

    @property
    def task(self) -> Task:
        """What the model is for, with its metrics."""
        return self.about.task

    @property
    def data(self) -> dict[str, Any]:
        """Text, number of windows and digest of each role, as trials use them."""
        data: dict[str, Any] = {**self.about.data}
        if selection := self.state.selection:
            data["validation"] = {
                "text": selection["text"],
                "windows": len(selection["windows"]),
                "digest": selection["digest"],
                "pool": data["validation"],
            }
        return data

    @cached_property
    def config(self) -> SearchConfig:
        """The configuration that the study was begun with; shared, so not to be changed.

        Raises:
            StudyError: If there is none, or ``study.json`` or ``config.yaml`` says otherwise.
        """
        about = self.about
        config = from_yaml(about.config, f"the configuration in {self._file}")
        implied = follows(config, list(about.units.values()), about.stored_dtype)
        if others := [key for key, value in implied.items() if about.fields[key] != value]:
            raise StudyError(
                f"{self._file} says other {', '.join(others)} than the configuration in it gives. "
                f"{self._restore}"
            )
        problems, name = check_values(config), config.method.get("name")
        if not isinstance(name, str) or name in METHOD_OPTIONS:  # else of a program that added it
            problems += check_options("method", config.method, METHOD_OPTIONS)
        if problems:
            raise StudyError(f"the configuration in {self._file}: {'; '.join(problems)}")
        self.config_yaml()  # last: else what is damaged would be written once more
        return config

    def config_yaml(self) -> str:
        """Return the first configuration, if ``config.yaml``, written again if missing, agrees."""
        text, path = self.about.config, self.folder / "config.yaml"
        try:
            lines = path.read_bytes().decode("utf-8", errors="replace").split("\n")
        except FileNotFoundError:
            self.remake(path, lambda: write_text(path, text))
            return text
        except OSError as error:
            raise StudyError(f"{path} cannot be read: {error.strerror}") from error
        for number, pair in enumerate(zip_longest(lines, text.split("\n")), start=1):
            if pair[0] != pair[1]:
                came, begun = ("nothing" if line is None else shown(line) for line in pair)
                raise StudyError(
                    f"{path}, line {number} is {came}, and the study was begun with "
                    f"{begun}: restore the line, or delete the file, which is then written "
                    "again. Other values are those of another study=NAME"
                )
        return text

    def remake(self, path: Path, write: Callable[[], object]) -> None:
        """Write a missing or damaged file of the study again, if possible, and say so."""
        try:
            write()
        except PermissionError as error:
            log.warning("%s is missing or damaged, and cannot be written: %s", path, error)
        else:
            log.warning("%s was missing or damaged; it is written again, as it was", path)

    def _read(self) -> StudyState:
        """Read the journal; a torn last line is passed over."""
        self._require_files()
        try:
            *lines, rest = self.journal.read_bytes().split(b"\n")
        except (FileNotFoundError, NotADirectoryError) as error:
            if self.exists:
                raise StudyError(
                    f"{self.journal} is missing, so that nothing is known of the trials that study "
                    f"{self.name} had. Restore the file, or move {self.folder} away and begin again"
                ) from error
            return StudyState()
        except OSError as error:
            raise StudyError(f"{self.journal} cannot be read: {error.strerror}") from error
        if not self.exists:
            if lines:
                raise StudyError(
                    f"{self._file} is missing, and {self.journal} has {len(lines)} lines: nobody "
                    f"knows what they were measured with. {self._restore}"
                )
            return StudyState()
        if rest:
            log.warning("%s ends in half a line (an interrupted write); ignored", self.journal)
        state = StudyState(about=self.about)
        for number, line in enumerate(lines, start=1):
            where = f"{self.journal}, line {number} is damaged"
            try:
                event = event_of(parse_json(line, where), where, self.task)
                if (problem := state.problem(event)) is not None:
                    raise ContentError(f"{where}: {problem}")
            except ContentError as error:
                raise StudyError(
                    f"{error}. It was not written so by an interrupted lrbo, which damages only "
                    "the last line. Restore the file, or remove the line, and with a line that "
                    "suggests a trial every later line of that trial: it is then run again."
                ) from error
            state.apply(event)
        return state

    def _require_files(self) -> None:
        """Refuse what has no end, such as a named pipe, before anything is read."""
        with suppress(OSError):  # which says whoever reads or writes there
            for path in sorted(self.folder.iterdir()):
                if (kind := kind_of(path)) in SPECIAL.values():
                    raise StudyError(
                        f"{path} is {kind}; expected a file. Move it away, or restore the file"
                    )


def follows(config: SearchConfig, units: Sequence[LayerSpec], dtype: str) -> dict[str, Any]:
    """Return the part of ``study.json`` that follows from configuration, units, stored dtype."""
    itemsize = STORED_ITEMSIZES[dtype]
    dense = dense_cost(units, itemsize)
    measure: Any = config.budget.measure
    return {
        "seed": config.seed,
        "task": config.task,
        "timed": config.latency.enabled,
        "include": list(config.budget.include),
        "forms": list(config.space.forms),
        "budget": asdict(Budget.keeping(config.budget.kept(itemsize), dense, measure)),
    }
