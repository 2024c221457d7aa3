"""Saved views of the MLflow UI: what it unpacks is what was asked for, in its own words."""

import base64
import json
import zlib
from typing import Any
from urllib.parse import parse_qs, unquote

from lrbo import mlflow_ui


def unpacked(tag: str) -> dict[str, Any]:
    """Return the state in a tag, as the UI reads it."""
    view = json.loads(tag)
    head, _, packed = view["state"].partition(";")
    assert head == "deflate"
    state: dict[str, Any] = json.loads(zlib.decompress(base64.b64decode(packed)))
    return state


def trials(size: str | None, variables: list[str] | None = None) -> str:
    return mlflow_ui.trials_of("mine", "an-id", variables or ["a", "b"], ["nll"], size, 5.0)


def test_the_trials_of_a_study_and_no_other_runs_are_shown_best_first() -> None:
    state = unpacked(trials(None))
    assert state["searchFilter"] == "tags.`lrbo.study_id` = 'an-id' and tags.`lrbo.role` = 'trial'"
    assert (state["orderByKey"], state["orderByAsc"]) == ("metrics.`nll`", True)
    assert state["selectedColumns"][0] == "metrics.`nll`"
    assert state["columnOrder"][-len(state["selectedColumns"]) :] == state["selectedColumns"]
    weighted = mlflow_ui.trials_of("mine", "an-id", ["a"], ["nll"], None, 5.0, "objective")
    assert unpacked(weighted)["orderByKey"] == "metrics.`objective`"
    assert unpacked(trials("model_bytes"))["orderByKey"] == "metrics.`model_bytes`"


def test_a_front_has_a_chart_of_loss_against_size_and_one_budget_none() -> None:
    for size in (None, "model_bytes"):
        charts = unpacked(trials(size))["compareRunCharts"]
        over = [chart["xaxis"]["key"] for chart in charts if chart["type"] == "SCATTER"]
        assert ("model_bytes" in over) == (size is not None)
        assert "trial" in over
        (parallel,) = [chart for chart in charts if chart["type"] == "PARALLEL"]
        assert parallel["selectedParams"] == ["a", "b"]
        assert len({chart["uuid"] for chart in charts}) == len(charts)


def test_every_chart_is_in_a_section_that_is_there() -> None:
    state = unpacked(trials("keep_ratio"))
    sections = {section["uuid"]: section["display"] for section in state["compareRunSections"]}
    assert all(sections[chart["metricSectionId"]] for chart in state["compareRunCharts"])


def test_a_view_of_many_variables_fits_a_tag() -> None:
    names = [f"log_weight.group.{kind}.depth.{depth}" for kind in "abcdefgh" for depth in range(9)]
    assert len(trials("keep_ratio", names)) < 5000


def test_own_views_are_listed_the_newest_first_and_others_are_left_alone() -> None:
    tags = {
        mlflow_ui.TAG + mlflow_ui.ALL_STUDIES: mlflow_ui.all_studies(1.0),
        mlflow_ui.TAG + mlflow_ui.study_view("an-id"): trials(None),
        mlflow_ui.TAG + "somebody's": "no JSON",
        mlflow_ui.TAG + "lrbo-damaged": "no JSON",
        "mlflow.note.content": "a note",
    }
    assert mlflow_ui.saved_views(tags) == {
        "lrbo-an-id": "mine: trials",
        "lrbo-studies": "all studies",
    }


def test_an_address_leads_to_a_view() -> None:
    page, _, query = mlflow_ui.address("3", "lrbo-an id&x").partition("?")
    assert page == "#/experiments/3/runs"
    found = parse_qs(query)
    assert found["viewStateShareKey"] == ["lrbo-an id&x"]
    assert "viewStateShareKey" not in unquote(mlflow_ui.address("3"))
