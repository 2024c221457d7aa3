"""Windows judge a stage as far as there is time for it, and an interruption changes nothing."""

from dataclasses import replace
from pathlib import Path

import torch

from lrbo.recovery.distill import run
from lrbo.recovery.judging import LEAST, windows_in_time
from lrbo.recovery.stage import Recovery
from tests.support.distillations import recovery_of
from tests.support.tiny import token_ids

MANY = 3 * LEAST + 1


def recovery(folder: Path, seconds: float, windows: int = MANY) -> Recovery:
    return recovery_of(folder, deadline=lambda: seconds, held_back=token_ids(windows, 12, 1))


def test_all_judge_where_time_allows_it(tmp_path: Path) -> None:
    given = recovery(tmp_path, 1e6)
    assert torch.equal(windows_in_time(given, 10), given.held_back)


def test_without_time_some_do_which_are_spread_evenly(tmp_path: Path) -> None:
    given = recovery(tmp_path, 0.0)
    rows = [given.held_back.tolist().index(row) for row in windows_in_time(given, None).tolist()]
    assert len(rows) == LEAST
    gaps = [b - a for a, b in zip([-1, *rows], [*rows, MANY], strict=True)]
    assert min(gaps) >= 1
    assert max(gaps) - min(gaps) <= 3


def test_more_steps_leave_less_for_each_look(tmp_path: Path) -> None:
    seconds = 100.0
    few, many = (
        len(windows_in_time(recovery(tmp_path / str(count), seconds, 4000), count))
        for count in (1, 10**6)
    )
    assert many < few


def test_few_windows_all_judge(tmp_path: Path) -> None:
    given = recovery(tmp_path, 0.0, LEAST - 1)
    assert torch.equal(windows_in_time(given, None), given.held_back)


def test_an_interrupted_stage_goes_on_with_its_windows(tmp_path: Path) -> None:
    begun = windows_in_time(recovery(tmp_path, 0.0), None)
    assert torch.equal(windows_in_time(recovery(tmp_path, 1e6), None), begun)


def test_what_is_reported_is_the_loss_on_them(tmp_path: Path) -> None:
    given = recovery(tmp_path, 0.0)
    alone = replace(given, held_back=windows_in_time(given, None), folder=tmp_path / "other")
    alone.folder.mkdir()
    assert run(given).before == run(alone).before
