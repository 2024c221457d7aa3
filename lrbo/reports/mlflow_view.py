"""Saved views of the MLflow UI: which columns and charts it opens a study with."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import quote

from lrbo.mlflow_entities import with_tags

# The UI keeps a saved view as a tag of the experiment. An older one, that of mlflow 3.14 for one,
# keeps it in another form: it shows the runs with its default columns then.
TAG = "mlflow.sharedViewState."
ALL_STUDIES = "lrbo-studies"
# Which columns come first, as the UI itself calls them.
_FIRST = ("attributes.`Run Name`", "runDateAndNestInfo", "duration")
_WIDTH = 120  # of a column, in pixels


def study_view(study_id: str) -> str:
    """Return the key of the view of a study's trials."""
    return f"lrbo-{study_id}"


def address(experiment_id: str, view: str | None = None) -> str:
    """Return the end of the UI's address that shows runs; without it, it opens on chat models.

    Args:
        experiment_id: Of the experiment.
        view: Key of a saved view; ``None`` is the UI's own.
    """
    end = f"#/experiments/{experiment_id}/runs?workflowType=machine_learning"
    return end if view is None else f"{end}&viewStateShareKey={quote(view)}"


def all_studies(when: float) -> str:
    """Return the tag of the view that has a line per study."""
    metrics = [
        "best_perplexity", "uniform_perplexity", "dense_perplexity", "test_best_perplexity",
        "best_keep_ratio", "hypervolume",
    ]  # fmt: skip
    params = ["model.name", "method.name", "space.name", "budget.keep_ratio", "seed"]
    columns = [*(f"metrics.`{name}`" for name in metrics), *(f"params.`{name}`" for name in params)]
    state = {"searchFilter": with_tags(role="study"), **_table(columns)}
    return _tag("all studies", state, when)


def trials_of(
    study: str,
    study_id: str,
    variables: Sequence[str],
    metrics: Sequence[str],
    size: str | None,
    when: float,
    loss: str = "nll",
) -> str:
    """Return the tag of the view of a study's trials: best first, and charts of all of them.

    Args:
        study: Name of the study.
        study_id: What its runs are found by.
        variables: Params that the parallel coordinates have an axis of.
        metrics: Columns of the table, in order.
        size: Metric that is minimised beside the loss; ``None`` at one budget.
        when: Unix time.
        loss: Metric that the best trial has lowest.
    """
    columns = [
        *(f"metrics.`{name}`" for name in metrics),
        "tags.`lrbo.origin`",
        *(f"params.`{name}`" for name in variables),
    ]
    # nll and not perplexity: one bad trial would press all others together.
    over = [*([] if size is None else [size]), "trial", "kl_dense_to_compressed"]
    section = "lrbo-section"
    charts: list[Mapping[str, Any]] = [
        _chart(f"nll over {name}", section, type="SCATTER", runsCountToCompare=1000)
        | {"xaxis": {"key": name, "type": "METRIC"}, "yaxis": {"key": "nll", "type": "METRIC"}}
        for name in over
    ]
    charts.append(
        _chart("Variables and nll", section, type="PARALLEL")
        | {
            "selectedParams": list(variables),
            "selectedMetrics": [*([] if size is None else [size]), "nll"],
            "showAllRuns": True,
        }
    )
    state = {
        "searchFilter": with_tags(study_id=study_id, role="trial"),
        "orderByKey": f"metrics.`{size or loss}`",
        "orderByAsc": True,
        **_table(columns),
        "runsHiddenMode": "SHOW_ALL",  # else charts have the first ten only
        "compareRunCharts": charts,
        "compareRunSections": [
            _section(section, "Study", shown=True),
            # Every other metric over the trials, which the UI adds: there to be opened.
            *(_section(f"lrbo-{name}", name, shown=False) for name in ("Model metrics", "seconds")),
        ],
        "isAccordionReordered": True,  # else sections are sorted by name
    }
    return _tag(f"{study}: trials", state, when)


def saved_views(tags: Mapping[str, str]) -> dict[str, str]:
    """Return names of our own saved views by key, the newest first.

    Args:
        tags: Of the experiment.
    """
    found = []
    for tag, value in tags.items():
        key = tag.removeprefix(TAG)
        if key != tag and key.startswith("lrbo-"):
            with suppress(ValueError, KeyError):  # another version may write them otherwise
                view = json.loads(value)
                found.append((view["updatedAt"], key, view["name"]))
    return {key: name for _, key, name in sorted(found, reverse=True)}


def _table(columns: Sequence[str]) -> dict[str, Any]:
    """Return the columns of a view, in order; the UI's own order is that of the alphabet."""
    return {
        "selectedColumns": list(columns),
        "columnOrder": [*_FIRST, *columns],
        "columnWidths": dict.fromkeys(columns, _WIDTH),
    }


def _chart(title: str, section: str, **options: Any) -> dict[str, Any]:
    """Return a chart of a view."""
    return {
        "uuid": f"lrbo-{title}", "metricSectionId": section, "displayName": title,
        "deleted": False, "isGenerated": False, **options,
    }  # fmt: skip


def _section(uuid: str, name: str, *, shown: bool) -> dict[str, Any]:
    """Return a part of the page of charts."""
    return {
        "uuid": uuid, "name": name, "display": shown, "isReordered": False, "deleted": False,
        "isGenerated": False,
    }  # fmt: skip


def _tag(name: str, state: Mapping[str, Any], when: float) -> str:
    """Return a view as the UI keeps it, compressed: the length of a tag has an end."""
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
    moment = round(1000 * when)
    view = {"name": name, "createdAt": moment, "updatedAt": moment, "state": f"deflate;{packed}"}
    return json.dumps(view)
