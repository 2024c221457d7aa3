"""The study folder as a search writes it: an append-only journal, which is the only truth."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from filelock import FileLock, Timeout

from lrbo.errors import StudyError
from lrbo.files.atomic import write_text
from lrbo.files.parsing import parse_json, to_json
from lrbo.study.about import about_of
from lrbo.study.events import FORMAT, RECOVERED_FORMAT, Recovered, event_of, fields_of
from lrbo.study.study_record import StudyRecord
from lrbo.trials.records import TrialRequest


class Study(StudyRecord):
    """A study that this process may write to."""

    def begin(self, about: Mapping[str, Any], config_yaml: str) -> None:
        """Write what is fixed from now on: the fields of :class:`lrbo.study.about.About`."""
        whole = {"format": FORMAT, "study": self.name, **about, "config": config_yaml.split("\n")}
        text = json.dumps(whole, indent=2, allow_nan=False) + "\n"
        about_of(parse_json(text, str(self._file)), str(self._file))
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / "config.yaml", config_yaml)
        self.journal.touch()  # one that is missing later was deleted
        write_text(self._file, text)  # last: it marks a study
        self.refresh()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the study, unless another process does; the system releases it from a dead one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise StudyError(
                f"another process is working on study {self.name} ({self.folder}); wait for it, "
                "stop it, or choose another study=NAME"
            ) from error
        try:
            self._require_files()
            self._repair()
            self.refresh()
            yield
        finally:
            if [path.name for path in self.folder.iterdir()] == ["lock"]:  # nothing was begun
                shutil.rmtree(self.folder)
            lock.release()

    def record(self, event: str, **fields: Any) -> None:
        """Append an event to the journal, wait until it is on disk, and take it in.

        If it cannot be written whole (a full disk), no half of a line stays.
        """
        text = to_json({"event": event, "time": time.time(), **fields})
        line, where = f"{text}\n".encode(), f"the event {event}"
        checked = event_of(parse_json(text, where), where, self.task)
        if (problem := self.state.problem(checked)) is not None:
            raise StudyError(f"{self.journal}: {where} cannot come here: {problem}")
        if isinstance(checked, Recovered):
            self._raise_format()
        # Unbuffered: a buffer would write its rest after the repair, when the file is closed.
        with self.journal.open("ab", buffering=0) as file:
            before = file.tell()
            try:
                while line:
                    line = line[file.write(line) :]
                os.fsync(file.fileno())
            except OSError:
                os.ftruncate(file.fileno(), before)
                raise
        self.state.apply(checked)

    def record_suggestion(self, request: TrialRequest, seconds: Mapping[str, float]) -> None:
        """Append that a trial was suggested."""
        self.record(
            "suggested",
            trial=request.trial_index,
            origin=request.origin,
            variables=dict(request.variables),
            allocation=fields_of(request.allocation),
            seed=request.seed,
            rival=request.rival,
            seconds=dict(seconds),
        )

    def _raise_format(self) -> None:
        """Let an lrbo that does not know the lines to come refuse the study by its version."""
        if self.about.format < RECOVERED_FORMAT:
            whole = {**self.about.fields, "format": RECOVERED_FORMAT}
            write_text(self._file, json.dumps(whole, indent=2, allow_nan=False) + "\n")
            vars(self).pop("about")

    def _repair(self) -> None:
        """Cut off a torn last line; its bytes stay in ``journal.torn``."""
        if not self.journal.exists():
            return
        if torn := self.journal.read_bytes().rpartition(b"\n")[2]:
            with (self.folder / "journal.torn").open("ab") as file:
                file.write(torn + b"\n")
            with self.journal.open("rb+") as file:
                file.truncate(self.journal.stat().st_size - len(torn))
                os.fsync(file.fileno())
