"""The study folder: an append-only journal as the only truth, and what was fixed at the start."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lrbo.accounting import low_rank_parameters
from lrbo.allocation import Budget
from lrbo.config import from_yaml
from lrbo.errors import StudyError
from lrbo.front_checks import check_front
from lrbo.optimization.events import (
    FORMAT,
    AllocationFields,
    Chosen,
    Compressed,
    Dense,
    Ended,
    Event,
    Logged,
    Pooled,
    Started,
    Suggested,
    Tested,
    Versions,
    about_of,
    event_of,
)
from lrbo.optimization.front import KEEP_RATIO, LATENCIES
from lrbo.parsing import ContentError, parse_json, shown
from lrbo.paths import SPECIAL, kind_of
from lrbo.schema import SearchConfig
from lrbo.shell import command, keys_of
from lrbo.specs import LayerSpec
from lrbo.storage import write_text
from lrbo.strict_json import to_json
from lrbo.trial import Origin, TrialRecord, TrialRequest, TrialResult

log = logging.getLogger(__name__)


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
            ``trial``, ``text``, ``metrics`` and ``window_nll``, nats per token of each window.
        checkpoints: Compressed models that were written, in order: ``id``, ``trial``, ``folder``,
            ``register`` (how MLflow has it) and ``tags``.
        versions: Of packages, where the study went on with others than it was begun with.
        about: What was fixed when the study was begun, which events must fit.
    """

    pooled: dict[int, list[float] | None] = field(default_factory=dict)
    chosen: dict[str, Any] = field(default_factory=dict)
    dense: dict[str, float] = field(default_factory=dict)
    trials: dict[int, TrialRecord] = field(default_factory=dict)
    tests: dict[str, dict[str, Any]] = field(default_factory=dict)
    checkpoints: list[dict[str, Any]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

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
    def searched(self) -> list[TrialRecord]:
        """Return those of the search that are over, without what `lrbo compress` adds to it."""
        return [record for record in self.ended if record.request.origin != "between"]

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
        """Take in one event of the journal, for which :meth:`problem` has none."""
        match event:
            case Dense():
                self.dense = dict(event.metrics)
            case Versions():
                self.versions = dict(event.versions)
            case Pooled():
                self.pooled[event.place] = event.losses
            case Chosen():
                self.chosen = _fields(event, "windows", "pool", "text", "digest")
            case Tested():
                self.tests[event.label] = _fields(event, "trial", "text", "metrics", "window_nll")
            case Compressed():
                self.checkpoints.append(_fields(event, "id", "trial", "folder", "register", "tags"))
            case Suggested():
                request = TrialRequest(
                    event.trial,
                    event.origin,
                    event.variables,
                    event.decision(),
                    event.seed,
                    event.rival,
                )
                self.trials[event.trial] = TrialRecord(request, seconds=dict(event.seconds))
            case Started():
                record = self.trials[event.trial]
                self._change(event.trial, started=event.time, attempts=record.attempts + 1)
            case Ended():
                result = TrialResult(
                    event.trial,
                    event.outcome,
                    event.metrics,
                    event.seconds["scoring"],
                    event.error,
                    event.window_nll,
                    event.window_kl,
                )
                seconds = {**self.trials[event.trial].seconds, **event.seconds}
                self._change(event.trial, result=result, ended=event.time, seconds=seconds)
            case Logged():
                seconds = {**self.trials[event.trial].seconds, "logging": event.seconds}
                self._change(event.trial, seconds=seconds)

    def _change(self, trial: int, **fields: Any) -> None:
        """Change what is known of a trial."""
        self.trials[trial] = dataclasses.replace(self.trials[trial], **fields)

    def problem(self, event: Event) -> str | None:
        """Say why an event cannot follow those before it, if it cannot.

        A line that was written twice, or has its place elsewhere, would discard a result or
        invent one.
        """
        match event:
            case Dense() if self.dense:
                return "the dense model was scored already"
            case Suggested():
                return self._problem_of_suggestion(event)
            case Started() | Ended() | Logged():
                record = self.trials.get(event.trial)
                if record is None:
                    return f"no line before it suggests trial {event.trial}"
                if record.result is not None and not isinstance(event, Logged):
                    return f"trial {event.trial} has ended already"
                return self._problem_of_end(event) if isinstance(event, Ended) else None
            case Tested():
                return self._problem_of_test(event)
            case Compressed():
                return self._problem_of_value(event.trial)
            case Pooled() | Chosen():
                return self._problem_of_pool(event)
        return None

    def _problem_of_suggestion(self, event: Suggested) -> str | None:
        """Say why a trial cannot be one of this study."""
        if event.trial in self.trials:
            return f"trial {event.trial} was suggested already"
        rival = None if event.rival is None else self.trials.get(event.rival)
        if event.rival is not None and (rival is None or not rival.is_completed):
            return f"rival is {event.rival}, which no line before it gives a value"
        known = self._compressible
        ranks = event.allocation["ranks"]
        if unknown := ranks.keys() - known.keys():
            return f"allocation.ranks has {min(unknown)}, which is no layer in the model's blocks"
        if missing := known.keys() - ranks.keys():
            return f"allocation.ranks lacks the layer {min(missing)}"
        for name, rank in ranks.items():
            full = min(known[name].out_features, known[name].in_features)
            if rank is not None and rank > full:
                return f"allocation.ranks.{name} is {rank}, expected at most {full}"
        if event.variables and event.variables.keys() != self.about["variables"].keys():
            names = ", ".join(self.about["variables"])
            return f"variables are {', '.join(event.variables)}, expected {names}"
        return self._problem_of_size(event.allocation)

    def _problem_of_size(self, allocation: AllocationFields) -> str | None:
        """Say why ranks cannot be of the size, or under the budget, that their line names."""
        ranks, named = allocation["ranks"], allocation["parameters"]
        counted = 0
        for name, rank in ranks.items():
            spec = self._compressible[name]
            stored = stored_parameters(spec, rank, self.about)
            if rank is not None and stored >= spec.parameters:  # no factors reach so far
                return (
                    f"allocation.ranks.{name} is {rank}, which has {stored:,} parameters; expected "
                    f"fewer than dense has, {spec.parameters:,}"
                )
            counted += stored
        if named != counted:
            return f"allocation.parameters is {named:,}, and its ranks have {counted:,}"
        budget, ceiling = allocation["budget"]["parameters"], self.about["budget_parameters"]
        if counted > budget:
            return f"allocation.parameters is {counted:,}, above its budget of {budget:,}"
        is_front = KEEP_RATIO in self.about["variables"]
        if budget > ceiling or (budget < ceiling and not is_front):
            most = "at most " if is_front else ""
            return (
                f"allocation.budget.parameters is {budget:,}, expected {most}{ceiling:,}, the "
                "budget of the study"
            )
        return None

    @cached_property
    def _compressible(self) -> dict[str, LayerSpec]:
        """Return the layers that an allocation has a rank for, by name."""
        layers = layers_of(self.about)
        return {name: spec for name, spec in layers.items() if spec.block is not None}

    def _problem_of_end(self, event: Ended) -> str | None:
        """Say why a result cannot be one of this study."""
        windows = len(self.chosen.get("windows", ())) or self._pool
        for name in ("window_nll", "window_kl"):
            if len(getattr(event, name)) not in (0, windows):
                return f"{name} has {len(getattr(event, name))} values, expected {windows}"
        if self.about["timed"] and event.outcome == "completed":
            lacking = [name for name in LATENCIES if name not in event.metrics]
            if lacking:
                return f"metrics lack {', '.join(lacking)}"
        return None

    def _problem_of_value(self, trial: int) -> str | None:
        """Say why something cannot be known of a trial that must have a value."""
        record = self.trials.get(trial)
        if record is None or not record.is_completed:
            return f"no line before it gives trial {trial} a value"
        return None

    def _problem_of_test(self, event: Tested) -> str | None:
        """Say why a score on the test text cannot be one of this study."""
        if (event.label == "dense") != (event.trial is None):
            return f"label is {shown(event.label)} and trial {shown(event.trial)}"
        windows = self.about["data"]["test"]["windows"]
        if len(event.window_nll) != windows:
            return f"window_nll has {len(event.window_nll)} values, expected {windows}"
        return None if event.trial is None else self._problem_of_value(event.trial)

    def _problem_of_pool(self, event: Pooled | Chosen) -> str | None:
        """Say why validation windows cannot have been chosen so."""
        if self.chosen:
            return "windows were chosen already"
        if isinstance(event, Pooled):
            if event.place in self.pooled:
                return f"place {event.place} was scored already"
            if event.losses is not None and len(event.losses) != self._pool:
                return f"losses has {len(event.losses)} values, expected {self._pool}"
            return None
        if event.pool != self._pool:
            return f"pool is {event.pool}, expected {self._pool}"
        if len(set(event.windows)) < len(event.windows) or max(event.windows) >= event.pool:
            return f"windows are not some of {event.pool}"
        return None

    @property
    def _pool(self) -> int:
        """Return how many validation windows there are, chosen or not."""
        count: int = self.about["data"]["validation"]["windows"]
        return count


def _fields(event: Event, *names: str) -> dict[str, Any]:
    """Return some fields of an event by name."""
    return {name: getattr(event, name) for name in names}


class Study:
    """A folder that holds everything about one search.

    ==================== ===========================================================
    ``journal.jsonl``    one JSON line per event, flushed to disk; the only truth
    ``study.json``       what was fixed at the start: configuration, fingerprints, digests
    ``config.yaml``      the same configuration, to read
    ``tokens.safetensors``  the token windows
    ``dense.safetensors``   what the dense model says about the validation tokens
    ``figures/``         pictures, made anew from the journal
    ==================== ===========================================================

    The first two are made at the start and cannot be made again: where one of them is missing or
    damaged, the study is refused. All others can, and are.

    Attributes:
        folder: Where it is.
        keys: What is typed to mean it.
        state: What the journal says, kept up to date by :meth:`record`.
    """

    def __init__(self, folder: Path, studies: str | None = None) -> None:
        """Open a study folder, which need not exist yet, and read its journal.

        Args:
            folder: Of the study.
            studies: The folder that its name was looked up in, for commands that are printed.

        Raises:
            StudyError: If the journal or ``study.json`` is damaged, or only one of them is there.
        """
        self.folder = folder
        self.keys = keys_of(folder, studies)
        self._about: dict[str, Any] | None = None
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

    @property
    def _file(self) -> Path:
        """Return the path of what was fixed at the start."""
        return self.folder / "study.json"

    def begin(self, about: Mapping[str, Any], config_yaml: str) -> None:
        """Write what is fixed from now on; ``study.json`` last, because it marks a study.

        Args:
            about: The fields of :class:`lrbo.optimization.events.About`.
            config_yaml: The resolved configuration.
        """
        whole = {"format": FORMAT, "study": self.name, **about, "config": config_yaml.split("\n")}
        text = json.dumps(whole, indent=2, allow_nan=False) + "\n"
        about_of(parse_json(text, str(self._file)), str(self._file))
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / "config.yaml", config_yaml)
        self.journal.touch()  # one that is missing later was deleted
        write_text(self._file, text)
        self.state = self._read()

    def about(self) -> dict[str, Any]:
        """Return what was fixed at the start: the fields of ``events.About``.

        Raises:
            StudyError: If there is no study here, or its file is damaged or of another format.
        """
        if self._about is None:
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
                value = parse_json(content, str(self._file))
                self._about = about_of(value, str(self._file))
            except ContentError as error:
                raise StudyError(f"{error}. {self._restore}") from error
        return self._about

    @property
    def _restore(self) -> str:
        """Return what to do where a file is damaged that cannot be made again."""
        return (
            "Restore the file (MLflow keeps a copy of study.json among the artifacts of a "
            f"finished study), or move {self.folder} away and begin again"
        )

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

    def config(self) -> SearchConfig:
        """Return the configuration that the study was begun with; shared, so not to be changed.

        Raises:
            StudyError: If there is no study, what it was begun with is no configuration, or
                ``study.json`` or ``config.yaml`` says otherwise.
        """
        text = "\n".join(self.about()["config"])
        found = from_yaml(text, f"the configuration in {self._file}")
        layers = [spec for spec in layers_of(self.about()).values() if spec.block is not None]
        others = [k for k, value in follows(found, layers).items() if self.about()[k] != value]
        if others:
            raise StudyError(
                f"{self._file} says other {', '.join(others)} than the configuration in it gives. "
                f"{self._restore}"
            )
        if problems := check_front(found):
            raise StudyError(f"the configuration in {self._file}: {'; '.join(problems)}")
        self.config_yaml()  # last: else what is damaged would be written once more
        return found

    def config_yaml(self) -> str:
        """Return the text of the configuration that the study was begun with.

        ``config.yaml`` is written again where it is missing.

        Raises:
            StudyError: If there is no study, or ``config.yaml`` says otherwise, naming the line.
        """
        lines: list[str] = self.about()["config"]
        text, path = "\n".join(lines), self.folder / "config.yaml"
        try:
            there = path.read_bytes().decode("utf-8", errors="replace").split("\n")
        except FileNotFoundError:
            self.remake(path, lambda: write_text(path, text))
            return text
        except OSError as error:
            raise StudyError(f"{path} cannot be read: {error.strerror}") from error
        if there != lines:
            whole = max(len(there), len(lines))
            padded = [(*part, *[""] * (whole - len(part))) for part in (there, lines)]
            number = next(i for i in range(whole) if padded[0][i] != padded[1][i])
            came, begun = padded[0][number], padded[1][number]
            raise StudyError(
                f"{path}, line {number + 1} is {shown(came)}, and the study was begun with "
                f"{shown(begun)}: restore the line, or delete the file, which is then written "
                "again. Other values are those of another study=NAME"
            )
        return text

    def remake(self, path: Path, write: Callable[[], object]) -> None:
        """Write a file of the study again that is missing or damaged, and say so.

        Where it cannot be written, what it says is used all the same.

        Args:
            path: Of the file.
            write: Writes it.
        """
        try:
            write()
        except PermissionError as error:
            log.warning("%s is missing or damaged, and cannot be written: %s", path, error)
        else:
            log.warning("%s was missing or damaged; it is written again, as it was", path)

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
            self._require_files()
            self._repair()
            self._about = None
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
        text = to_json(whole)
        line, where = f"{text}\n".encode(), f"the event {event}"
        checked = event_of(parse_json(text, where), where)
        if (problem := self.state.problem(checked)) is not None:
            raise StudyError(f"{self.journal}: {where} cannot come here: {problem}")
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
        fields = asdict(request)
        fields["trial"] = fields.pop("trial_index")
        del fields["rival_losses"]  # which the rival's own trial has
        self.record("suggested", **fields, seconds=dict(seconds))

    def _read(self) -> StudyState:
        """Return what the journal says; a torn last line is passed over.

        Raises:
            StudyError: If any other line is damaged, with its number, or if of the journal and
                ``study.json`` one is missing.
        """
        self._require_files()
        try:
            content = self.journal.read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            if self.exists:
                raise StudyError(
                    f"{self.journal} is missing, so that nothing is known of the trials that study "
                    f"{self.name} had. Restore the file, or move {self.folder} away and begin again"
                ) from error
            return StudyState()
        except OSError as error:
            raise StudyError(f"{self.journal} cannot be read: {error.strerror}") from error
        *lines, rest = content.split(b"\n")
        if not self.exists:
            if lines:
                raise StudyError(
                    f"{self._file} is missing, and {self.journal} has {len(lines)} lines: nobody "
                    f"knows what they were measured with. {self._restore}"
                )
            return StudyState()
        if rest:
            log.warning("%s ends in half a line (an interrupted write); ignored", self.journal)
        state = StudyState(about=self.about())
        for number, line in enumerate(lines, start=1):
            where = f"{self.journal}, line {number} is damaged"
            try:
                event = event_of(parse_json(line, where), where)
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
        """Refuse what would be read without an end, such as a named pipe, before any is read.

        Raises:
            StudyError: Naming it.
        """
        with suppress(OSError):  # which says whoever reads or writes there
            for path in sorted(self.folder.iterdir()):
                if (kind := kind_of(path)) in SPECIAL.values():
                    raise StudyError(
                        f"{path} is {kind}; expected a file. Move it away, or restore the file"
                    )

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


def follows(config: SearchConfig, compressible: Sequence[LayerSpec]) -> dict[str, Any]:
    """Return the part of ``study.json`` that follows from configuration and layers alone."""
    budget = Budget.from_keep_ratio(compressible, config.budget.keep_ratio)
    return {
        "seed": config.seed,
        "timed": config.latency.enabled,
        "storage": config.budget.storage,
        "budget_parameters": budget.parameters,
    }


def layers_of(about: Mapping[str, Any]) -> dict[str, LayerSpec]:
    """Return the layers that ``study.json`` describes, by name."""
    return {layer["name"]: LayerSpec(**layer) for layer in about["layers"]}


def stored_parameters(spec: LayerSpec, rank: int | None, about: Mapping[str, Any]) -> int:
    """Return the parameters of a layer at a rank, counted as the study's budget counts them."""
    if rank is None:
        return spec.parameters
    bias = about["adds_bias"] or spec.has_bias
    return low_rank_parameters(spec, rank, bias=bias, storage=about["storage"])
