"""lrbo search recover.enabled=true: the best trials are trained, each once, and ranked again."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file

from lrbo.commands import recover, recover_best
from lrbo.config.compose import composed
from lrbo.config.recovery import RecoverySection
from lrbo.config.saved import from_yaml, to_yaml
from lrbo.config.schema import SearchConfig, flat
from lrbo.data.windows import TokenWindows
from lrbo.models.tiny import tiny_model
from lrbo.pipeline import planning
from lrbo.pipeline.recovering import RecoveryPlan
from lrbo.recovery import blocks
from lrbo.study.journal import Study
from tests.command_line.test_recover import until_a_block_is_written
from tests.support.commands import Ran, lrbo_command, searched
from tests.support.small_search import small_config

__all__ = ["searched"]  # a fixture

STAGES = ["recover.stages=[blocks]", "recover.blocks.epochs=1"]
LINE = ["search", "study=tiny", "recover.enabled=true", "recover.candidates=2", *STAGES]


@pytest.fixture
def copied(searched: tuple[Path, Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """Stand beside a copy of the tiny study, which MLflow does not know."""
    shutil.copytree(searched[0] / "studies" / "tiny", tmp_path / "studies" / "tiny")
    monkeypatch.chdir(tmp_path)
    return Study(Path("studies/tiny"))


def events(kind: str) -> list[dict[str, Any]]:
    lines = Path("studies/tiny/journal.jsonl").read_text("utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def killed(*line: str, **patches: Any) -> None:
    """Run a command in a process that a patch kills."""
    process = os.fork()  # a process of its own would take ten seconds to import
    if not process:
        for name, patch in patches.items():
            setattr({"write_tensors": blocks, "record": Study}[name], name, patch)
        lrbo_command(*line)
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL


def until_the_second_is_to_be_noted(
    study: Study, event: str, _write: Any = Study.record, **fields: Any
) -> None:
    """Write events, and end as a machine does that loses its power after the second checkpoint."""
    if event == "recovered" and study.state.recovered:
        os.kill(os.getpid(), signal.SIGKILL)
    _write(study, event, **fields)


def test_a_search_that_is_killed_goes_on_with_the_candidate_and_the_block(copied: Study) -> None:
    """In the end every checkpoint is what lrbo compress and lrbo recover make of the trial."""
    killed(*LINE, write_tensors=until_a_block_is_written)
    (state,) = Path("studies/tiny/recovered").glob("*/*.recovery")
    assert [path.name for path in sorted((state / "blocks").glob("block*"))] == [
        "block_000.safetensors"
    ]
    assert events("recovered") == []
    killed(*LINE, record=until_the_second_is_to_be_noted)
    (first,) = events("recovered")
    second = sorted(state.parent.glob("trial-???"))[-1]
    written = (second / "model.safetensors").stat().st_mtime_ns
    ran = lrbo_command(*LINE, "output=json")
    assert ran.status == 0, ran.err
    assert "Recovery 1 of 1" in ran.err
    assert "Stage blocks" not in ran.err  # all of them had been trained
    assert (second / "model.safetensors").stat().st_mtime_ns == written
    assert events("recovered")[0] == first
    assert [*state.parent.glob("*.*")] == []  # what only an interruption needs
    trials = [event["trial"] for event in events("recovered")]
    ranked = sorted(copied.state.completed, key=lambda record: record.metrics["objective"])
    assert trials == [record.request.trial_index for record in ranked[:2]]

    trial = str(trials[0])
    assert lrbo_command("compress", "study=tiny", f"point={trial}", "out=made").status == 0
    exact = ["checkpoint=made", "out=better", "model.dtype=float32", *STAGES]
    by_hand = lrbo_command("recover", *exact, "output=json").json
    own = Path("studies/tiny", first["folder"])
    new, old = (load_file(folder / "model.safetensors") for folder in (own, Path("better")))
    assert new.keys() == old.keys()
    assert all(torch.equal(new[name], old[name]) for name in old)
    rows = {row["trial"]: row for row in ran.json["recovered"]}
    for model in ("dense", "before", "after"):
        assert rows[trials[0]]["validation"][model] == pytest.approx(by_hand["validation"][model])

    best = min(rows, key=lambda each: rows[each]["validation"]["after"]["nll"])
    assert [row["trial"] for row in ran.json["recovered"] if row["is_best"]] == [best]
    assert [row["trial"] for row in ran.json["recovered"] if row["test"]] == [best]
    if best == trials[0]:
        for model in ("before", "after"):
            assert rows[best]["test"][model] == pytest.approx(by_hand["test"][model])
    (entered,) = (e for e in events("compressed") if "recovered" in e["folder"])
    assert entered["trial"] == best
    assert f"trial {best} is the best after recovery" in ran.err
    assert str(Path("studies/tiny", rows[best]["folder"])) in ran.err or rows[best]["folder"]

    journal = copied.journal.read_bytes()
    again = lrbo_command(*LINE, "output=json")  # typed once more
    assert copied.journal.read_bytes() == journal
    assert again.json["recovered"] == ran.json["recovered"]
    shown = recovery_runs()
    assert {name: test for name, _, test in shown} == {
        f"recovery-trial-{each:03d}": each == best for each in trials
    }
    for path in Path("studies").glob("mlflow.db*"):
        path.unlink()
    for _ in range(2):
        assert lrbo_command("report", "study=tiny", "sync=true", "figures=false").status == 0
        assert recovery_runs() == shown


def recovery_runs() -> list[tuple[str, float, bool]]:
    """List the finished runs of recoveries by name, with a score, and whether they were tested."""
    client = MlflowClient(f"sqlite:///{Path('studies/mlflow.db').absolute()}")
    (experiment,) = (e for e in client.search_experiments() if e.name == "lrbo")
    runs = client.search_runs([experiment.experiment_id], "tags.`lrbo.role` = 'recovery'")
    (parent,) = client.search_runs([experiment.experiment_id], "tags.`lrbo.role` = 'study'")
    assert {run.data.tags["mlflow.parentRunId"] for run in runs} == {parent.info.run_id}
    assert {run.info.status for run in runs} == {"FINISHED"}
    return sorted(
        (
            run.info.run_name,
            run.data.metrics["validation_after_nll"],
            "test_after_nll" in run.data.metrics,
        )
        for run in runs
    )


def test_new_candidates_are_added_and_all_are_ranked_again(
    copied: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what training would make of them made up: the worse a trial was, the better it is."""
    trained = []

    def made_up(plan: RecoveryPlan, *_: Any) -> None:
        config = json.loads((plan.folder / "config.json").read_text("utf-8"))
        about = config["quantization_config"]["provenance"]
        trained.append(about["trial"])
        nll = about["validation"]["nll"]
        losses = {"dense": 1.0, "before": nll, "after": 9.0 - nll}
        about["recovery"] = {
            "id": f"made up {len(trained)}",
            "scores": {
                model: {"validation": {"nll": loss, "perplexity": 2.0}}
                for model, loss in losses.items()
            },
            "stages": [],
        }
        shutil.copytree(plan.folder, plan.config.out)
        Path(plan.config.out, "config.json").write_text(json.dumps(config), encoding="utf-8")

    monkeypatch.setattr(recover, "recover", made_up)
    ranked = sorted(copied.state.completed, key=lambda record: record.metrics["objective"])
    trials = [record.request.trial_index for record in ranked]
    line = [*LINE, "tracking.enabled=false"]
    assert lrbo_command(*line).status == 0
    assert trained == trials[:2]
    ran = lrbo_command(*line, "recover.candidates=3")
    assert trained == trials[:3]
    before, after = (", ".join(map(str, order)) for order in (trials[:3], trials[2::-1]))
    sentence = f"trial {trials[2]} is the best after recovery; before it was trial {trials[0]}; "
    sentence += f"order {before} before, {after} after"
    assert sentence in " ".join(ran.err.split())
    assert sentence in ran.out
    assert [event["trial"] for event in events("reranked")] == [trials[1], trials[2]]
    folders = [Path(event["folder"]).name for event in events("compressed")]
    assert folders == [f"trial-{trial:03d}" for trial in (trials[1], trials[2])]
    lrbo_command(*line, "recover.minutes=1")  # a set of its own beside it
    assert trained == [*trials[:3], *trials[:2]]
    sets = {Path(event["folder"]).parent for event in events("recovered")}
    assert len(sets) == 2
    assert len([*copied.folder.glob("recovered/*/trial-???")]) == 5
    about = json.loads((copied.folder / "study.json").read_text("utf-8"))
    assert about["format"] == 6  # of which an lrbo that does not know the lines says so


def test_no_model_of_the_search_is_left_where_training_begins(
    searched: tuple[Path, Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    import gc

    def models() -> int:
        gc.collect()
        kind, cpu = type(tiny_model()), torch.device("cpu")
        return sum(isinstance(each, kind) and each.device == cpu for each in gc.get_objects())

    monkeypatch.chdir(searched[0])
    before, left = models(), []
    monkeypatch.setattr(recover_best, "recover_best", lambda *_: left.append(models()))
    ran = lrbo_command(*LINE, "tracking.enabled=false")
    assert ran.status == 0, ran.err
    assert left == [before]


def test_everything_that_is_wrong_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = lrbo_command(
        "search", "experiment=tiny", "budget=front", "search.trials=5", "recover.enabled=true",
        "recover.candidates=9", "recover.minutes=0", "recover.stages=[a]", "recover.blocks.lr=-1",
        "recover.distill.kl=0", "recover.distill.ce=0", "model.dtype=float16",
    )  # fmt: skip
    assert ran.status == 2
    for part in (
        "recover.minutes=0.0: expected a number above 0",
        "recover.stages=['a']: expected some of blocks, distill",
        "recover.blocks.lr=-1.0",
        "recover.candidates=9: expected at most search.trials=5",
        "recover.distill.kl, ce and hidden are all 0",
        "trials of a front have different sizes",
        "model.dtype='float16': expected auto, float32 or bfloat16",
    ):
        assert part in ran.err, part
    ran = lrbo_command(
        "search", "experiment=tiny", "recover.enabled=true", "recover.candidates=0",
        "data.calibration.path=null",
    )  # fmt: skip
    assert "recover.candidates=0: expected at least 1" in ran.err
    assert "data.calibration.path=None: expected a text" in ran.err
    ran = lrbo_command(
        "search", "experiment=tiny", "recover.enabled=true", "data.calibration.tokens=64"
    )
    assert ran.status == 2
    assert "data.calibration has 1 window, and 1 is held back" in ran.err
    assert not Path("studies").exists()


def test_text_that_is_scored_is_not_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search allows a window's half to be shared, for it trains on nothing."""
    monkeypatch.chdir(tmp_path)
    config = small_config("recover.enabled=true")
    plan = planning.plan_search(config, Study(Path("studies/none")), [])
    assert recover_best.problems_of(plan) == []
    ids = plan.windows["test"].examples.clone()
    ids[0] = plan.windows["calibration"].examples[0]
    plan.windows["test"] = TokenWindows(ids, "mine")  # type: ignore[index]
    (problem,) = recover_best.problems_of(plan)
    assert "of mine (data.test) is in data.calibration, which is trained on" in problem


def test_a_study_that_recovers_nothing_is_what_it_was() -> None:
    config = composed("search", ["experiment=tiny"])
    assert isinstance(config, SearchConfig)
    text = to_yaml(config)
    assert "recover" not in text
    assert from_yaml(text, "it") == config
    wanted = composed("search", ["experiment=tiny", "recover.enabled=true", "recover.tokens=9"])
    assert isinstance(wanted, SearchConfig)
    assert from_yaml(to_yaml(wanted), "it") == wanted
    assert wanted.recover.section == RecoverySection(tokens=9)
    alone = flat(composed("recover", ["checkpoint=x", "out=y"]))
    values = flat(config)
    own = {key for key in values if key.startswith("recover.")}
    assert own == {key for key in alone if key.startswith("recover.")} | {
        "recover.enabled", "recover.candidates",
    }  # fmt: skip
    assert all(values[key] == alone[key] for key in own & alone.keys())
