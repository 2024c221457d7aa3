"""The study folder: an append-only journal as the only truth, and what was fixed at the start."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lrbo.accounting import low_rank_parameters
from lrbo.allocation import Allocation
from lrbo.errors import StudyError
from lrbo.shell import command, study_at
from lrbo.specs import LayerSpec
from lrbo.storage import write_text
from lrbo.strict_json import to_json, with_infinity
from lrbo.trial import Origin, TrialRecord, TrialRequest, TrialResult

log = logging.getLogger(__name__)

FORMAT = 1
Event = Mapping[str, Any]


@dataclass
class StudyState:
    """What the journal says.

    Attributes:
        pooled: By place, what an allocation lost on each window of the pool that validation
            windows are chosen from, nats per token; ``None`` if that is not finite.
        chosen: Which ``windows`` of the pool are the validation text, how many are in the
            ``pool``, ``text`` and ``digest`` of the chosen; empty without a choice.
        dense: Metrics of the dense model on the validation text; empty before it is measured.
        trials: By number.
        tests: Scores on the test text by label (``dense``, ``uniform``, ``analytic``, ``best``):
            ``trial``, ``text``, ``metrics`` and ``window_nll``, nats per token of each window;
            empty where an older version wrote none.
        checkpoints: Compressed models that were written, in order: ``id``, ``trial``, ``folder``,
            ``register`` (how MLflow has it) and ``tags``.
        versions: Of packages, where the study went on with others than it was begun with.
    """

    pooled: dict[int, list[float] | None] = field(default_factory=dict)
    chosen: dict[str, Any] = field(default_factory=dict)
    dense: dict[str, float] = field(default_factory=dict)
    trials: dict[int, TrialRecord] = field(default_factory=dict)
    tests: dict[str, dict[str, Any]] = field(default_factory=dict)
    checkpoints: list[dict[str, Any]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def records(self) -> list[TrialRecord]:
        """Return the trials by number."""
        return [self.trials[index] for index in sorted(self.trials)]

    @property
    def completed(self) -> list[TrialRecord]:
        """Return the trials that have a value."""
        return [record for record in self.records if record.is_completed]

    @property
    def stopped(self) -> list[TrialRecord]:
        """Return the trials that were given up, because they were surely worse than the best."""
        return [record for record in self.records if record.is_stopped]

    @property
    def ended(self) -> list[TrialRecord]:
        """Return the trials that are over, with or without a value."""
        return [record for record in self.records if record.result is not None]

    @property
    def open(self) -> list[TrialRecord]:
        """Return the trials that were suggested and have not ended."""
        return [record for record in self.records if record.result is None]

    @property
    def uniform(self) -> TrialRecord | None:
        """Return the uniform baseline, if it has a value; of a front the largest one."""
        return self._largest("uniform")

    @property
    def analytic(self) -> TrialRecord | None:
        """Return the allocation of least predicted loss, likewise."""
        return self._largest("analytic")

    def _largest(self, origin: Origin) -> TrialRecord | None:
        """Return the trial of an origin that a front has at its ceiling, the first of equals."""
        records = [r for r in self.completed if r.request.origin == origin]
        return max(records, key=lambda r: r.metrics["keep_ratio"], default=None)

    def best(self) -> TrialRecord | None:
        """Return the completed trial with the lowest objective, the first of equals."""
        return min(self.completed, key=lambda r: r.metrics["objective"], default=None)

    def apply(self, event: Event) -> None:
        """Take in one event of the journal.

        Raises:
            KeyError: If the event refers to a trial that was never suggested, or lacks a field.
        """
        kind = event["event"]
        if kind == "dense":
            self.dense = with_infinity(event["metrics"])
        elif kind == "versions":
            self.versions = dict(event["versions"])
        elif kind == "pooled":
            self.pooled[event["place"]] = event["losses"]
        elif kind == "chosen":
            self.chosen = {k: event[k] for k in ("windows", "pool", "text", "digest")}
        elif kind == "tested":
            self.tests[event["label"]] = {k: event[k] for k in ("trial", "text")} | {
                "metrics": with_infinity(event["metrics"]),
                "window_nll": event.get("window_nll", []),
            }
        elif kind == "compressed":
            keys = ("id", "trial", "folder", "register", "tags")
            self.checkpoints.append({k: event[k] for k in keys})
        elif kind == "suggested":
            request = TrialRequest(
                event["trial"],
                event["origin"],
                event["variables"],
                Allocation.from_dict(event["allocation"]),
                event["seed"],
                event.get("rival"),
            )
            self.trials[event["trial"]] = TrialRecord(request, seconds=dict(event["seconds"]))
        else:
            if event["trial"] not in self.trials:
                raise KeyError(f"suggestion of trial {event['trial']} before it")
            record = self.trials[event["trial"]]
            if kind == "started":
                self.trials[event["trial"]] = dataclasses.replace(
                    record, started=event["time"], attempts=record.attempts + 1
                )
            elif kind == "ended" and record.result is None:
                result = TrialResult(
                    event["trial"],
                    event["outcome"],
                    with_infinity(event["metrics"]),
                    event["seconds"]["scoring"],
                    event["error"],
                    tuple(event.get("window_nll", ())),
                    tuple(event.get("window_kl", ())),
                )
                self.trials[event["trial"]] = dataclasses.replace(
                    record,
                    result=result,
                    ended=event["time"],
                    seconds={**record.seconds, **event["seconds"]},
                )
            elif kind == "logged":
                seconds = {**record.seconds, "logging": event["seconds"]}
                self.trials[event["trial"]] = dataclasses.replace(record, seconds=seconds)


class Study:
    """A folder that holds everything about one search.

    ==================== ===========================================================
    ``journal.jsonl``    one JSON line per event, flushed to disk; the only truth
    ``study.json``       name, fingerprints, versions, device and dtype
    ``config.yaml``      the resolved configuration
    ``tokens.safetensors``  the token windows
    ``dense.safetensors``   what the dense model says about the validation tokens
    ``figures/``         pictures, made anew from the journal
    ==================== ===========================================================

    Attributes:
        folder: Where it is.
        state: What the journal says, kept up to date by :meth:`record`.
    """

    def __init__(self, folder: Path) -> None:
        """Open a study folder, which need not exist yet, and read its journal."""
        self.folder = folder
        self.state = self._read()

    @property
    def name(self) -> str:
        """Return the name of the study: that of its folder."""
        return self.folder.name

    @property
    def journal(self) -> Path:
        """Return the path of the journal."""
        return self.folder / "journal.jsonl"

    @property
    def exists(self) -> bool:
        """Return whether the study was begun."""
        return (self.folder / "study.json").is_file()

    def begin(self, about: Mapping[str, Any], config_yaml: str) -> None:
        """Write what is fixed from now on; ``study.json`` last, because it marks a study."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / "config.yaml", config_yaml)
        whole = {"format": FORMAT, "study": self.name, **about}
        write_text(self.folder / "study.json", json.dumps(whole, indent=2) + "\n")

    def about(self) -> dict[str, Any]:
        """Return what was fixed at the start.

        Raises:
            StudyError: If there is no study here, or of another format.
        """
        path = self.folder / "study.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise StudyError(
                f"there is no study at {self.folder}; start one with: "
                f"{command('search', study=study_at(self.folder))}"
            ) from error
        except ValueError as error:
            raise StudyError(f"{path} is not JSON: {error}") from error
        about: dict[str, Any] = found if isinstance(found, dict) else {}
        if about.get("format") != FORMAT:
            raise StudyError(
                f"{path} has format {about.get('format')}, this lrbo reads {FORMAT}; use the "
                "version that made it"
            )
        about.setdefault("storage", "factored")  # studies from before there was a choice
        return about

    def data(self) -> dict[str, Any]:
        """Return text, number of windows and digest of each role, as trials use them."""
        data: dict[str, Any] = self.about()["data"]
        if not self.state.chosen:
            return data
        chosen = self.state.chosen
        validation = {
            "text": chosen["text"],
            "windows": len(chosen["windows"]),
            "digest": chosen["digest"],
            "pool": data["validation"],
        }
        return {**data, "validation": validation}

    def config_yaml(self) -> str:
        """Return the resolved configuration that the study was begun with."""
        return (self.folder / "config.yaml").read_text(encoding="utf-8")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the study for this process; the system releases it if the process dies.

        Raises:
            StudyError: If another process holds it.
        """
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
            self._repair()
            self.state = self._read()
            yield
        finally:
            if [path.name for path in self.folder.iterdir()] == ["lock"]:  # nothing was begun
                shutil.rmtree(self.folder)
            lock.release()

    def record(self, event: str, **fields: Any) -> None:
        """Append an event to the journal, wait until it is on disk, and take it in.

        A record that could not be written whole (a full disk) is taken out again, so that the
        next one does not follow half a line.
        """
        whole = {"event": event, "time": time.time(), **fields}
        line = f"{to_json(whole)}\n".encode()
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
        self.state.apply(whole)

    def record_suggestion(self, request: TrialRequest, seconds: Mapping[str, float]) -> None:
        """Append that a trial was suggested."""
        fields = asdict(request)
        fields["trial"] = fields.pop("trial_index")
        del fields["rival_losses"]  # which the rival's own trial has
        self.record("suggested", **fields, seconds=dict(seconds))

    def _read(self) -> StudyState:
        """Return what the journal says; a torn last line is passed over.

        Raises:
            StudyError: If any other line is damaged, with its number.
        """
        state = StudyState()
        try:
            content = self.journal.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return state
        *lines, rest = content.split(b"\n")
        if rest:
            log.warning("%s ends in half a line (an interrupted write); ignored", self.journal)
        for number, line in enumerate(lines, start=1):
            try:
                event = json.loads(line)
                if not isinstance(event, dict) or "event" not in event:
                    raise ValueError("not an event")
                state.apply(event)
            except (ValueError, KeyError, TypeError) as error:
                reason = f"no {error}" if isinstance(error, KeyError) else error
                raise StudyError(
                    f"{self.journal}, line {number} is damaged ({reason}); it was not written by "
                    "an interrupted lrbo, which damages only the last line. Restore the file, or "
                    "remove the line, and with a line that suggests a trial every later line of "
                    "that trial: it is then run again."
                ) from error
        return state

    def _repair(self) -> None:
        """Cut off a torn last line; its bytes are kept beside the journal."""
        if not self.journal.exists():
            return
        content = self.journal.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with (self.folder / "journal.torn").open("ab") as torn:
                torn.write(content[whole:] + b"\n")
            with self.journal.open("rb+") as file:
                file.truncate(whole)
                os.fsync(file.fileno())


def layers_of(about: Mapping[str, Any]) -> dict[str, LayerSpec]:
    """Return the layers that ``study.json`` describes, by name."""
    return {layer["name"]: LayerSpec(**layer) for layer in about["layers"]}


def stored_parameters(spec: LayerSpec, rank: int | None, about: Mapping[str, Any]) -> int:
    """Return the parameters of a layer at a rank, counted as the study's budget counts them."""
    if rank is None:
        return spec.parameters
    bias = about["adds_bias"] or spec.has_bias
    return low_rank_parameters(spec, rank, bias=bias, storage=about["storage"])
