"""Every experiment runs: small here, and its result table is the one that its README shows."""

import os
import re
from pathlib import Path

import pytest

from tests.support import forks

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = sorted(
    path
    for path in (ROOT / "experiments").iterdir()
    if path.is_dir() and path.name != "__pycache__"
)
NUMBER = re.compile(r"\d+(\.\d+)?")


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
    folder: Path, tmp_path: Path
) -> None:
    before = contents(folder)
    small = {**os.environ, "LRBO_SMOKE": "1"}
    process = forks.start_script(folder / "run.py", tmp_path, small)
    status, out, err = forks.ended(process, tmp_path, seconds=500)
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
