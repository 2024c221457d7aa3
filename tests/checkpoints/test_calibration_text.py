"""What a checkpoint has seen is found again, however the windows are cut."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import Tensor

from lrbo.checkpoints import calibration_text
from lrbo.checkpoints.calibration_text import FILE, RUN, save_seen, seen_shares
from lrbo.data.windows import TokenWindows
from lrbo.errors import CheckpointError
from tests.support.tiny import token_ids

TEXT = token_ids(1, 6400, vocabulary=50_000).flatten()


def windows(ids: Tensor, length: int) -> Tensor:
    """Cut a text into windows."""
    return ids[: len(ids) // length * length].reshape(-1, length)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a checkpoint that was calibrated on the second quarter of a text."""
    calibration = TokenWindows(windows(TEXT[1600:3200], 200), "mine[calibration]")
    validation = TokenWindows(windows(TEXT[:800], 200), "mine[validation]")
    test = TokenWindows(windows(TEXT[3200:], 200), "mine[test]")
    save_seen(tmp_path, {"calibration": calibration, "validation": validation, "test": test})
    return tmp_path


@pytest.mark.parametrize("shift", [0, 1, 17])
@pytest.mark.parametrize("length", [40, 200, 333])
def test_a_text_is_found_again_in_windows_of_any_length_and_place(
    folder: Path, shift: int, length: int
) -> None:
    shares = seen_shares(folder, windows(TEXT[1600 + shift : 3200], length))
    assert shares is not None
    assert list(shares) == ["calibration (mine[calibration])", "validation (mine[validation])"]
    # Runs over the border of two calibration windows were in none of them.
    assert shares["calibration (mine[calibration])"] >= 1 - 2 * RUN / 200
    assert shares["validation (mine[validation])"] == 0


def test_the_share_is_that_of_the_text_and_what_is_only_reported_on_is_not_seen(
    folder: Path,
) -> None:
    half = seen_shares(folder, windows(TEXT[2400:4000], 200))
    assert half == {
        "calibration (mine[calibration])": 0.5,
        "validation (mine[validation])": 0.0,
    }
    assert set((seen_shares(folder, windows(TEXT[3200:], 200)) or {}).values()) == {0.0}


def test_many_windows_are_looked_at_in_parts_of_equal_weight(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = windows(TEXT[1000:5000], 100)
    whole = seen_shares(folder, ids)
    monkeypatch.setattr(calibration_text, "PART", 7)
    assert len(ids) % 7
    assert seen_shares(folder, ids) == whole


def test_the_text_itself_is_not_in_the_file(folder: Path) -> None:
    content = (folder / FILE).read_bytes()
    for kind in (torch.int64, torch.int32, torch.uint16):
        assert TEXT[1600:1616].to(kind).numpy().tobytes() not in content


def test_a_checkpoint_that_does_not_say_and_one_that_is_damaged(folder: Path) -> None:
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:100])
    with pytest.raises(CheckpointError, match=f"{FILE} is damaged"):
        seen_shares(folder, windows(TEXT, 200))
    (folder / FILE).unlink()
    assert seen_shares(folder, windows(TEXT, 200)) is None


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"calibration": np.zeros(3, np.int32)}, {"calibration": "mine"}),
        ({"calibration": np.zeros((3, 3), np.uint64)}, {"calibration": "mine"}),
        ({"other": np.zeros(3, np.uint64)}, {"calibration": "mine"}),
        ({"calibration": np.zeros(3, np.uint64)}, {"strange": "mine"}),
        ({"calibration": np.zeros(3, np.uint64)}, None),
        ({"calibration": np.zeros(3, np.uint64)}, {"calibration": "mine"}),
    ],
)
def test_hashes_of_another_kind_are_no_hashes(
    folder: Path, tensors: dict[str, Any], metadata: dict[str, str] | None
) -> None:
    save_file(tensors, folder / FILE, metadata=metadata)
    with pytest.raises(CheckpointError, match=f"{FILE} is damaged"):
        seen_shares(folder, windows(TEXT, 200))
