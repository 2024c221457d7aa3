"""Every experiment runs: small here, and its result table is the one that its README shows."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = sorted(
    path
    for path in (ROOT / "experiments").iterdir()
    if path.is_dir() and path.name != "__pycache__"
)
NUMBER = re.compile(r"\d+(\.\d+)?")

# A process that has imported what experiments import, for seconds, and forks once for each that it
# is told to run as ``python run.py`` does: the child is a process of its own.
RUNNER = """
import json, os, runpy, signal, sys, traceback
import lrbo.commands.compress, lrbo.commands.search, lrbo.reports.plots
import mlflow.store.tracking.sqlalchemy_store, matplotlib.backends.backend_agg
for line in sys.stdin:
    script, folder = json.loads(line)
    child = os.fork()
    if child == 0:
        signal.alarm(500)
        os.chdir(folder)
        for descriptor, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), descriptor)
        sys.argv[:] = [script]
        sys.path[0] = os.path.dirname(script)
        status = 1
        try:
            runpy.run_path(script, run_name="__main__")
            status = 0
        except SystemExit as error:
            status = int(error.code or 0)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(status)
    print(os.waitpid(child, 0)[1], flush=True)
"""
Run = Callable[[Path, Path], tuple[int, str, str]]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Return what runs a script in a folder: its status, and what it wrote to stdout and stderr."""
    with subprocess.Popen(
        [sys.executable, "-B", "-c", RUNNER],
        env={**os.environ, "LRBO_SMOKE": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def run(script: Path, folder: Path) -> tuple[int, str, str]:
            process.stdin.write(json.dumps([str(script), str(folder)]) + "\n")
            process.stdin.flush()
            status = int(process.stdout.readline())
            out, err = ((folder / name).read_text(encoding="utf-8") for name in ("out", "err"))
            return status, out, err

        yield run
        process.stdin.close()


def tables(text: str) -> list[list[list[str]]]:
    """Return the tables of a text, each as its rows of cells, the heads first."""
    all_tables: list[list[list[str]]] = []
    inside = False
    for line in text.splitlines():
        is_row = line.startswith("|") and line.endswith("|")
        if is_row and not inside:
            all_tables.append([])
        if is_row and not set(line) <= set("|-: "):
            all_tables[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        inside = is_row
    return all_tables


def contents(folder: Path) -> dict[Path, bytes]:
    return {
        path: path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_there_are_experiments_and_each_is_described_and_can_be_run() -> None:
    assert EXPERIMENTS
    for folder in EXPERIMENTS:
        for name in ("README.md", "run.py"):
            assert (folder / name).is_file(), f"{folder.name} has no {name}"
        readme = (folder / "README.md").read_text(encoding="utf-8")
        assert tables(readme), f"{folder.name}/README.md shows no result"


@pytest.mark.parametrize("folder", EXPERIMENTS, ids=lambda folder: folder.name)
def test_an_experiment_runs_small_and_prints_the_table_of_its_readme(
    folder: Path, tmp_path: Path, run: Run
) -> None:
    before = contents(folder)
    status, out, err = run(folder / "run.py", tmp_path)
    assert status == 0, err
    shown, printed = tables((folder / "README.md").read_text(encoding="utf-8")), tables(out)
    assert [table[0] for table in printed] == [table[0] for table in shown]
    for table in printed:
        assert len(table) > 1, "a table without rows"
        for cells in table[1:]:
            assert len(cells) == len(table[0])
            assert any(NUMBER.match(cell) for cell in cells[1:]), cells
    # What the README shows was measured on the real model; a small run must not touch it.
    assert contents(folder) == before
