"""The view of a study that MLflow shows: which store, what stands on the parent run."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from lrbo import mlflow_ui
from lrbo.errors import LrboError
from lrbo.gains import MEANING, gains
from lrbo.mlflow_store import absolute_uri
from lrbo.optimization.front import LATENCIES
from lrbo.optimization.study import Study
from lrbo.presentation import LABELS, Checkpoint, Dataset, Presentation, perplexity_text
from lrbo.progress import imported
from lrbo.rendering import render
from lrbo.results import described, draw_figures, score_rows, size_metric, summary
from lrbo.schema import SearchConfig
from lrbo.shell import command
from lrbo.storage import write_text
from lrbo.strict_json import to_json
from lrbo.tracking import MlflowTracker, NullTracker, Tracker

log = logging.getLogger(__name__)

AXES = 8  # of the variables in the parallel coordinates; more cannot be read


def make_tracker(chosen: SearchConfig, study: Study, *, strict: bool = False) -> Tracker:
    """Return the tracker that the configuration asks for."""
    if not chosen.tracking.enabled:
        return NullTracker()
    return MlflowTracker(
        uri=absolute_uri(chosen.tracking.uri),
        experiment=chosen.tracking.experiment,
        study_id=study.about()["study_id"],
        study_name=study.name,
        artifact_root=Path(chosen.studies).absolute() / "mlflow-artifacts",
        strict=strict,
        prefix=_prefix(study),
        keys=study.keys,
    )


def _prefix(study: Study) -> str:
    """Return what variables are called by: a bare number would be taken for a ratio."""
    return "log_weight." if study.config().space.type == "weights" else ""


def digests(study: Study) -> dict[str, Any]:
    """Return the digests of model and data, for tracking."""
    about = study.about()
    digests = {f"data.{role}.digest": found["digest"] for role, found in study.data().items()}
    versions = {f"version.{name}": found for name, found in about["versions"].items()}
    return digests | versions | {"model.fingerprint": about["model_fingerprint"]}


def presentation(study: Study) -> Presentation:
    """Return what a study is shown with beside its numbers."""
    about, config = study.about(), study.config()
    length = config.data.window
    datasets = [
        Dataset(role, found["text"], found["digest"], found["windows"], found["windows"] * length)
        for role, found in study.data().items()
    ]
    now, identity, size = time.time(), about["study_id"], size_metric(study)
    metrics = ["perplexity", "nll", "kl_dense_to_compressed", "keep_ratio"]
    metrics += LATENCIES if config.latency.enabled else ()
    loss = "objective" if config.search.kl_weight else "nll"
    trials = mlflow_ui.trials_of(
        study.name, identity, _variables(study),
        list(dict.fromkeys([*metrics, loss, *([size] if size else []), "seconds/scoring"])),
        size, now, loss,
    )  # fmt: skip
    views = {
        mlflow_ui.TAG + mlflow_ui.ALL_STUDIES: mlflow_ui.all_studies(now),
        mlflow_ui.TAG + mlflow_ui.study_view(identity): trials,
    }
    return Presentation(_note(study), datasets, views)


def _variables(study: Study) -> list[str]:
    """Return the params that the loss goes with most, by rank correlation, in their own order.

    Before there are trials they are those that the study begins with.
    """
    found = [(r.request.variables, r.metrics["nll"]) for r in study.state.completed]
    points = pd.DataFrame([{**variables, "": nll} for variables, nll in found if variables])
    names = [name for name in points if name] or list(study.about()["variables"])
    if len(points) > 2:
        shares = points.rank().corr()[""].abs().fillna(0.0)
        chosen = set(sorted(names, key=lambda name: -shares[name])[:AXES])
        names = [name for name in names if name in chosen]
    prefix = _prefix(study)
    return [name if name == "keep_ratio" else f"{prefix}{name}" for name in names[:AXES]]


def _note(study: Study) -> str:
    """Write what stands on top of the page of a study's run, as Markdown."""
    rows = []
    for row in score_rows(study):
        values = (scores.get("perplexity") for scores in (row.validation, row.test))
        texts = ("-" if value is None else perplexity_text(value) for value in values)
        rows.append([row.name, f"{row.keep_ratio:.2%}", *texts])
    return render(
        "study_note.md",
        lines={name: text for name, text in described(study).items() if name != "Study"},
        rows=rows,
        gains=[sentence for gain in gains(study.state) for sentence in gain.sentences],
        meaning=MEANING,
    )


def enter_checkpoint(
    chosen: SearchConfig, study: Study, folder: Path, trial: int, register: str,
    tags: Mapping[str, str],
) -> None:  # fmt: skip
    """Note in the journal that a checkpoint was written, and show it in MLflow.

    Neither can fail: the checkpoint is there.

    Args:
        chosen: Of the study.
        study: Not locked.
        folder: Of the checkpoint.
        trial: Number of the trial that it is.
        register: ``link``, ``copy`` or ``none``.
        tags: What is to be read of it in MLflow.
    """
    event = {
        "id": uuid.uuid4().hex, "trial": trial, "folder": str(folder.absolute()),
        "register": register, "tags": dict(tags),
    }  # fmt: skip
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
    show_checkpoint(make_tracker(chosen, study), event)


def show_checkpoint(tracker: Tracker, event: Mapping[str, Any]) -> None:
    """Show a checkpoint as the journal has it, where it is wanted and still there."""
    folder = Path(event["folder"])
    if event["register"] != "none" and folder.is_dir():
        copied = event["register"] == "copy"
        tracker.checkpoint(Checkpoint(event["id"], event["trial"], folder, copied, event["tags"]))


def write_page(study: Study) -> Path:
    """Write the report of a study as one HTML file, and return where it is."""
    path = study.folder / "report.html"
    imported("lrbo.html_report").write_html(study, path)  # it asks Ax
    return path


def show_if_possible(study: Study, tracker: Tracker) -> None:
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


def show(study: Study, tracker: Tracker) -> None:
    """Draw the figures and put them, the front and the configuration on the parent run."""
    figures = draw_figures(study)
    found = summary(study)
    front = study.folder / "front.json"
    write_text(front, to_json(found["front"], indent=2) + "\n")
    numbers = {"dense_nll": found["dense"]["nll"], "dense_perplexity": found["dense"]["perplexity"]}
    for label in LABELS[1:]:
        if found[label] is not None:
            numbers |= {
                f"{label}_{k}": found[label][k] for k in ("nll", "perplexity", "keep_ratio")
            }
    for label, tested in found["test"].items():
        numbers |= {f"test_{label}_{key}": tested[key] for key in ("nll", "perplexity")}
    for gain in found["gains"][:1]:
        for text in ("validation", "test"):
            if gain[text] is not None:
                numbers[f"gain_{text}"] = gain[text]["difference"]
            if gain[text] is not None and gain[text]["standard_error"] is not None:
                numbers[f"gain_{text}_error"] = gain[text]["standard_error"]
    if found["hypervolume"] is not None:
        numbers["hypervolume"] = found["hypervolume"]["value"]
    artifacts = [*figures, front, study.folder / "config.yaml", study.folder / "study.json"]
    if not isinstance(tracker, NullTracker):
        artifacts.append(write_page(study))
    tracker.summary(numbers, artifacts)
    tracker.present(presentation(study))
