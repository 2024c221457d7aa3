"""The view of a study that MLflow shows: which store, what stands on the parent run."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from lrbo.optimization.study import Study
from lrbo.progress import imported
from lrbo.results import draw_figures, summary
from lrbo.schema import SearchConfig
from lrbo.storage import write_text
from lrbo.tracking import MlflowTracker, NullTracker, Tracker

log = logging.getLogger(__name__)


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
        # Beside ratios of other studies a bare number would be taken for one.
        prefix="log_weight." if chosen.space.type == "weights" else "",
    )


def absolute_uri(uri: str) -> str:
    """Return a SQLite address that does not depend on the working folder."""
    scheme = "sqlite:///"
    if not uri.startswith(scheme) or uri == scheme:
        return uri
    return f"{scheme}{Path(uri.removeprefix(scheme)).absolute()}"


def digests(study: Study) -> dict[str, Any]:
    """Return the digests of model and data, for tracking."""
    about = study.about()
    digests = {f"data.{role}.digest": found["digest"] for role, found in study.data().items()}
    versions = {f"version.{name}": found for name, found in about["versions"].items()}
    return digests | versions | {"model.fingerprint": about["model_fingerprint"]}


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
            "journal; draw them with: lrbo report study=%s",
            study.name,
            error,
            study.name,
        )


def show(study: Study, tracker: Tracker) -> None:
    """Draw the figures and put them, the front and the configuration on the parent run."""
    figures = draw_figures(study)
    found = summary(study)
    front = study.folder / "front.json"
    write_text(front, json.dumps(found["front"], indent=2) + "\n")
    numbers = {"dense_nll": found["dense"]["nll"], "dense_perplexity": found["dense"]["perplexity"]}
    for label in ("uniform", "best"):
        if found[label] is not None:
            numbers |= {
                f"{label}_{k}": found[label][k] for k in ("nll", "perplexity", "keep_ratio")
            }
    for label, tested in found["test"].items():
        numbers |= {f"test_{label}_{key}": tested[key] for key in ("nll", "perplexity")}
    if found["hypervolume"] is not None:
        numbers["hypervolume"] = found["hypervolume"]["value"]
    artifacts = [*figures, front, study.folder / "config.yaml", study.folder / "study.json"]
    if not isinstance(tracker, NullTracker):
        artifacts.append(write_page(study))
    tracker.summary(numbers, artifacts)
