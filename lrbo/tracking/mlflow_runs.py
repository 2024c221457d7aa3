"""What MLflow shows of a study: its runs in one store, which nothing else asks."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from lrbo.errors import cut
from lrbo.files.atomic import is_full
from lrbo.files.parsing import to_json
from lrbo.files.rendering import markdown
from lrbo.study.events import fields_of
from lrbo.tracking import mlflow_store as store
from lrbo.trials.records import TrialRecord

log = logging.getLogger(__name__)

TAG_LENGTH, PARAM_LENGTH = 5000, 6000  # characters that MLflow accepts
COPY = "checkpoint"  # folder of a run's artifacts
# Of MLflow, by the outcome of a trial.
STATUSES = {"completed": "FINISHED", "stopped": "KILLED", "failed": "FAILED", "abandoned": "FAILED"}


@dataclass(frozen=True)
class Dataset:
    """A text as a study uses it: its name, and digest and size of its token windows."""

    role: str  # calibration, validation or test
    name: str
    digest: str
    windows: int
    tokens: int

    def fields(self) -> dict[str, str]:
        """What MLflow keeps of it: its name and size, not the text."""
        return {
            "name": cut(self.name, 500),
            "digest": self.digest[:36],
            "source_type": "local",
            "source": json.dumps({"uri": self.name}),
            "profile": json.dumps({"windows": self.windows, "tokens": self.tokens}),
        }


@dataclass(frozen=True)
class Checkpoint:
    """A compressed model that was written."""

    identity: str  # its tag in the store; never changes
    trial: int  # whose ranks it has
    folder: Path  # absolute
    copied: bool  # the store is to hold the files too, instead of their address alone
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Presentation:
    """What stands around the runs of a study: its description, in Markdown, and its texts."""

    note: str = ""
    datasets: Sequence[Dataset] = ()


@dataclass
class StudyEntry:
    """Where MLflow shows a study, and under which names."""

    uri: str  # `sqlite:///` and a file, or the address of a server
    experiment: str  # made if it does not exist
    study_id: str  # the tag of its runs, which never changes
    study_name: str
    artifact_root: Path | None = None  # of an SQLite store; by default `mlartifacts` beside it
    metric: str = "nll"  # that is minimized: the parent shows the best
    prefix: str = ""  # of the names of variables, to say what their values are


class StudyRuns:
    """The runs of one study in one store; passes on whatever the store raises."""

    def __init__(self, study: StudyEntry) -> None:
        """Connect to the store, and make its tables and the experiment if it has none."""
        self._study, location = study, None
        file = store.sqlite_file(study.uri)
        self._database = None if file is None else store.Database(file)
        self._check_free()
        self._client: Any = store.open_client(study.uri)
        if file is not None:
            root = study.artifact_root or file.parent / "mlartifacts"
            location = (root.resolve() / file_name(study.experiment)).as_uri()
            store.prepare_engine(self._client)
        self._experiment_id = self._find_experiment(study.experiment, location)
        self._parent_id, self._parent_started = "", 0
        self._artifacts: Path | None = None  # of the parent run, where they are files here
        self._shown: set[int] = set()
        self._half_written: dict[int, str] = {}
        self._values: dict[int, tuple[float, float]] = {}  # objective and metric of a trial

    def begin(self, config: Mapping[str, Any]) -> None:
        """Find or make the parent run, and find the trials that have their child run."""
        parents = self._search(store.with_tags(study_id=self._study.study_id, role="study"))
        if parents:
            parent = min(parents, key=lambda run: (run.info.start_time, run.info.run_id))
            self._client.update_run(parent.info.run_id, status="RUNNING")
        else:
            parent = self._client.create_run(
                self._experiment_id, tags=self._tags("study"), run_name=self._study.study_name
            )
        self._parent_id = parent.info.run_id
        self._parent_started = parent.info.start_time
        address = urlparse(parent.info.artifact_uri)
        self._artifacts = Path(unquote(address.path)) if address.scheme == "file" else None
        params = {k: v for k, v in config.items() if key_of(k) not in parent.data.params}
        self._log(self._parent_id, {}, 0, 0, params)
        for run in self._search(f"tags.`mlflow.parentRunId` = '{self._parent_id}'"):
            number = run.data.tags.get("lrbo.trial", "")
            if number.isdecimal() and run.info.status in STATUSES.values():
                self._shown.add(int(number))
                self._note_value(int(number), run.data.metrics)
            elif number.isdecimal():  # else somebody else put the run there
                self._half_written[int(number)] = run.info.run_id

    def show(self, record: TrialRecord) -> bool:
        """Write the child run of a trial that ended, and tell whether it was not there already.

        The run is closed last, so one that is closed is whole and its numbers are on the parent.
        """
        request, result, index = record.request, record.result, record.request.trial_index
        if result is None or index in self._shown:
            return False
        self._check_free()
        if index in self._half_written:
            self._client.delete_run(self._half_written.pop(index))
        tags = self._tags("trial", trial=str(index), origin=request.origin, outcome=result.outcome)
        tags["mlflow.parentRunId"] = self._parent_id
        if result.error is not None:
            tags["lrbo.error"] = cut(result.error, TAG_LENGTH)
        started = _milliseconds(record.ended if record.started is None else record.started)
        ended = max(started, _milliseconds(record.ended))  # the clock may have been set back
        run = self._client.create_run(
            self._experiment_id, start_time=started, tags=tags, run_name=f"trial-{index:03d}"
        )
        run_id = run.info.run_id
        self._client.log_text(run_id, to_json(fields_of(request.allocation)), "allocation.json")
        # What stands before a slash is a section of its own on the page of charts.
        seconds = {f"seconds/{name}": value for name, value in record.seconds.items()}
        variables = {  # the keep ratio of a front is no weight, whatever the others are
            name if name == "keep_ratio" else f"{self._study.prefix}{name}": value
            for name, value in request.variables.items()
        }
        metrics = {"trial": index, **record.metrics, **seconds}
        self._log(run_id, metrics, ended, index, variables)
        # With the time of the trial, not of the writing: MLflow then drops a second copy, as
        # one left by a process that was killed before it closed the child run.
        self._log(self._parent_id, self._progress(record), ended, index)
        self._client.set_terminated(run_id, status=STATUSES[result.outcome], end_time=ended)
        self._shown.add(index)
        return True

    def summarize(self, metrics: Mapping[str, float], artifacts: Iterable[Path]) -> None:
        """Log numbers, at the step of the last trial, and files on the parent run."""
        self._check_free()
        last = max(self._shown, default=0)
        self._log(self._parent_id, metrics, _milliseconds(), last)
        for path in artifacts:
            folder = "figures" if path.suffix == ".png" else ""
            try:
                self._client.log_artifact(self._parent_id, str(path), folder or None)
            except OSError as error:
                if not is_full(error) or self._artifacts is None:
                    raise
                # Half of a copy is worth nothing, and holds the room that the store itself needs.
                (self._artifacts / folder / path.name).unlink(missing_ok=True)
                log.warning("%s has no room beside the runs of MLflow (%s)", path, error)

    def present(self, presentation: Presentation) -> None:
        """Put description and texts on the parent run."""
        from mlflow import entities
        from mlflow.exceptions import MlflowException

        self._check_free()
        if presentation.note:
            note = cut(presentation.note, TAG_LENGTH)
            self._client.set_tag(self._parent_id, "mlflow.note.content", note, synchronous=True)
        if presentation.datasets:  # one that the run has already is not added again
            inputs = []
            for each in presentation.datasets:
                role = entities.InputTag("mlflow.data.context", each.role)
                inputs.append(entities.DatasetInput(entities.Dataset(**each.fields()), [role]))
            try:
                self._client.log_inputs(self._parent_id, inputs)
            except MlflowException as error:
                if "UNIQUE constraint" not in str(error):
                    raise
                self._client.log_inputs(self._parent_id, inputs)  # another process was quicker

    def register(self, checkpoint: Checkpoint) -> None:
        """Make a checkpoint a version of the study's registered model, unless it is one.

        A server refuses a version whose files are not among its own artifacts: there its source is
        the trial's run, and the folder a tag.
        """
        from mlflow.exceptions import MlflowException

        self._check_free()
        folder, study = checkpoint.folder, self._study
        runs = self._search(store.with_tags(study_id=study.study_id, trial=str(checkpoint.trial)))
        if not runs:
            raise MlflowException(f"it has no run of trial {checkpoint.trial}")
        run_id = runs[0].info.run_id
        name = file_name(study.study_name)
        try:
            self._client.create_registered_model(
                name, description=f"Checkpoints of the lrbo study {markdown(study.study_name)}."
            )
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        if self._client.search_model_versions(store.with_tags(checkpoint=checkpoint.identity)):
            return
        source = f"runs:/{run_id}/allocation.json" if self._database is None else folder.as_uri()
        if checkpoint.copied:
            self._client.log_artifacts(run_id, str(folder), COPY)
            source = f"runs:/{run_id}/{COPY}"
        tags = {
            **checkpoint.tags,
            "folder": str(folder),
            "lrbo.study_id": study.study_id,
            "lrbo.checkpoint": checkpoint.identity,
        }
        self._client.create_model_version(name, source, run_id, tags=tags, await_creation_for=0)

    def finish(self, status: str) -> None:
        """Close the parent run."""
        self._check_free()
        ended = max(self._parent_started, _milliseconds())  # whatever the clock says
        self._client.set_terminated(self._parent_id, status=status, end_time=ended)

    def _tags(self, role: str, **more: str) -> dict[str, str]:
        own = {"study": self._study.study_name, "study_id": self._study.study_id, "role": role}
        tags = {f"lrbo.{name}": value for name, value in (own | more).items()}
        return tags | {"mlflow.source.name": "lrbo", "mlflow.source.type": "LOCAL"}

    def _progress(self, record: TrialRecord) -> dict[str, float]:
        """What the parent shows over the trials, with the best of those up to this one."""
        index, metrics, minimized = record.request.trial_index, record.metrics, self._study.metric
        progress = {name: metrics[name] for name in (minimized, "keep_ratio") if name in metrics}
        if minimized in metrics:
            self._note_value(index, metrics)
            so_far = (values for other, values in self._values.items() if other <= index)
            progress[f"best_{minimized}"] = min(so_far)[1]
        return progress

    def _note_value(self, index: int, metrics: Mapping[str, float]) -> None:
        if self._study.metric in metrics:
            value = metrics[self._study.metric]
            self._values[index] = metrics.get("objective", value), value

    def _log(
        self,
        run_id: str,
        metrics: Mapping[str, float],
        timestamp: int,
        step: int,
        params: Mapping[str, Any] | None = None,
    ) -> None:
        """Write numbers and params now: later they may fail unseen, or end after the run."""
        from mlflow.entities import Metric, Param

        numbers = [Metric(key_of(k), float(v), timestamp, step) for k, v in metrics.items()]
        settings = [Param(key_of(k), cut(str(v), PARAM_LENGTH)) for k, v in (params or {}).items()]
        self._client.log_batch(run_id, numbers, settings, synchronous=True)

    def _find_experiment(self, name: str, location: str | None) -> str:
        from mlflow.exceptions import MlflowException

        # Else the UI opens on traces of chat models instead of the table of runs.
        tags = {"mlflow.experimentKind": "custom_model_development"}
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return str(self._client.create_experiment(name, location, tags))
            except MlflowException:
                experiment = self._client.get_experiment_by_name(name)
                if experiment is None:  # no other process was quicker
                    raise
        return str(experiment.experiment_id)

    def _search(self, condition: str) -> list[Any]:
        return store.search_runs(self._client, self._experiment_id, condition)

    def _check_free(self) -> None:
        if self._database is not None:
            self._database.check_free()


def key_of(name: str) -> str:
    """Return a name that mlflow accepts; lm-eval, for one, has commas in its own."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:250]


def file_name(name: str) -> str:
    """Return a name that a file can have in any folder, as mlflow wants it of a model too."""
    plain = re.sub(r"^\.+", "_", re.sub(r"[/:]", "_", name))
    return plain if plain.strip() else f"_{plain}"


def _milliseconds(seconds: float | None = None) -> int:
    """Return a Unix time as mlflow counts it; by default the time now."""
    return round(1000 * (time.time() if seconds is None else seconds))
