"""Each command, in process, on the tiny model; bad input leaves everything as it was."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

import lrbo
from lrbo import cli
from lrbo.config import compose, refusals
from lrbo.config.schema import SCHEMAS
from lrbo.pipeline.overrides import find_problems
from lrbo.study.journal import Study
from tests.support import forks
from tests.support.commands import TINY, Ran, lrbo_command, project, searched, state_of

__all__ = ["project", "searched"]  # fixtures

SEARCH_KEYS = {
    "study": str,
    "trials_completed": int,
    "trials_failed": int,
    "tokens_scored": int,
    "dense": {"nll", "perplexity"},
    "uniform": {"trial", "nll", "perplexity", "keep_ratio"},
    "analytic": {"trial", "nll", "perplexity", "keep_ratio"},
    "gains": list,
    "checkpoints": list,
    "best": {"trial", "nll", "perplexity", "keep_ratio", "parameters"},
    "front": list,
    "seconds": {"suggestion", "allocation", "scoring", "logging"},
}


# --- search ------------------------------------------------------------------------------------


def test_search_answers_with_the_fixed_keys(searched: tuple[Path, Ran]) -> None:
    _, ran = searched
    assert ran.status == 0, ran.err
    answer = ran.json
    for key, expected in SEARCH_KEYS.items():
        if isinstance(expected, set):
            assert set(answer[key]) >= expected, key
        else:
            assert isinstance(answer[key], expected), key
    assert answer["study"] == "tiny"
    assert (answer["trials_completed"], answer["trials_failed"]) == (5, 0)
    assert answer["front"] == []  # there is none at one budget
    assert answer["best"]["keep_ratio"] <= 0.8
    assert answer["best"]["nll"] <= answer["uniform"]["nll"]
    assert set(answer["test"]) == {"dense", "uniform", "analytic", "best"}


def test_what_the_search_adds_is_the_difference_of_single_windows(
    searched: tuple[Path, Ran],
) -> None:
    folder, ran = searched
    state = Study(folder / "studies" / "tiny").state
    (gain,) = ran.json["gains"]
    pair = [state.trials[gain[label]] for label in ("best", "analytic")]
    for record in pair:
        assert record.result is not None
        mean = np.mean(record.result.example_losses)
        assert mean == pytest.approx(record.metrics["nll"], abs=1e-9)
    differences = np.subtract(*(record.result.example_losses for record in pair if record.result))
    assert gain["validation"]["difference"] == pytest.approx(np.mean(differences), abs=1e-9)
    error = stats.sem(differences) if pair[0] is not pair[1] else 0.0
    assert gain["validation"]["standard_error"] == pytest.approx(error, abs=1e-9)
    best, analytic = (state.tests[label] for label in ("best", "analytic"))
    assert best["trial"] == gain["best"]
    for test in (best, analytic):
        assert np.mean(test["example_losses"]) == pytest.approx(test["metrics"]["nll"], abs=1e-9)
    differences = np.subtract(best["example_losses"], analytic["example_losses"])
    assert gain["test"]["difference"] == pytest.approx(np.mean(differences), abs=1e-9)
    assert "What the search adds, nats per token" in ran.out


def test_a_search_leaves_a_study_with_pictures(searched: tuple[Path, Ran]) -> None:
    folder, ran = searched
    study = folder / "studies" / "tiny"
    for name in ("convergence", "ranks", "sensitivity"):
        assert (study / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert {"journal.jsonl", "study.json", "config.yaml", "front.json"} <= {
        path.name for path in study.iterdir()
    }
    assert "Results" in ran.out
    assert "Trial   4 (5/5) model" in ran.err


def test_a_finished_search_typed_again_adds_nothing(project: Path, searched: Any) -> None:
    before = state_of(project / "studies" / "tiny")
    ran = lrbo_command("search", *TINY)
    assert ran.status == 0, ran.err
    assert ran.json == searched[1].json
    assert state_of(project / "studies" / "tiny") == before
    assert "its 5 trials are done; search.trials=15 adds ten" in " ".join(ran.err.split())
    # What was made once is not made again.
    for step in ("Calibration", "Factorization", "Dense model", "Loss of layers", "Test text"):
        assert step not in ran.err


def test_another_configuration_is_refused_with_the_differences(project: Path) -> None:
    before = state_of(project / "studies" / "tiny")
    ran = lrbo_command("search", *TINY, "budget.keep_ratio=0.7", "data.window=32")
    assert ran.status == 2
    assert "budget.keep_ratio: the study has 0.8, the command has 0.7" in ran.err
    assert "data.window: the study has 64, the command has 32" in ran.err
    ran = lrbo_command("search", "study=tiny", "budget.keep_ratio=0.7")
    assert "budget.keep_ratio: the study has 0.8, the command has 0.7" in ran.err
    assert re.search(r"3 problems:.* \d+ keys that were not typed differ too", ran.err, re.DOTALL)
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
    monkeypatch.setattr(
        "lrbo.tasks.causal_lm.CausalLM.load", lambda *_, **__: pytest.fail("model loaded")
    )
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
    assert "Results" in ran.out


def test_report_rebuilds_a_lost_mlflow_store(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(project / "studies" / "tiny", tmp_path / "studies" / "tiny")
    monkeypatch.chdir(tmp_path)
    first = lrbo_command("report", "study=tiny", "sync=true", "output=json")
    assert first.status == 0, first.err
    assert "5 trials were missing" in first.err
    second = lrbo_command("report", "study=tiny", "sync=true", "output=json")
    assert "0 trials were missing" in second.err
    assert second.json == first.json


def test_report_writes_a_page_which_the_tracked_run_holds_too(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pages: None
) -> None:
    held = list((project / "studies" / "mlflow-artifacts").rglob("report.html"))
    assert len(held) == 1
    shutil.copytree(project / "studies" / "tiny", tmp_path / "studies" / "tiny")
    monkeypatch.chdir(tmp_path)
    page = Path("studies/tiny/report.html")
    page.unlink()
    ran = lrbo_command("report", "study=tiny", "format=html", "figures=false")
    assert ran.status == 0, ran.err
    assert str(page) in ran.err
    assert page.read_bytes() == held[0].read_bytes()


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
    assert "search, transfer, report, compress, recover, evaluate, benchmark, dashboard" in ran.err


@cache
def help_of(command: str | None) -> Ran:
    """Return what a command, or all of them, says of itself; Hydra takes seconds for it."""
    return lrbo_command(*([] if command is None else [command]), "--help")


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_help_names_the_command_and_an_example(command: str) -> None:
    ran = help_of(command)
    assert ran.status == 0
    assert ran.out.startswith(f"lrbo {command}:")
    assert ran.out.count(f"lrbo {command}") >= 3
    assert "{" not in ran.out.replace("${", ""), "an interpolation that was not resolved"


@pytest.mark.parametrize("command", [None, *cli.NAMES])
def test_help_fits_a_terminal_of_80_columns(command: str | None) -> None:
    ran = help_of(command)
    assert ran.status == 0
    lines = ran.out.splitlines()
    assert len(lines) >= 4
    assert [line for line in lines if len(line) > 80] == []


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_all_values_of_a_command_are_shown_as_its_help_says(command: str) -> None:
    ran = lrbo_command(command, "--cfg", "job")
    assert ran.status == 0, ran.err
    assert {line.partition(":")[0] for line in ran.out.splitlines() if line[0].isalpha()} == {
        field.name for field in fields(SCHEMAS[command])
    }
    if command == "search":  # the longest, whose help shows a part
        assert "Everything: lrbo search --cfg job" in help_of(command).out


def test_help_lists_the_groups_that_a_command_has() -> None:
    for command, missing in (("search", "protocols"), ("evaluate", "space")):
        groups = re.findall(r"^  (\w+): ", help_of(command).out, re.MULTILINE)
        assert missing not in groups
        values = vars(compose.composed(command, []))
        assert set(groups) - {"experiment"} <= set(values)
        assert {g for g in values if (compose.conf_folder() / g).is_dir()} <= set(groups)


def complete(line: str) -> list[str]:
    """Ask for what can follow a line, as the shell does."""
    environment = {**os.environ, "COMP_LINE": line}
    code = "from lrbo.cli import main; main(['-sc', 'query=bash'])"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_tab_completes_commands_groups_options_and_keys() -> None:
    assert complete("lrbo ") == list(cli.NAMES)
    assert "budget.keep_ratio=" in complete("lrbo search budget.")
    assert "space=per_kind" in complete("lrbo search space=per")
    assert "space=per_kind" in complete("lrbo transfer space=per")
    assert "point=" in " ".join(complete("lrbo compress poi"))


def test_the_completion_script_is_shell_code() -> None:
    script = lrbo_command("--completion", "bash").out
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert "complete -o nospace" in script
    assert lrbo_command("--completion", "tcsh").status == 2


# --- sweeps ------------------------------------------------------------------------------------


def test_what_is_wrong_with_any_job_of_a_sweep_is_said_before_the_first(tmp_path: Path) -> None:
    with contextlib.chdir(tmp_path):
        ran = lrbo_command("search", "-m", "method=svd,magic", "sead=0,1", "budget.keep_ratio=0.8")
    assert ran.status == 2
    assert "method=magic" in ran.err
    assert ran.err.count("did you mean seed?") == 2  # for sead=0 and sead=1
    with contextlib.chdir(tmp_path):
        ran = lrbo_command("search", "-m", "experiment=tiny", "budget.keep_ratio=0.8,2.0")
    assert ran.status == 2
    assert "budget.keep_ratio=2.0: expected a number above 0 and up to 1" in ran.err
    assert not list(tmp_path.iterdir())


def test_a_sweep_takes_what_fits_a_pattern_and_no_interval() -> None:
    """Both were tracebacks."""
    methods = [["method=asvd"], ["method=fwsvd"], ["method=svd"], ["method=svd_llm"]]
    assert refusals.jobs(["method=glob(*svd*)"]) == methods
    typed = ["experiment=tiny", "method=glob(x*)", "budget.keep_ratio=interval(0.5,0.9)"]
    assert find_problems("search", typed, sweeps=True) == [
        "method=glob(x*): no value fits; see --help",
        "budget.keep_ratio=interval(0.5,0.9): expected values one by one, as "
        "budget.keep_ratio=1,2 or budget.keep_ratio=range(3)",
    ]


@pytest.mark.parametrize("option", ["--experiment=tiny", "--trials", "-x"])
def test_an_option_that_is_none_is_refused(option: str) -> None:
    """Hydra took --experiment for the beginning of an option of its own: a traceback."""
    for more in ([], ["--help"], ["-m"]):
        ran = lrbo_command("search", "experiment=tiny", option, *more)
        assert ran.status == 2
        assert f"{option}: no such option; a key is typed without dashes" in ran.err


def test_an_option_may_stand_between_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setattr(cli, "_application", lambda *_: lambda: started.append(sys.argv[1:]))
    monkeypatch.setattr("sys.argv", [])
    sweep = ("experiment=tiny", "-m", "~warm_start", "seed=0,1", "study=s_${seed}")
    for typed in (sweep, ("experiment=tiny", "--cfg", "job", "seed=1")):
        assert lrbo_command("search", *typed).status == 0
    assert started == [
        ["experiment=tiny", "~warm_start", "seed=0,1", "study=s_${seed}", "-m"],
        ["experiment=tiny", "seed=1", "--cfg", "job"],
    ]


def test_jobs_of_a_sweep_that_would_share_a_study_are_refused() -> None:
    (problem,) = find_problems("search", ["experiment=tiny", "seed=0,1"], sweeps=True)
    assert problem.startswith("study=tiny: jobs of this sweep that differ in seed")
    assert problem.endswith("'study=tiny_${seed}'")
    for typed in (["study=tiny_${seed}", "seed=0,1"], ["search.trials=4,5"]):  # more of a study
        assert find_problems("search", ["experiment=tiny", *typed], sweeps=True) == []


@pytest.mark.slow
def test_a_sweep_makes_a_study_per_job_goes_on_when_typed_again_and_is_compared(
    tmp_path: Path,
) -> None:
    def lrbo_process(*arguments: str) -> Ran:
        return Ran(*forks.ended(forks.start_lrbo(arguments, tmp_path), tmp_path, seconds=240))

    sweep = ["search", "-m", "experiment=tiny", "method=svd_llm,bolaco", "seed=1"]
    sweep += ["search.trials=4", "study=sweep_${method.name}_${seed}"]
    first = lrbo_process(*sweep)
    assert first.status == 0, first.err
    names = {"sweep_svd_llm_1", "sweep_bolaco_1"}
    studies = {path.parent.name for path in tmp_path.glob("studies/*/study.json")}
    assert studies == names
    # One of them was killed before its last trial ended.
    journal = tmp_path / "studies" / "sweep_bolaco_1" / "journal.jsonl"
    whole = journal.read_text(encoding="utf-8").splitlines(keepends=True)
    (last,) = [i for i, line in enumerate(whole) if '"ended"' in line and '"trial": 3' in line]
    journal.write_text("".join(whole[:last]), encoding="utf-8")
    second = lrbo_process(*sweep)
    assert second.status == 0, second.err
    assert len([line for line in second.err.splitlines() if line.startswith("Trial ")]) == 1
    ran = lrbo_process("report", "study=sweep_*", "output=json")
    assert ran.status == 0, ran.err
    assert "Perplexity of 2 studies" in ran.out
    assert (tmp_path / "studies" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    summaries = ran.json["studies"]
    assert [study["study"] for study in summaries] == sorted(names)
    assert all(study["trials_completed"] == 4 for study in summaries)
    two = lrbo_process("report", "study=[sweep_bolaco_1,sweep_svd_llm_1]", "sync=true")
    assert two.status == 0, two.err
    assert "Perplexity of 2 studies" in two.out
    assert two.err.count("trials were missing and are there now") == 2
    assert "expected a name, a pattern or a list of names" in lrbo_process("report", "study=[]").err
    none = lrbo_process("report", "study=nothing_*")
    assert none.status == 2
    assert "no study in studies fits study=nothing_*" in none.err
