"""lrbo search recover.enabled=true: the best trials are trained, each once, and ranked again."""

import gc
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lrbo.commands import recover, recover_best
from lrbo.config.compose import composed
from lrbo.config.recovery import RecoverySection
from lrbo.config.saved import continued, from_yaml, to_yaml
from lrbo.config.schema import RecoverConfig, SearchConfig, flat
from lrbo.data.windows import TokenWindows
from lrbo.errors import CheckpointError, NonFiniteError
from lrbo.models.tiny import tiny_model
from lrbo.pipeline import planning
from lrbo.pipeline.recovering import RecoveryPlan, plan_recovery
from lrbo.recovery import blocks
from lrbo.reports.results import summary
from lrbo.study.journal import Study
from tests.command_line.test_recover import until_a_block_is_written
from tests.support.commands import Ran, lrbo_command, searched
from tests.support.small_search import RecordingReporter, small_config

__all__ = ["searched"]  # a fixture

STAGES = ["recover.stages=[blocks]", "recover.blocks.epochs=1"]
WANTED = ["recover.enabled=true", "recover.candidates=2", "tracking.enabled=false", *STAGES]


@pytest.fixture
def copied(searched: tuple[Path, Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """Stand beside a copy of the tiny study, which is recovered without drawing its figures."""
    shutil.copytree(searched[0] / "studies" / "tiny", tmp_path / "studies" / "tiny")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recover_best, "show_if_possible", lambda *_: None)
    monkeypatch.setattr(
        recover_best, "release_memory", lambda: None
    )  # which looks at all that pytest holds
    return Study(Path("studies/tiny"))


def recovered(*overrides: str) -> tuple[Study, str]:
    """Do what a search does after its trials; the study, and what was said."""
    study, reporter = Study(Path("studies/tiny")), RecordingReporter()
    with study.locked():
        config = continued(study.config, [*WANTED, *overrides])
        recover_best.recover_best(config, study, reporter)
    return study, "\n".join(reporter.lines)


def events(kind: str) -> list[dict[str, Any]]:
    lines = Path("studies/tiny/journal.jsonl").read_text("utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def ranked(study: Study) -> list[int]:
    """Return the completed trials, the best first."""
    records = sorted(study.state.completed, key=lambda record: record.metrics["objective"])
    return [record.request.trial_index for record in records]


def killed(owner: Any, name: str, patch: Any) -> None:
    """Recover in a process that a patch kills."""
    process = os.fork()  # a process of its own would take ten seconds to import
    if not process:
        setattr(owner, name, patch)
        recovered()
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL


def until_the_second_is_to_be_noted(
    study: Study, event: str, _write: Any = Study.record, **fields: Any
) -> None:
    """Write events, and end as a machine does that loses its power after the second checkpoint."""
    if event == "recovered" and study.state.recovered:
        os.kill(os.getpid(), signal.SIGKILL)
    _write(study, event, **fields)


def test_what_is_killed_goes_on_with_the_candidate_and_the_block(copied: Study) -> None:
    """In the end a checkpoint is what lrbo compress and lrbo recover make of its trial."""
    killed(blocks, "write_tensors", until_a_block_is_written)
    (state,) = Path("studies/tiny/recovered").glob("*/*.recovery")
    assert [path.name for path in (state / "blocks").glob("block*")] == ["block_000.safetensors"]
    assert events("recovered") == []
    killed(Study, "record", until_the_second_is_to_be_noted)
    (first,) = events("recovered")
    checkpoints = sorted(state.parent.glob("trial-???"))
    written = {each: (each / "model.safetensors").stat().st_mtime_ns for each in checkpoints}
    assert len(written) == 2
    study, said = recovered()
    assert "Recovery 1 of 1" in said
    assert "Stage blocks" not in said  # all of them had been trained
    assert {each: (each / "model.safetensors").stat().st_mtime_ns for each in written} == written
    assert [*state.parent.glob("*.*")] == []  # what only an interruption needs
    assert events("recovered")[0] == first
    trials = [event["trial"] for event in events("recovered")]
    assert trials == ranked(study)[:2]

    line = ("compress", "study=tiny", f"point={trials[0]}", "out=made", "register=none")
    assert lrbo_command(*line).status == 0
    config = composed("recover", ["checkpoint=made", "out=better", "model.dtype=float32", *STAGES])
    assert isinstance(config, RecoverConfig)
    by_hand = recover.recover(plan_recovery(config), RecordingReporter(), None)
    own, better = (load_file(Path(f, "model.safetensors")) for f in (checkpoints[0], "better"))
    assert Path(first["folder"]).name == checkpoints[0].name == f"trial-{trials[0]:03d}"
    assert own.keys() == better.keys()
    assert all(torch.equal(own[name], better[name]) for name in own)
    rows = {row["trial"]: row for row in summary(study)["recovered"]}
    for model in ("dense", "before", "after"):
        assert rows[trials[0]]["validation"][model] == pytest.approx(by_hand["validation"][model])

    best = min(rows, key=lambda each: rows[each]["validation"]["after"]["nll"])
    assert [each for each, row in rows.items() if row["is_best"]] == [best]
    assert [each for each, row in rows.items() if row["test"]] == [best]
    assert all(row["exists"] for row in rows.values())
    (entered,) = (event for event in events("compressed") if "recovered" in event["folder"])
    assert entered["trial"] == best
    assert f"trial {best} is the best after recovery" in said
    assert f"It is in {Path(rows[best]['folder'])}" in said
    journal = study.journal.read_bytes()
    assert recovered()[1].startswith("Recovered: ")  # once more, where nothing is left to do
    assert study.journal.read_bytes() == journal
    shutil.move("studies/tiny", "studies/moved")
    shown = summary(Study(Path("studies/moved")))["checkpoints"]
    (checkpoint,) = (each for each in shown if "recovered" in each["folder"])
    assert Path(checkpoint["folder"]) == Path(entered["folder"].replace("/tiny/", "/moved/"))
    assert checkpoint["exists"]


def made_up(trained: list[int]) -> Any:
    """Make up what training makes of trials: the worse one was, the better it is."""

    def recover_one(plan: RecoveryPlan, *_: Any) -> None:
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

    return recover_one


def test_new_candidates_are_added_and_all_are_ranked_again(
    copied: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[int] = []
    monkeypatch.setattr(recover, "recover", made_up(trained))
    trials = ranked(copied)
    recovered()
    assert trained == trials[:2]
    study, said = recovered("recover.candidates=3")
    assert trained == trials[:3]
    before, after = (", ".join(map(str, order)) for order in (trials[:3], trials[2::-1]))
    sentence = f"trial {trials[2]} is the best after recovery; before it was trial {trials[0]}; "
    sentence += f"order {before} before, {after} after"
    assert sentence in said
    assert [event["trial"] for event in events("reranked")] == [trials[1], trials[2]]
    folders = [Path(event["folder"]).name for event in events("compressed")]
    assert folders == [f"trial-{trial:03d}" for trial in (trials[1], trials[2])]
    recovered("recover.candidates=1", "recover.minutes=1")  # a set of its own beside it
    assert trained == [*trials[:3], trials[0]]
    assert len({Path(event["folder"]).parent for event in events("recovered")}) == 2
    assert len([*study.folder.glob("recovered/*/trial-???")]) == 4
    about = json.loads((study.folder / "study.json").read_text("utf-8"))
    assert about["format"] == 6  # so that an lrbo that does not know the lines says it


def test_a_checkpoint_that_was_removed_is_missed_where_it_is_needed(
    copied: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recover, "recover", made_up([]))
    study, said = recovered()
    (best,) = (row for row in summary(study)["recovered"] if row["is_best"])
    assert f"It is in {best['folder']}" in said
    shutil.rmtree(best["folder"])
    assert f"It is no longer in {best['folder']}" in recovered()[1]
    lines = study.journal.read_text("utf-8").splitlines(keepends=True)
    study.journal.write_text("".join(each for each in lines if "reranked" not in each), "utf-8")
    with pytest.raises(CheckpointError, match=rf"no longer in {best['folder']}: put it back"):
        recovered()
    assert recovered("recover.minutes=1")[1].count("It is in") == 1


def test_a_trial_that_cannot_be_trained_does_not_keep_others_from_it(
    copied: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[int] = []
    make, (first, second, *_) = made_up(trained), ranked(copied)

    def recover_one(plan: RecoveryPlan, *rest: Any) -> None:
        if plan.folder.name == f"trial-{first:03d}.start":
            raise NonFiniteError("step 3: a loss is not finite")
        make(plan, *rest)

    monkeypatch.setattr(recover, "recover", recover_one)
    problem = f"1 of 2 trials could not be recovered: trial {first}: step 3: a loss is not finite"
    for _ in range(2):  # the second time that one alone is tried
        with pytest.raises(NonFiniteError, match=problem.replace("2", "[12]")):
            recovered()
        assert trained == [second]
        assert [event["trial"] for event in events("reranked")] == [second]
    monkeypatch.setattr(recover, "recover", make)
    recovered()
    assert [event["trial"] for event in events("recovered")] == [second, first]


def test_no_model_of_the_search_is_left_where_training_begins(
    searched: tuple[Path, Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    def models() -> int:
        gc.collect()
        kind, cpu = type(tiny_model()), torch.device("cpu")
        return sum(type(each) is kind and each.device == cpu for each in gc.get_objects())

    monkeypatch.chdir(searched[0])
    before, left = models(), []
    monkeypatch.setattr(recover_best, "recover_best", lambda *_: left.append(models()))
    ran = lrbo_command("search", "study=tiny", *WANTED)
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
    assert not Path("studies/tiny").exists()


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
