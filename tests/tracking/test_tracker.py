"""MLflow shows what the journal says, whatever happens to either of them."""

import dataclasses
import json
import math
import os
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import ViewType

from lrbo.errors import TrackingError
from lrbo.study.events import allocation_of
from lrbo.tracking import mlflow_runs, mlflow_store
from lrbo.tracking import tracker as module
from lrbo.tracking.mlflow_runs import Checkpoint, Dataset, Presentation
from lrbo.tracking.tracker import MlflowTracker, NullTracker
from lrbo.trials.records import TrialResult
from tests.support.mlflow_runs import BEST, NLL, STARTED, Store, failed, record

# What is shown.


def test_a_study_becomes_a_parent_and_its_trials_children(store: Store) -> None:
    tracker = store.tracker()
    records = [record(index) for index in range(4)]
    tracker.start({"budget.keep_ratio": 0.5, "study": "my-study", "empty": "", "none": None})
    for each in records:
        tracker.trial(each)
    assert store.parent.info.status == "RUNNING"
    tracker.finish(completed=True)

    parent = store.parent
    assert parent.info.status == "FINISHED"
    assert parent.info.run_name == "my-study"
    assert parent.data.params == {
        "budget.keep_ratio": "0.5",
        "study": "my-study",
        "empty": "",
        "none": "None",
    }
    assert store.history("nll") == dict(enumerate(NLL))
    assert store.history("best_nll") == dict(enumerate(BEST))
    assert store.history("keep_ratio") == {
        each.request.trial_index: each.metrics["keep_ratio"] for each in records
    }
    assert list(store.children) == ["trial-000", "trial-001", "trial-002", "trial-003"]
    for each, child in zip(records, store.children.values(), strict=True):
        index = each.request.trial_index
        assert child.info.status == "FINISHED"
        assert child.info.start_time == round(1000 * (STARTED + 10 * index))
        assert child.info.end_time - child.info.start_time == 2000
        assert {
            name: child.data.tags[f"lrbo.{name}"] for name in ("trial", "origin", "outcome")
        } == {"trial": str(index), "origin": "sobol", "outcome": "completed"}
        assert "lrbo.error" not in child.data.tags
        assert {k: float(v) for k, v in child.data.params.items()} == each.request.variables
        assert child.data.metrics == {
            **each.metrics,
            "trial": index,
            "seconds/suggestion": 0.5,
            "seconds/scoring": 2.0,
        }
        text = store.artifact(child, "allocation.json").read_text(encoding="utf-8")
        assert allocation_of(json.loads(text)) == each.request.allocation


def test_a_file_leaves_the_limits_of_a_program_s_own_servers(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    store.tracker(strict=True).start({})
    assert not [name for name in os.environ if name.startswith("MLFLOW_HTTP_REQUEST")]


def test_a_trial_without_a_value_is_shown_as_failed_with_its_error(store: Store) -> None:
    tracker = store.tracker(strict=True)
    tracker.start({})
    tracker.trial(failed(0, "failed", "out of memory"))
    tracker.trial(failed(1, "abandoned", "no rank fits " * 1000))
    tracker.trial(record(2, result=None))  # has not ended: nothing to show
    assert [child.info.status for child in store.children.values()] == ["FAILED", "FAILED"]
    first, second = store.children.values()
    assert first.data.tags["lrbo.outcome"] == "failed"
    assert first.data.tags["lrbo.error"] == "out of memory"
    assert second.data.tags["lrbo.outcome"] == "abandoned"
    assert second.data.tags["lrbo.error"].startswith("no rank fits no rank")
    assert first.data.metrics == {"trial": 0, "seconds/suggestion": 0.5, "seconds/scoring": 2.0}
    assert store.parent.data.metrics == {}


def test_many_long_and_odd_names_and_values_are_taken(store: Store) -> None:
    ratios = {f"model.layers.{i}.mlp.up_proj": i / 250 for i in range(250)}
    odd = {"acc,none": 0.5, "perplexity": math.inf, "x" * 300: 1.0}
    one = record(0)
    one = dataclasses.replace(
        one,
        request=dataclasses.replace(one.request, variables=ratios),
        result=TrialResult(0, "completed", odd),
    )
    tracker = store.tracker(strict=True)
    tracker.start({"long": "y" * 10_000, **{f"key.{i}": i for i in range(250)}})
    tracker.trial(one)
    assert len(store.parent.data.params) == 251
    assert store.parent.data.params["long"] == "y" * 5997 + "..."
    (child,) = store.children.values()
    assert {k: float(v) for k, v in child.data.params.items()} == ratios
    assert child.data.metrics["acc_none"] == 0.5
    assert child.data.metrics["x" * 250] == 1.0


def test_variables_say_what_they_are_where_they_are_no_ratios(store: Store) -> None:
    tracker = store.tracker(strict=True, prefix="log_weight.")
    tracker.start({"seed": 0})
    one = record(0)
    tracker.trial(one)
    (child,) = store.children.values()
    params = {name: float(value) for name, value in child.data.params.items()}
    assert params == {f"log_weight.{k}": v for k, v in one.request.variables.items()}
    assert store.parent.data.params == {"seed": "0"}  # those of the study stay as they are


def test_numbers_figures_and_tables_go_on_the_parent(store: Store, tmp_path: Path) -> None:
    (tmp_path / "front.png").write_bytes(b"\x89PNG")
    (tmp_path / "front.csv").write_text("parameters,nll\n", encoding="utf-8")
    tracker = store.tracker(strict=True)
    tracker.start({})
    tracker.sync([record(0), record(1)])
    for improvement in (0.25, 0.5):
        tracker.summary(
            {"improvement": improvement}, [tmp_path / "front.png", tmp_path / "front.csv"]
        )
    tracker.finish(completed=False)
    parent = store.parent
    assert parent.info.status == "KILLED"
    assert parent.data.metrics["improvement"] == 0.5
    assert {p.step for p in store.client.get_metric_history(parent.info.run_id, "improvement")} == {
        1
    }
    assert store.artifact(parent, "figures/front.png").read_bytes() == b"\x89PNG"
    assert store.artifact(parent, "front.csv").read_text(encoding="utf-8") == "parameters,nll\n"
    assert store.artifacts in store.artifact(parent, "front.csv").parents


def test_the_same_trial_is_shown_once(store: Store) -> None:
    tracker = store.tracker(strict=True)
    tracker.start({})
    tracker.trial(record(0))
    tracker.trial(record(0))
    assert tracker.sync([record(0), record(1)]) == 1
    assert tracker.sync([record(0), record(1)]) == 0
    assert list(store.children) == ["trial-000", "trial-001"]


def test_the_best_is_that_of_the_trials_up_to_each(store: Store) -> None:
    tracker = store.tracker(strict=True)
    tracker.start({})
    for index in (1, 3, 0):  # parallel workers end out of order; 2 comes from the journal later
        tracker.trial(record(index))
    new_tracker = store.tracker(strict=True)
    new_tracker.start({})
    assert new_tracker.sync(record(index) for index in range(4)) == 1
    assert store.history("best_nll") == dict(enumerate(BEST))


PRESENTED = Presentation(
    "**a note**",
    [
        Dataset("calibration", "words[train]", "abc", 8, 512),
        Dataset("test", "words[test]", "x" * 64, 4, 256),
    ],
)


def inputs(store: Store) -> dict[str, tuple[str, str, dict[str, int]]]:
    return {
        each.tags[0].value: (
            each.dataset.name,
            each.dataset.digest,
            json.loads(each.dataset.profile or ""),
        )
        for each in store.parent.inputs.dataset_inputs
    }


def test_note_and_texts_stand_around_the_numbers_once(store: Store) -> None:
    for _ in range(2):  # a search that goes on presents itself again
        tracker = store.tracker(strict=True)
        tracker.start({})
        tracker.present(PRESENTED)
    assert store.parent.data.tags["mlflow.note.content"] == "**a note**"
    assert len(store.parent.inputs.dataset_inputs) == 2
    assert inputs(store) == {
        "calibration": ("words[train]", "abc", {"windows": 8, "tokens": 512}),
        "test": ("words[test]", "x" * 36, {"windows": 4, "tokens": 256}),
    }


def test_a_deleted_view_is_presented_again(store: Store) -> None:
    tracker = store.tracker(strict=True)
    tracker.start({})
    tracker.present(PRESENTED)
    store.client.delete_run(store.parent.info.run_id)
    new_tracker = store.tracker(strict=True)
    new_tracker.start({})
    new_tracker.present(PRESENTED)
    assert set(inputs(store)) == {"calibration", "test"}


# Checkpoints.


def written(folder: Path, trial: int = 1, **changes: Any) -> Checkpoint:
    (folder / "weights").mkdir(parents=True)
    (folder / "weights" / "part").write_text("numbers", encoding="utf-8")
    values: dict[str, Any] = {"copied": False, "tags": {"keep_ratio": "0.8"}} | changes
    return Checkpoint(uuid.uuid4().hex, trial, folder, **values)


def test_a_checkpoint_is_a_version_of_the_study_s_model_once(store: Store, tmp_path: Path) -> None:
    tracker = store.tracker(strict=True, study_name=f"a/b:{store.study_id}")
    tracker.start({})
    tracker.sync([record(index) for index in range(2)])
    tracker.finish(completed=False)
    linked, copied = written(tmp_path / "linked"), written(tmp_path / "copied", 0, copied=True)
    for checkpoint in (linked, copied, linked):
        store.tracker(strict=True, study_name=f"a/b:{store.study_id}").checkpoint(checkpoint)
    assert store.parent.info.status == "KILLED"  # it is not the search that goes on
    name = f"a_b_{store.study_id}"
    first, second = sorted(
        store.client.search_model_versions(f"name = '{name}'"), key=lambda each: each.version
    )
    runs = {each.info.run_id: name for name, each in store.children.items()}
    assert [runs[each.run_id] for each in (first, second)] == ["trial-001", "trial-000"]
    assert first.source == (tmp_path / "linked").as_uri()
    assert first.tags["folder"] == str(tmp_path / "linked")
    assert first.tags["keep_ratio"] == "0.8"
    assert not store.artifact(store.children["trial-001"], "checkpoint").exists()
    part = store.artifact(store.children["trial-000"], "checkpoint/weights/part")
    assert part.read_text(encoding="utf-8") == "numbers"
    assert second.source.endswith("/checkpoint")


def test_a_checkpoint_of_a_trial_that_is_not_shown_is_a_warning(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = store.tracker()
    tracker.start({})
    tracker.checkpoint(written(tmp_path / "early"))
    assert "no run of trial 1" in caplog.text
    assert "lrbo report study=my-study sync=true" in caplog.text


# Interruptions of the search.


def test_the_ui_opens_on_the_table_of_runs(store: Store) -> None:
    store.tracker().start({})
    experiment = store.client.get_experiment_by_name(store.experiment)
    assert experiment is not None
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"


def test_every_experiment_with_runs_has_a_page(store: Store) -> None:
    store.tracker().start({})
    experiment = store.client.get_experiment_by_name(store.experiment)
    assert experiment is not None
    page = mlflow_store.pages_of_studies(store.uri)[f"studies of {store.experiment}"]
    assert page.startswith(f"#/experiments/{experiment.experiment_id}/runs")


def test_a_resumed_search_continues_the_same_parent(store: Store) -> None:
    first = store.tracker()
    first.start({"search.trials": 4, "seed": 0})
    first.trial(record(0))
    first.finish(completed=False)
    before = store.parent
    assert before.info.status == "KILLED"

    second = store.tracker()
    second.start({"search.trials": 8, "seed": 0, "output": "text"})
    assert store.parent.info.status == "RUNNING"
    second.trial(record(1))
    second.finish(completed=True)
    parent = store.parent
    assert parent.info.run_id == before.info.run_id
    assert parent.info.status == "FINISHED"
    assert parent.data.params == {"search.trials": "4", "seed": "0", "output": "text"}
    assert list(store.children) == ["trial-000", "trial-001"]
    assert store.history("best_nll") == {0: BEST[0], 1: BEST[1]}


def test_the_best_so_far_is_what_the_search_calls_best(store: Store) -> None:
    """Also in a run that goes on: it is not the lowest nll where the divergence has a weight."""
    for index, (nll, objective) in enumerate([(3.5, 4.0), (3.25, 4.5), (3.375, 3.75)]):
        one = record(index, nll)
        assert one.result is not None
        metrics = {**one.metrics, "objective": objective}
        tracker = store.tracker(strict=True)
        tracker.start({})
        tracker.trial(
            dataclasses.replace(one, result=dataclasses.replace(one.result, metrics=metrics))
        )
    assert store.history("best_nll") == {0: 3.5, 1: 3.5, 2: 3.375}


def test_a_store_that_cannot_be_read_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    damaged = tmp_path / "mlflow.db"
    damaged.write_text("no database", encoding="utf-8")
    with pytest.raises(TrackingError, match=r"cannot be read .*'study=\*' sync=true"):
        mlflow_store.pages_of_studies(f"sqlite:///{damaged}")


def test_studies_in_one_experiment_are_kept_apart(store: Store, mlflow_folder: Path) -> None:
    other = Store(mlflow_folder)
    for each in (store, other):
        tracker = each.tracker(strict=True)
        tracker.start({})
        tracker.trial(record(0))
    assert store.parent.info.run_id != other.parent.info.run_id
    assert list(store.children) == list(other.children) == ["trial-000"]


class Killed(BaseException):
    """Stands for the end of the process."""


CALLS = ["create_run", "log_text", "log_batch 1", "log_batch 2", "set_terminated"]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_search_killed_while_it_shows_a_trial_shows_it_once(
    store: Store, monkeypatch: pytest.MonkeyPatch, call: str, when: str
) -> None:
    records = [record(index) for index in range(3)]
    tracker = store.tracker()
    tracker.start({})
    tracker.trial(records[0])

    name, _, number = call.partition(" ")
    original, calls = getattr(MlflowClient, name), 0

    def killing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls < int(number or 1):
            return original(*args, **kwargs)
        if when == "after":
            original(*args, **kwargs)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, name, killing)
        with pytest.raises(Killed):
            tracker.trial(records[1])

    written = (call, when) == ("set_terminated", "after")
    new_tracker = store.tracker(strict=True)
    new_tracker.start({})
    assert new_tracker.sync(records) == (1 if written else 2)
    assert list(store.children) == ["trial-000", "trial-001", "trial-002"]
    assert {child.info.status for child in store.children.values()} == {"FINISHED"}
    assert store.history("nll") == dict(enumerate(NLL[:3]))  # no point twice
    assert store.history("best_nll") == dict(enumerate(BEST[:3]))
    half_written = not written and (call, when) != ("create_run", "before")
    assert len(store.runs(ViewType.DELETED_ONLY)) == half_written


def test_a_search_killed_between_journal_and_tracker_is_made_up_for(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_store, "PAGE", 2)  # existing runs come in several pages
    records = [record(index) for index in range(7)]
    tracker = store.tracker()
    tracker.start({})
    for each in records[:5]:
        tracker.trial(each)
    new_tracker = store.tracker(strict=True)
    new_tracker.start({})
    assert new_tracker.sync(records) == 2
    assert list(store.children) == [f"trial-{index:03d}" for index in range(7)]
    assert store.tracker(strict=True).sync(records) == 0


def test_a_deleted_view_is_made_again_from_the_journal(store: Store) -> None:
    records = [record(index) for index in range(3)]
    tracker = store.tracker(strict=True)
    tracker.start({"seed": 0})
    tracker.sync(records)
    for run in store.runs():
        store.client.delete_run(run.info.run_id)
    new_tracker = store.tracker(strict=True)
    new_tracker.start({"seed": 0})
    assert new_tracker.sync(records) == 3
    assert list(store.children) == ["trial-000", "trial-001", "trial-002"]
    assert store.parent.data.params == {"seed": "0"}


def test_another_process_may_make_the_experiment_first(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, answers = MlflowClient.get_experiment_by_name, 0

    def late(self: MlflowClient, name: str) -> Any:
        nonlocal answers
        answers += 1
        return None if answers == 1 else original(self, name)

    store.experiment = f"raced {store.study_id}"
    store.client.create_experiment(store.experiment)
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "get_experiment_by_name", late)
        store.tracker(strict=True).start({})
    assert answers == 2
    assert store.parent.info.status == "RUNNING"


# Losing the store.


# Manners.


def test_nothing_is_imported_or_opened_before_the_first_use(store: Store, tmp_path: Path) -> None:
    before = dict(os.environ)
    MlflowTracker(f"sqlite:///{tmp_path}/new/mlflow.db", "lrbo", "0", "my-study")
    assert list(tmp_path.iterdir()) == []
    assert dict(os.environ) == before
    names = [*vars(module).values(), *vars(mlflow_runs).values()]
    origins = {str(getattr(value, "__module__", "")) for value in names}
    assert {"lrbo.tracking.tracker", "lrbo.tracking.mlflow_runs"} <= origins
    assert not any(origin.startswith("mlflow") for origin in origins)


def test_no_run_is_active_afterwards(store: Store) -> None:
    import mlflow

    uri = mlflow.get_tracking_uri()
    tracker = store.tracker(strict=True)
    tracker.start({})
    tracker.trial(record(0))
    assert mlflow.active_run() is None
    assert mlflow.get_tracking_uri() == uri != store.uri


def test_the_null_tracker_shows_nothing() -> None:
    assert NullTracker().sync([record(0)]) == 0


# What the environment wishes for other programs.

ENVIRONMENTS: dict[str, dict[str, str]] = {
    "another registry": {"MLFLOW_REGISTRY_URI": "http://127.0.0.1:9"},
    "another server": {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"},
    "another run": {
        "MLFLOW_RUN_ID": "0" * 32, "MLFLOW_EXPERIMENT_ID": "99", "MLFLOW_EXPERIMENT_NAME": "theirs",
    },
    "written later": {"MLFLOW_ENABLE_ASYNC_LOGGING": "true"},
    "a workspace": {"MLFLOW_ENABLE_WORKSPACES": "true", "MLFLOW_WORKSPACE": "a-team"},
    "no patience": {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "1"},
    "a login": {"MLFLOW_TRACKING_USERNAME": "me", "MLFLOW_TRACKING_TOKEN": "t"},
}  # fmt: skip


@pytest.mark.parametrize("wishes", ENVIRONMENTS.values(), ids=ENVIRONMENTS)
def test_the_environment_leads_no_file_elsewhere(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wishes: dict[str, str]
) -> None:
    for name, value in wishes.items():
        monkeypatch.setenv(name, value)
    tracker = store.tracker(strict=True, study_name=store.study_id)
    begun = time.monotonic()
    tracker.start({"seed": 0})
    tracker.sync([record(0), record(1)])
    tracker.present(PRESENTED)
    tracker.summary({"improvement": 0.5}, [])
    tracker.checkpoint(written(tmp_path / "copied", copied=True))
    tracker.finish(completed=True)
    assert time.monotonic() - begun < 60  # seconds where nothing waits for a server
    assert mlflow_store.pages_of_studies(store.uri)
    for name in wishes:
        monkeypatch.delenv(name)
    assert store.parent.info.status == "FINISHED"
    assert store.parent.data.metrics["improvement"] == 0.5
    assert store.parent.data.tags["mlflow.note.content"] == "**a note**"
    assert list(store.children) == ["trial-000", "trial-001"]
    assert all("nll" in child.data.metrics for child in store.children.values())
    (version,) = store.client.search_model_versions(f"name = '{store.study_id}'")
    assert version.run_id == store.children["trial-001"].info.run_id


NAMES = [
    "it's", 'a "b" \'c\'', "back\\slash", "ends in \\", "50%25 %s", "Größe 模型 🙂", "x" * 250,
    "a;b` = '1' or name like '%", "..", " ", "<b>*x*</b>",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_any_name_of_a_study_and_a_folder_is_taken(store: Store, tmp_path: Path, name: str) -> None:
    for _ in range(2):
        tracker = store.tracker(strict=True, study_name=name)
        tracker.start({"study": name})
        tracker.sync([record(1)])
    assert store.parent.data.tags["lrbo.study"] == name
    one = written(tmp_path / f"folder of {name[:200]}")
    for _ in range(2):
        tracker.checkpoint(one)
    tracker.finish(completed=True)
    runs = {child.info.run_id for child in store.children.values()}
    versions = [v for v in store.client.search_model_versions() if v.run_id in runs]
    assert [version.tags["folder"] for version in versions] == [str(one.folder)]


@pytest.mark.parametrize("name", ["it's 50% é", "..", "../outside", "/tmp/absolute", "a#b?c"])
def test_any_name_of_an_experiment_keeps_its_files_in_its_folder(store: Store, name: str) -> None:
    store.experiment = f"{name}{store.study_id}" if name != ".." else name
    tracker = store.tracker(strict=True)
    tracker.start({})
    tracker.trial(record(0))
    (child,) = store.children.values()
    file = store.artifact(child, "allocation.json")
    assert file.is_file()
    assert store.artifacts.resolve() in file.resolve().parents


def test_a_changed_identity_is_refused_by_name(store: Store) -> None:
    store.study_id = "x' or 'a' = 'a"
    with pytest.raises(TrackingError, match=r"lrbo.study_id=.*study\.json"):
        store.tracker().start({})
