"""Commands that need no tensor import nothing that takes seconds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.journal import Journal

HEAVY = ("torch", "transformers", "scipy", "mlflow", "ax", "botorch", "datasets", "matplotlib")
# Runs command lines one after another; says of each its status, and what was imported by then.
PROGRAM = """
import json, sys
from lrbo.__main__ import main
heavy, lines = json.loads(sys.argv.pop())
for line in lines:
    sys.argv[1:] = line
    status = 0
    try:
        main()
    except SystemExit as error:
        status = error.code or 0
    print(json.dumps([status, sorted(set(heavy) & set(sys.modules))]))
"""


@pytest.fixture
def study(tmp_path: Path) -> str:
    """Return the folder of a study that has results, as ``study=`` takes it."""
    journal = Journal(tmp_path / "mine")
    journal.score_dense(2.0)
    journal.complete(0, 3.0, "uniform")
    journal.complete(1, 2.25)
    return str(journal.study.folder)


def run(folder: Path, *lines: list[str]) -> list[list[object]]:
    """Run command lines in one process; return status and heavy modules after each."""
    given = json.dumps([HEAVY, lines])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, given], cwd=folder, capture_output=True, text=True
    )
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(answers) == len(lines), done.stderr
    return answers


def test_a_refused_command_imports_nothing_heavy(study: str, tmp_path: Path) -> None:
    lines = [
        ["search", "search.trials=0", "study=x"],
        ["search", "trials=3"],
        ["search", "study=..", "method=asvd", "method.alpha=-1"],
        ["search", f"study={study}", "budget.keep_ratio=0.1", "seed=-1"],
        ["search", "-m", "seed=0,-1"],
        ["transfer", "donor=x", "seed=-1"],
        ["compress", "study=none", "out=new"],
        ["compress", f"study={study}", "out=new", "point=99"],
        ["compress", f"study={study}", "out=new", "point=keep=0.001"],
        ["compress", f"study={study}", "out=new", "point=x"],
        ["compress", f"study={study}", "out=mine"],
        ["evaluate", "checkpoint=/nowhere"],
        ["benchmark", "checkpoint=nowhere", "repeats=1"],
        ["report", "study=none"],
        ["report", "study=none_*"],
        ["dashboard", "port=70000"],
        ["dashboard", "studies="],
        ["dashboard", "studies=nowhere"],
    ]
    for line, answer in zip(lines, run(tmp_path, *lines), strict=True):
        assert answer == [2, []], line
    assert not (tmp_path / "new").exists()


def test_a_report_imports_nothing_heavy_and_matplotlib_only_to_draw(
    study: str, tmp_path: Path
) -> None:
    report = ["report", f"study={study}", "output=json"]
    picture = Path(study, "figures", "convergence.png")
    assert run(tmp_path, [*report, "figures=false"], report) == [[0, []], [0, ["matplotlib"]]]
    assert picture.is_file()
    several = ["report", "study=[mine]", "studies=.", "output=json"]
    assert run(tmp_path, report, several) == [[0, []], [0, ["matplotlib"]]]
    assert run(tmp_path, report, several) == [[0, []], [0, []]]
    picture.unlink()
    assert run(tmp_path, report) == [[0, ["matplotlib"]]]
    assert picture.is_file()
