"""Values as MLflow takes them: names and lengths that it accepts, its records."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from lrbo.errors import TrackingError, cut
from lrbo.presentation import Dataset

TAG_LENGTH = 5000  # in characters; mlflow refuses longer values
_PARAM_LENGTH = 6000
_KEY_LENGTH = 250
_DATASET_LENGTH = 500
_DIGEST_LENGTH = 36


def metrics_of(values: Mapping[str, float], timestamp: int, step: int) -> list[Any]:
    """Return numbers as mlflow takes them."""
    from mlflow.entities import Metric

    return [Metric(key_of(name), float(value), timestamp, step) for name, value in values.items()]


def input_of(dataset: Dataset) -> Any:
    """Return what mlflow keeps of a text: what it is called and how long it is, not the text."""
    from mlflow.entities import Dataset as Entity
    from mlflow.entities import DatasetInput, InputTag

    whole = Entity(
        name=cut(dataset.name, _DATASET_LENGTH),
        digest=dataset.digest[:_DIGEST_LENGTH],
        source_type="local",
        source=json.dumps({"uri": dataset.name}),
        profile=json.dumps({"windows": dataset.windows, "tokens": dataset.tokens}),
    )
    return DatasetInput(whole, [InputTag("mlflow.data.context", dataset.role)])


def params_of(values: Mapping[str, Any]) -> list[Any]:
    """Return settings as mlflow takes them."""
    from mlflow.entities import Param

    return [Param(key_of(name), cut(str(value), _PARAM_LENGTH)) for name, value in values.items()]


def key_of(name: str) -> str:
    """Return a name that mlflow accepts; lm-eval, for one, has commas in its own."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:_KEY_LENGTH]


def with_tags(**values: str) -> str:
    """Write the condition that runs or versions have these tags of ours.

    MLflow's conditions know no escape for a quote or a backslash, so that only values that lrbo
    itself makes are compared in them; a name of a study or a folder never is.

    Raises:
        TrackingError: If a value is not one of those, as in a file that somebody changed.
    """
    for name, value in values.items():
        if not re.fullmatch(r"[\w -]+", value):
            raise TrackingError(
                f"lrbo.{name}={value!r}: expected letters, digits and hyphens, as lrbo makes them; "
                "study.json or journal.jsonl of the study was changed"
            )
    return " and ".join(f"tags.`lrbo.{name}` = '{value}'" for name, value in values.items())


def file_name(name: str) -> str:
    """Make a name one that a file can have in any folder, as mlflow wants it of a model too."""
    plain = re.sub(r"^\.+", "_", re.sub(r"[/:]", "_", name))
    return plain if plain.strip() else f"_{plain}"


def first_line(text: str) -> str:
    """Return the first line of a message, without a password that an address may carry."""
    return cut(re.sub(r"//[^/@\s]+@", "//", text).strip().partition("\n")[0], 300)


def milliseconds(seconds: float) -> int:
    """Return a Unix time as mlflow counts it."""
    return round(1000 * seconds)
