"""Which numbers a setting may be at all: what torch, numpy, Ax and MLflow can take."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict

from lrbo.config import flatten
from lrbo.errors import cut
from lrbo.schema import Config

COUNT = 2**31 - 1  # of anything; more would overflow in one library or another
REPEATED = 10_000  # times that something is done over; more would not end
MOST: Mapping[str, int] = {
    "seed": 2**32 - 1,  # numpy takes no larger one
    **dict.fromkeys(
        (
            "evaluation.pool_allocations", "space.knots", "latency.repeats", "latency.warmup",
            "repeats", "warmup", "steps",
        ),
        REPEATED,
    ),
}  # fmt: skip
DIGITS = 40  # characters of a number in a message


def check_numbers(config: Config) -> dict[str, str]:
    """Find every number of a configuration, also in lists, that is too large or not finite.

    Returns:
        A problem by key.
    """
    problems = {}
    for key, value in flatten(asdict(config)).items():
        for number in _numbers(value):
            most = MOST.get(key, COUNT)
            if isinstance(number, float) and not math.isfinite(number):
                problems[key] = f"{key}={value!r}: expected a finite number"
            elif isinstance(number, int) and abs(number) > most:
                shown = cut(str(number), DIGITS)
                problems[key] = f"{key}={shown}: expected a whole number up to {most:,}"
    return problems


def _numbers(value: object) -> Iterator[int | float]:
    """Yield the numbers in a value, which may be a list."""
    if isinstance(value, list | tuple):
        for one in value:
            yield from _numbers(one)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value
