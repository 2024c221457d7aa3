"""Blocks take as many windows as their steps can see, and an interruption changes nothing."""

from pathlib import Path

import pytest
import torch

from lrbo.recovery.block_windows import HELD_BACK, windows_in_time
from tests.support.recoveries import TOKENS, TRAINING, Pair, compressed_pair, settings


@pytest.fixture(scope="module")
def pair() -> Pair:
    return compressed_pair()


def counts(pair: Pair, folder: Path, **changes: object) -> tuple[int, int]:
    recovery = pair.recovery(folder, settings(batch_windows=2), **changes)
    training, held_back = windows_in_time(recovery, recovery.task.segments(pair.dense), 5)
    for own, every in ((training, recovery.training), (held_back, recovery.held_back)):
        rows = {tuple(row) for row in every.tolist()}
        assert len({tuple(row) for row in own.tolist()} & rows) == len(own)
    return len(training), len(held_back)


def test_all_windows_are_taken_where_time_allows_it(pair: Pair, tmp_path: Path) -> None:
    assert counts(pair, tmp_path) == (TRAINING, len(pair.text) - TRAINING)


def test_without_time_a_batch_is_left_and_windows_to_judge_by(pair: Pair, tmp_path: Path) -> None:
    long = pair.text.repeat(3, 1) + torch.arange(3 * len(pair.text))[:, None] % 7
    wide = {"training": long[:64], "held_back": long[64:]}
    assert counts(pair, tmp_path, deadline=lambda: 0.0, **wide) == (2, HELD_BACK)


@pytest.mark.parametrize(("tokens", "expected"), [(1, 2), (5 * TOKENS, 6), (99 * TOKENS, TRAINING)])
def test_tokens_take_the_windows_that_they_reach(
    pair: Pair, tmp_path: Path, tokens: int, expected: int
) -> None:
    held_back = len(pair.text) - TRAINING
    assert counts(pair, tmp_path, tokens=tokens, deadline=lambda: 0.0) == (expected, held_back)


def test_an_interrupted_stage_goes_on_with_its_windows(pair: Pair, tmp_path: Path) -> None:
    held_back = len(pair.text) - TRAINING
    assert counts(pair, tmp_path, deadline=lambda: 0.0) == (2, held_back)
    assert counts(pair, tmp_path) == (2, held_back)
