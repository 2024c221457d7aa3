"""A process of its own answers what memory a checkpoint takes, or says why it cannot."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lrbo import peak_memory
from lrbo.errors import ModelError
from lrbo.peak_memory import answer_peak, peak_memory_bytes
from lrbo.speed import SpeedSettings
from tests.test_export import Compressed

SETTINGS = SpeedSettings(prompts=(5, 9), batch=2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Compressed("llama_tied").save(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("dense", [False, True])
def test_a_process_answers_its_peak(
    dense: bool, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, Any] = {}

    def run(command: list[str], *, input: str, **_: Any) -> Any:
        asked.update(json.loads(input), command=command)
        monkeypatch.setattr(sys, "stdin", io.StringIO(input))
        answer_peak()
        return subprocess.CompletedProcess(command, 0, capsys.readouterr().out, "")

    monkeypatch.setattr(subprocess, "run", run)
    ran: list[str] = []
    monkeypatch.setattr(peak_memory, "dense_like", recorded(peak_memory.dense_like, ran))
    found = peak_memory_bytes(folder, SETTINGS, "float32", "cpu", dense=dense)
    assert found > 2**20  # an interpreter at least
    assert bool(ran) == dense
    assert (asked["prompt"], asked["batch"]) == (9, 2)


def recorded(function: Any, calls: list[str]) -> Any:
    """Return a function that notes that it was called."""

    def noted(*arguments: Any) -> Any:
        calls.append("called")
        return function(*arguments)

    return noted


def test_a_process_that_ends_is_an_error_that_says_what_it_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = subprocess.CompletedProcess([], -9, "", "first\nKilled: 9\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: ended)
    with pytest.raises(ModelError, match=r"status -9 and said 'Killed: 9'.*memory=false"):
        peak_memory_bytes(tmp_path, SETTINGS, "float32", "cpu", dense=False)


def test_memory_that_was_given_back_before_is_no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    taken = torch.ones(2**26)  # 256 MiB
    before = peak_memory._peak(cpu, reset=peak_memory._reset_peak(cpu))
    del taken
    if not peak_memory._reset_peak(cpu):
        pytest.skip("this system does not forget a peak")
    assert peak_memory._peak(cpu, reset=True) < before - 2**27
