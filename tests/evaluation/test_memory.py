"""A process of its own says what memory a checkpoint takes, or why it cannot."""

import subprocess
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from lrbo.errors import ModelError
from lrbo.evaluation import memory
from lrbo.evaluation.memory import peak_memory_bytes
from tests.checkpoints.test_export import Compressed

SETTINGS: dict[str, Any] = {"batch": 2, "prompt": 9, "dtype": "float32", "device": "cpu"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Compressed("llama_tied").save(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("dense", [False, True])
def test_a_process_answers_its_peak(
    dense: bool, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:

    def run(command: list[str], **_: Any) -> Any:
        exec(command[-1])
        return subprocess.CompletedProcess(command, 0, capsys.readouterr().out, "")

    monkeypatch.setattr(subprocess, "run", run)
    twins, decoded = Mock(side_effect=memory.dense_twin), Mock(side_effect=memory.decode)
    monkeypatch.setattr(memory, "dense_twin", twins)
    monkeypatch.setattr(memory, "decode", decoded)
    assert peak_memory_bytes(folder, **SETTINGS, dense=dense) > 2**20  # an interpreter at least
    assert twins.call_count == dense
    assert decoded.call_args.args[1].shape == (2, 9 + 1)


def test_a_process_that_ends_is_an_error_that_says_what_it_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = subprocess.CompletedProcess([], -9, "", "first\nKilled: 9\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: ended)
    with pytest.raises(ModelError, match=r"status -9 and said 'Killed: 9'.*memory=false"):
        peak_memory_bytes(tmp_path, **SETTINGS, dense=False)


def test_memory_that_was_given_back_before_is_no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    taken = torch.ones(2**26)  # 256 MiB
    before = memory._peak_bytes(cpu, was_reset=memory._reset_peak(cpu))
    del taken
    if not memory._reset_peak(cpu):
        pytest.skip("this system does not forget a peak")
    assert memory._peak_bytes(cpu, was_reset=True) < before - 2**27
