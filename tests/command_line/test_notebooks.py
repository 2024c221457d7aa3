"""The notebooks run in a kernel of their own, are kept without outputs, and name what fails."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.rglob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def execute(path: Path, folder: Path) -> NotebookNode:
    """Run a notebook in a folder, and return it with its outputs."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}})
    try:
        client.execute()
    except CellExecutionError as error:
        (index,) = [
            index
            for index, cell in enumerate(notebook.cells)
            if any(output.output_type == "error" for output in cell.get("outputs", []))
        ]
        pytest.fail(f"{path.name}, cell {index}:\n{error}", pytrace=False)
    return notebook


def test_there_are_notebooks() -> None:
    assert len(NOTEBOOKS) == 3


@every_notebook
def test_a_notebook_is_kept_without_what_running_it_leaves(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert set(notebook.metadata.language_info) == {"name"}
    assert notebook.cells[0].cell_type == "markdown"
    for cell in notebook.cells:
        assert cell.source
        assert cell.metadata == {}
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


@pytest.mark.slow
@every_notebook
def test_a_notebook_runs_and_shows_figures(path: Path, tmp_path: Path) -> None:
    notebook = execute(path, tmp_path)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    # Of warnings and progress nothing but lines: a kernel moves no cursor.
    assert not [o.text for o in outputs if "\x1b" in o.get("text", "")]
    assert not [o.text for o in outputs if "Warning" in o.get("text", "")]


def test_a_notebook_that_raises_fails_with_the_cell(tmp_path: Path) -> None:
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_code_cell(source) for source in ("1", "raise OSError('no')")]
    path = tmp_path / "broken.ipynb"
    nbformat.write(notebook, path)
    with pytest.raises(pytest.fail.Exception, match=r"broken.ipynb, cell 1:[^$]*raise OSError"):
        execute(path, tmp_path)
