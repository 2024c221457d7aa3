"""What MLflow shows of a study: which store, description, numbers and files of its run."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lrbo.config import saved, schema
from lrbo.config.choices import KEEP_RATIO
from lrbo.config.schema import SearchConfig
from lrbo.config.shell import command
from lrbo.errors import LrboError
from lrbo.files.atomic import write_text
from lrbo.files.parsing import to_json
from lrbo.files.rendering import render
from lrbo.progress import imported
from lrbo.reports.gains import gains
from lrbo.reports.pictures import draw_figures
from lrbo.reports.recoveries import checkpoint_folder, recovered_rows, recoveries
from lrbo.reports.results import described, hypervolume_of, score_rows, summary
from lrbo.reports.study_tables import head_tables
from lrbo.study.journal import Study
from lrbo.study.study_record import StudyRecord
from lrbo.tracking.mlflow_runs import Checkpoint, Dataset, Presentation
from lrbo.tracking.mlflow_store import absolute_uri
from lrbo.tracking.tracker import MlflowTracker, NullTracker, Tracker

log = logging.getLogger(__name__)


def make_tracker(config: SearchConfig, study: StudyRecord, *, strict: bool = False) -> Tracker:
    """Tracker that the configuration asks for."""
    if not config.tracking.enabled:
        return NullTracker()
    return MlflowTracker(
        uri=absolute_uri(config.tracking.uri),
        experiment=config.tracking.experiment,
        study_id=study.about.study_id,
        study_name=study.name,
        artifact_root=Path(config.studies).absolute() / "mlflow-artifacts",
        strict=strict,
        metric=study.task.minimized.name,
        # A bare number would be taken for a ratio.
        prefix="log_weight." if study.config.space.type == "weights" else "",
        keys=study.keys,
    )


def digests(study: StudyRecord) -> dict[str, Any]:
    """Digests of model and data, and versions, for tracking."""
    digests = {f"data.{role}.digest": used["digest"] for role, used in study.data.items()}
    versions = {f"version.{name}": version for name, version in study.about.versions.items()}
    return digests | versions | {"model.fingerprint": study.about.model_fingerprint}


def params(config: SearchConfig, study: StudyRecord) -> dict[str, Any]:
    """Params of a study's run: its values, of a recovery only those of one that is wanted."""
    values = schema.flat(config)
    if not config.recover.enabled:
        values = {key: v for key, v in values.items() if not key.startswith(f"{saved.RECOVER}.")}
    return values | digests(study)


def presentation(study: StudyRecord) -> Presentation:
    """Description and texts of a study."""
    length = study.config.data.window
    datasets = [
        Dataset(role, used["text"], used["digest"], used["windows"], used["windows"] * length)
        for role, used in study.data.items()
    ]
    note = render("study_note.md", lines=described(study), tables=head_tables(study))
    return Presentation(note, datasets)


def enter_checkpoint(
    config: SearchConfig, study: Study, folder: Path, trial: int, register: str,
    tags: Mapping[str, str],
) -> None:  # fmt: skip
    """Note in the journal that a checkpoint was written, and show it in MLflow.

    A failure of either is a warning, for the checkpoint is there. The study must not be locked.
    """
    event = {"id": uuid.uuid4().hex, "trial": trial, "folder": str(folder.absolute())}
    event |= {"register": register, "tags": {**tags}}
    try:
        with study.locked():
            study.record("compressed", **event)
    except (LrboError, OSError) as error:
        log.warning(
            "The journal of study %s does not say that %s was written (%s), so that `lrbo report "
            "sync=true` will not show it in MLflow.",
            study.name,
            folder,
            error,
        )
    show_checkpoint(study, make_tracker(config, study), event)


def show_checkpoint(study: StudyRecord, tracker: Tracker, event: Mapping[str, Any]) -> None:
    """Show a checkpoint as the journal has it, where it is wanted and still there."""
    folder = Path(checkpoint_folder(study, event))
    if event["register"] != "none" and folder.is_dir():
        copied = event["register"] == "copy"
        tracker.checkpoint(Checkpoint(event["id"], event["trial"], folder, copied, event["tags"]))


def show_recoveries(study: StudyRecord, tracker: Tracker) -> None:
    """Show what was recovered after the search as the journal has it: scores, but no curves."""
    for each in recoveries(study):
        for event in each.events:
            scores = {"validation": event["validation"]}
            if (test := each.tests.get(event["trial"])) is not None:
                scores["test"] = test["test"]
            numbers = {
                f"{text}_{model}_{name}": value
                for text, models in scores.items()
                for model, metrics in models.items()
                for name, value in metrics.items()
            }
            run, own = f"recovery-{Path(event['folder']).name}", {"trial": event["trial"]}
            tracker.recovery(event["id"], run, own | {**each.settings}, numbers)


def write_page(study: StudyRecord) -> Path:
    """Write the page of a study, and return its path."""
    path = study.folder / "report.html"
    write_text(path, imported("lrbo.reports.page").study_page(study))  # which asks Ax
    return path


def show_if_possible(study: StudyRecord, tracker: Tracker) -> None:
    """Show a study where a full disk must not stop what it is shown for: it can be done later."""
    try:
        show(study, tracker)
    except OSError as error:
        log.warning(
            "The figures of study %s are not all written (%s). Everything they show is in its "
            "journal; draw them with: %s",
            study.name,
            error,
            command("report", **study.keys),
        )


def show(study: StudyRecord, tracker: Tracker) -> None:
    """Draw the figures and put them, the front and the configuration on the parent run."""
    figures, area, front = draw_figures(study), hypervolume_of(study), study.folder / "front.json"
    write_text(front, to_json(summary(study)["front"], indent=2) + "\n")
    scores = [metric.name for metric in study.task.scores]
    numbers: dict[str, float] = {} if area is None else {"hypervolume": area["value"]}
    for row in score_rows(study):
        names = scores if row.trial is None else [*scores, KEEP_RATIO]
        numbers |= {f"{row.label}_{name}": row.validation[name] for name in names}
        numbers |= {f"test_{row.label}_{name}": row.test[name] for name in scores if row.test}
    for gain in gains(study.state)[:1]:
        for text, difference in gain.differences.items():
            numbers[f"gain_{text}"] = difference.mean
            if difference.error is not None:
                numbers[f"gain_{text}_error"] = difference.error
    for best in filter(lambda each: each["is_best"], recovered_rows(study)):
        numbers["recovered_trial"] = best["trial"]
        numbers |= {f"recovered_{name}": v for name, v in best["validation"]["after"].items()}
        numbers |= {f"test_recovered_{name}": v for name, v in best["test"]["after"].items()}
    artifacts = [*figures, front, study.folder / "config.yaml", study.folder / "study.json"]
    if not isinstance(tracker, NullTracker):
        artifacts.append(write_page(study))
    tracker.summary(numbers, artifacts)
    tracker.present(presentation(study))
