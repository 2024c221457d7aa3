"""Checkpoints as registered models of MLflow: a model per study, a version per checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lrbo.mlflow_entities import file_name, with_tags
from lrbo.presentation import Checkpoint
from lrbo.rendering import markdown

COPY = "checkpoint"  # folder of a run's artifacts


def register(
    client: Any, study: str, study_id: str, checkpoint: Checkpoint, run_id: str, *, is_local: bool
) -> bool:
    """Make a version of the study's model, unless it is there; return whether it was made.

    Args:
        client: Of mlflow.
        study: Name of the study.
        study_id: Of the study, whose name another one may have too.
        checkpoint: That was written.
        run_id: Of its trial.
        is_local: Whether the store is a file here. A server refuses a version whose files are
            not among its own artifacts, so that it is given the trial's; the folder is a tag.
    """
    name = file_name(study)
    description = f"Checkpoints of the lrbo study {markdown(study)}."
    try:
        client.create_registered_model(name, description=description)
    except Exception as error:
        if getattr(error, "error_code", None) != "RESOURCE_ALREADY_EXISTS":
            raise
    tags: Mapping[str, str] = {
        **checkpoint.tags,
        "folder": str(checkpoint.folder),
        "lrbo.study_id": study_id,
        "lrbo.checkpoint": checkpoint.identity,
    }
    if client.search_model_versions(with_tags(checkpoint=checkpoint.identity)):
        return False
    source = checkpoint.folder.as_uri() if is_local else f"runs:/{run_id}/allocation.json"
    if checkpoint.copied:
        client.log_artifacts(run_id, str(checkpoint.folder), COPY)
        source = f"runs:/{run_id}/{COPY}"
    client.create_model_version(name, source, run_id, tags=tags, await_creation_for=0)
    return True
