"""Each command, in process, on the tiny model; bad input leaves everything as it was."""

import contextlib
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import lrbo
from lrbo import cli

TINY = ["experiment=tiny", "search.trials=5", "search.initial=4", "output=json"]
# The checkpoint holds the same numbers that the trial was scored with: float32, another order
# of the same sums.
TOLERANCE = {"nll": 1e-5}
SEARCH_KEYS = {
    "study": str,
    "trials_completed": int,
    "trials_failed": int,
    "tokens_scored": int,
    "dense": {"nll", "perplexity"},
    "uniform": {"nll", "perplexity", "keep_ratio"},
    "best": {"trial", "nll", "perplexity", "keep_ratio", "parameters"},
    "front": list,
    "seconds": {"suggestion", "allocation", "scoring", "logging"},
}


@dataclass
class Ran:
    """What a command answered."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Return the last line of stdout."""
        found: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return found


def lrbo_command(*arguments: str) -> Ran:
    """Run a command line in this process, in the current folder."""
    out, err = io.StringIO(), io.StringIO()
    status = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), same_logging():
        try:
            cli.main(arguments)
        except SystemExit as exit_:
            status = exit_.code if isinstance(exit_.code, int) else 0
    return Ran(status, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def same_logging() -> Iterator[None]:
    """Take back what a command line sets for its whole process."""
    handlers, level, show = logging.root.handlers[:], logging.root.level, warnings.showwarning
    try:
        yield
    finally:
        logging.root.handlers[:], warnings.showwarning = handlers, show
        logging.root.setLevel(level)


def in_folder(folder: Path, action: Callable[[], Ran]) -> Ran:
    """Run something in another folder."""
    with contextlib.chdir(folder):
        return action()


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ran]:
    """Run one tiny search; tests may read its folder and add to it, but not change its trials."""
    folder = tmp_path_factory.mktemp("project")
    return folder, in_folder(folder, lambda: lrbo_command("search", *TINY))


@pytest.fixture
def project(searched: tuple[Path, Ran], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in the folder of the tiny search."""
    monkeypatch.chdir(searched[0])
    return searched[0]


def state_of(folder: Path) -> dict[str, bytes]:
    """Return every file of a study that must not change by accident."""
    names = ("journal.jsonl", "study.json", "config.yaml", "tokens.safetensors")
    return {name: (folder / name).read_bytes() for name in names}


# --- search ------------------------------------------------------------------------------------


def test_search_answers_with_the_fixed_keys(searched: tuple[Path, Ran]) -> None:
    _, ran = searched
    assert ran.status == 0, ran.err
    found = ran.json
    for key, expected in SEARCH_KEYS.items():
        if isinstance(expected, set):
            assert set(found[key]) >= expected, key
        else:
            assert isinstance(found[key], expected), key
    assert found["study"] == "tiny"
    assert (found["trials_completed"], found["trials_failed"]) == (5, 0)
    assert all(set(point) == {"trial", "nll", "keep_ratio"} for point in found["front"])
    assert found["best"]["keep_ratio"] <= 0.8
    assert found["best"]["nll"] <= found["uniform"]["nll"]
    assert set(found["test"]) == {"dense", "uniform", "best"}


def test_a_search_leaves_a_study_with_pictures(searched: tuple[Path, Ran]) -> None:
    folder, ran = searched
    study = folder / "studies" / "tiny"
    for name in ("convergence", "front", "ranks", "sensitivity"):
        assert (study / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert {"journal.jsonl", "study.json", "config.yaml", "front.json"} <= {
        path.name for path in study.iterdir()
    }
    assert "Results" in ran.out
    assert "Trial   5/5" in ran.err


def test_a_finished_search_typed_again_adds_nothing(project: Path, searched: Any) -> None:
    before = state_of(project / "studies" / "tiny")
    ran = lrbo_command("search", *TINY)
    assert ran.status == 0, ran.err
    assert ran.json == searched[1].json
    assert state_of(project / "studies" / "tiny") == before
    assert "5 of 5 trials are done" in ran.err
    # What was made once is not made again.
    for step in ("Calibration", "Factorization", "Dense model", "Loss of layers", "Test text"):
        assert step not in ran.err


def test_another_configuration_is_refused_with_the_differences(project: Path) -> None:
    before = state_of(project / "studies" / "tiny")
    ran = lrbo_command("search", *TINY, "budget.keep_ratio=0.7", "data.window=32")
    assert ran.status == 2
    assert "budget.keep_ratio: the study has 0.8, the command has 0.7" in ran.err
    assert "data.window: the study has 64, the command has 32" in ran.err
    assert state_of(project / "studies" / "tiny") == before


def test_a_second_process_is_refused(project: Path) -> None:
    before = state_of(project / "studies" / "tiny")
    hold = (
        "import sys, time; from filelock import FileLock; lock = FileLock('studies/tiny/lock'); "
        "lock.acquire(); print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        try:
            ran = lrbo_command("search", *TINY, "search.trials=9")
        finally:
            holder.kill()
    assert ran.status == 2
    assert "another process is working on study tiny" in ran.err
    assert state_of(project / "studies" / "tiny") == before


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        (["budget.keep_ratio=0.05"], ["The smallest feasible budget.keep_ratio is 0.2445"]),
        (
            ["data.validation.tokens=9000000", "data.test.tokens=9000000"],
            ["data.validation: text 'words'", "data.test: text 'words'"],
        ),
        (
            ["budget.keep_ratio=0.05", "data.test.tokens=9000000"],
            ["smallest feasible budget.keep_ratio", "data.test: text 'words'"],
        ),
        (["seed=-1", "+extra=1", "trials=9"], ["seed=-1", "extra is no key", "search.trials?"]),
    ],
)
def test_a_search_that_cannot_work_begins_nothing(
    overrides: list[str], messages: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lrbo.builders.load_model", lambda *_, **__: pytest.fail("model loaded"))
    ran = lrbo_command("search", *TINY, "study=doomed", *overrides)
    assert ran.status == 2
    for message in messages:
        assert message in ran.err
    assert not (tmp_path / "studies" / "doomed").exists()


def test_a_place_that_is_no_folder_is_named_with_everything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine", encoding="utf-8")
    ran = lrbo_command("search", *TINY, "studies=file", "seed=-1")
    assert ran.status == 2
    assert "is a file, not a folder" in ran.err
    assert "seed=-1" in ran.err
    assert Path("file").read_text(encoding="utf-8") == "mine"


# --- report ------------------------------------------------------------------------------------


def test_report_answers_as_the_search_did(project: Path, searched: tuple[Path, Ran]) -> None:
    ran = lrbo_command("report", "study=tiny", "output=json")
    assert ran.status == 0, ran.err
    assert ran.json == searched[1].json
    assert "Front" in ran.out


def test_report_rebuilds_a_lost_mlflow_store(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(project / "studies" / "tiny", tmp_path / "studies" / "tiny")
    monkeypatch.chdir(tmp_path)
    first = lrbo_command("report", "study=tiny", "sync=true", "output=json")
    assert first.status == 0, first.err
    assert "5 trials were missing" in first.err
    again = lrbo_command("report", "study=tiny", "sync=true", "output=json")
    assert "0 trials were missing" in again.err
    assert again.json == first.json


def test_a_warning_of_ours_reaches_the_user(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(project / "studies" / "tiny", tmp_path / "studies" / "tiny")
    monkeypatch.chdir(tmp_path)
    with Path("studies/tiny/journal.jsonl").open("ab") as journal:
        journal.write(b'{"event": "sugg')
    ran = lrbo_command("report", "study=tiny", "figures=false")
    assert ran.status == 0, ran.err
    assert "ends in half a line" in " ".join(ran.err.split())


def test_a_study_that_is_not_there_is_named(project: Path) -> None:
    for command in (["report"], ["compress", "out=new"]):
        ran = lrbo_command(*command, "study=nobody")
        assert ran.status == 2
        assert "there is no study at studies/nobody" in ran.err


# --- compress and evaluate ---------------------------------------------------------------------


def test_compress_writes_what_evaluate_scores_like_the_trial(project: Path, searched: Any) -> None:
    best = searched[1].json["best"]
    ran = lrbo_command("compress", "study=tiny", "out=best", "output=json")
    assert ran.status == 0, ran.err
    found = ran.json
    keys = {"folder", "parameters", "parameters_in_file", "keep_ratio", "storage", "refit"}
    assert set(found) == keys
    assert found["parameters"] == found["parameters_in_file"]
    assert found["keep_ratio"] == best["keep_ratio"]
    assert found["storage"] == "pivoted"
    assert "Largest coefficient of the pivoted layers: " in ran.err
    model = lrbo.load("best")
    assert sum(p.numel() for p in model.parameters()) == found["parameters"]
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 258)
    scored = lrbo_command("evaluate", "checkpoint=best", *EVALUATE)
    assert scored.status == 0, scored.err
    expected = searched[1].json["test"]["best"]["nll"]
    assert scored.json["nll"] == pytest.approx(expected, abs=TOLERANCE["nll"])


EVALUATE = ["model=tiny", "data=generated", "output=json"]


def test_evaluate_scores_the_dense_model_and_states_text_and_windows(
    project: Path, searched: tuple[Path, Ran]
) -> None:
    ran = lrbo_command("evaluate", *EVALUATE)
    assert ran.status == 0, ran.err
    found = ran.json
    assert set(found) == {"text", "window", "stride", "tokens", "nll", "perplexity"}
    assert (found["window"], found["stride"], found["tokens"]) == (64, 64, 16 * 63)
    expected = searched[1].json["test"]["dense"]
    assert found["text"] == expected["text"]
    assert found["nll"] == pytest.approx(expected["nll"], abs=TOLERANCE["nll"])
    assert "16 windows of 64, stride 64" in ran.out


def test_evaluate_reads_local_text(project: Path) -> None:
    Path("mine.txt").write_text("the cat sat on the mat. " * 40, encoding="utf-8")
    ran = lrbo_command(
        "evaluate", "model=tiny", "data=files", "data.test.path=mine.txt", "data.window=32",
        "output=json",
    )  # fmt: skip
    assert ran.status == 0, ran.err
    assert ran.json["text"].startswith("files:mine.txt")
    assert ran.json["tokens"] == 24 * 40 // 32 * 31


def test_the_best_after_refits_is_written(project: Path) -> None:
    ran = lrbo_command("compress", "study=tiny", "refit.candidates=2", "out=two", "output=json")
    assert ran.status == 0, ran.err
    tried = ran.json["refit"]["trials"]
    assert len({row["trial"] for row in tried}) == 2
    for row in tried:
        better = row["validation_nll_after"] < row["validation_nll_before"]
        assert row["taken"] is better
    best = min(
        tried, key=lambda row: min(row["validation_nll_after"], row["validation_nll_before"])
    )
    about = json.loads(Path("two/lrbo.json").read_text(encoding="utf-8"))
    assert about["trial"] == best["trial"]
    assert about["refit"] == ran.json["refit"]
    assert about["validation"]["nll"] == min(
        best["validation_nll_after"], best["validation_nll_before"]
    )
    assert f"Trial {best['trial']} is the best after refits" in " ".join(ran.err.split())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["refit.candidates=0"], "refit.candidates=0: expected at least 1"),
        (["refit.held_back=1"], "refit.held_back=1.0: expected a number from 0 on and below 1"),
        (["refit.candidates=2", "point=1"], "expected 1 with point=1, which names one trial"),
        (["refit.candidates=2", "refit.enabled=false"], "expected 1 with no refit"),
    ],
)
def test_a_refit_that_makes_no_sense_is_refused(
    project: Path, given: list[str], message: str
) -> None:
    ran = lrbo_command("compress", "study=tiny", "out=none", *given)
    assert ran.status == 2
    assert message in " ".join(ran.err.split())


def test_a_trial_and_a_ratio_can_be_compressed(project: Path) -> None:
    one = lrbo_command("compress", "study=tiny", "point=1", "out=one", "output=json")
    assert one.status == 0, one.err
    assert json.loads(Path("one/lrbo.json").read_text(encoding="utf-8"))["trial"] == 1
    small = lrbo_command("compress", "study=tiny", "point=keep=0.8", "out=small", "output=json")
    assert small.status == 0, small.err
    assert small.json["keep_ratio"] <= 0.8


def test_merged_weights_open_with_any_loader(project: Path) -> None:
    from transformers import AutoModelForCausalLM

    ran = lrbo_command("compress", "study=tiny", "merged=true", "out=merged", "output=json")
    assert ran.status == 0, ran.err
    assert "saves nothing" in ran.err
    assert ran.json["storage"] == "dense"
    merged = AutoModelForCausalLM.from_pretrained("merged")
    if not Path("best").exists():
        assert lrbo_command("compress", "study=tiny", "out=best").status == 0
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        torch.testing.assert_close(
            merged(ids).logits, lrbo.load("best")(ids).logits, rtol=1e-4, atol=1e-4
        )


def test_a_folder_that_exists_is_left_alone(project: Path) -> None:
    mine = project / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work", encoding="utf-8")
    ran = lrbo_command("compress", "study=tiny", "out=mine")
    assert ran.status == 2
    assert "exists already" in ran.err
    assert [path.name for path in mine.iterdir()] == ["thesis.txt"]


def test_a_trial_that_is_not_there_is_named_with_those_that_are(project: Path) -> None:
    for point in ("99", "keep=0.5"):
        ran = lrbo_command("compress", "study=tiny", f"point={point}", "out=none")
        assert ran.status == 2
        assert "it has the trials [0, 1, 2, 3, 4]" in ran.err
    assert not (project / "none").exists()


# --- the front door ----------------------------------------------------------------------------


def test_without_a_command_the_commands_are_shown() -> None:
    ran = lrbo_command()
    assert ran.status == 0
    for command in cli.COMMANDS:
        assert f"lrbo {command}" in ran.out
    assert lrbo_command("--version").out == f"lrbo {lrbo.__version__}\n"


def test_an_unknown_command_is_refused_with_the_known_ones() -> None:
    ran = lrbo_command("serach")
    assert ran.status == 2
    assert "search, report, compress, evaluate, dashboard" in ran.err


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_help_names_the_command_and_an_example(command: str) -> None:
    ran = lrbo_command(command, "--help")
    assert ran.status == 0
    assert ran.out.startswith(f"lrbo {command}:")
    assert ran.out.count(f"lrbo {command}") >= 3
    assert "{" not in ran.out.replace("${", ""), "an interpolation that was not resolved"


def complete(line: str) -> list[str]:
    """Ask for what can follow a line, as the shell does."""
    environment = {**os.environ, "COMP_LINE": line}
    code = "from lrbo.cli import main; main(['-sc', 'query=bash'])"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_tab_completes_commands_groups_options_and_keys() -> None:
    assert complete("lrbo ") == list(cli.COMMANDS)
    assert "budget.keep_ratio=" in complete("lrbo search budget.")
    assert "space=per_kind" in complete("lrbo search space=per")
    assert "point=" in " ".join(complete("lrbo compress poi"))


def test_the_completion_script_is_shell_code() -> None:
    script = lrbo_command("--completion", "bash").out
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert "complete -o nospace" in script
    assert lrbo_command("--completion", "tcsh").status == 2
