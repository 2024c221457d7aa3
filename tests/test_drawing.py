"""How figures look: labels that keep apart, ticks that fit."""

import pytest

from lrbo import drawing


@pytest.mark.parametrize(
    ("values", "gap", "moved"),
    [
        ([], 1.0, []),
        ([3.0], 1.0, [3.0]),
        ([0.0, 5.0], 1.0, [0.0, 5.0]),
        ([1.0, 1.0], 2.0, [0.0, 2.0]),
        ([5.0, 1.0, 4.5], 2.0, [5.75, 1.0, 3.75]),
        (
            [0.0, 0.1, 1.0],
            1.0,
            [pytest.approx(-19 / 30), pytest.approx(11 / 30), pytest.approx(41 / 30)],
        ),
    ],
)
def test_spread_moves_as_little_as_needed(
    values: list[float], gap: float, moved: list[float]
) -> None:
    assert drawing.spread(values, gap) == moved


@pytest.mark.parametrize(
    ("value", "text"),
    [(7.0, "7"), (1000.0, "1000"), (20_000.0, "20k"), (5e6, "5M"), (1e10, "1e+10")],
)
def test_ticks_of_a_log_axis_are_short(value: float, text: str) -> None:
    assert drawing._tick(value) == text
